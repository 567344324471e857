"""What a plan is worth by how it was measured: probes against perturbation, windows, probes and forms.

    python -m benchmarks.sensitivity [--windows 2,4,9] [--probes 1,4,8] [--perturb 3] [--profile FILE ...]

Windows of the text that ships with the package (or of `--text` files) are measured; plans are judged by their KL from
the dense model on windows of other text (task divergence's). Both forms, every number of windows at the last but one
number of probes, and every number of probes at the last but one number of windows. `--perturb N` measures N windows by
perturbation.py as well: 75 minutes for eight of them on two CPU cores, 171 s for thirty on an H100. Budgets are of
16-bit numbers whatever the model's type.
"""

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

import torch

import longwave
from benchmarks import perturbation
from longwave import plan as planner
from longwave.cli.console import show_table
from longwave.evals.data import data_folder
from longwave.evals.fork import fork, prefill
from longwave.evals.loss import score
from longwave.evals.task import Setting
from longwave.evals.tasks.divergence import Divergence
from longwave.frame.observe import probing
from longwave.plan import probe, recall
from longwave.plan.automatic import own_texts
from longwave.plan.profile import Profile, Sensitivity
from longwave.shape import CacheShape

BUDGETS = (0.25, 0.15625, 0.1, 0.06, 0.04)


class Judge:
    """Unseen windows, read once: what a plan's cache says of the tokens after them, against the dense model.

    text: of task divergence, or a file. hides: facts are written into the windows; only what answers for them counts.
    """

    def __init__(self, model, tokenizer, windows, context, scored, text="mixed", hides=False):
        task = Divergence(contexts=(context,), scored=scored, windows=windows, text=text)
        samples = task.samples(Setting(tokenizer, seed=42, data=data_folder()))
        self.model, self.read, self.ids, self.weights = model, [], [], []
        for number, one in enumerate(samples):
            row, weight = list(one.ids), [1.0] * (len(one.ids) - context - 1)
            if hides:
                row, weight, _ = recall.hide(tokenizer, row, context, random.Random(number))
            ids = torch.tensor([row])
            memory = prefill(model, ids[:, :context], needs=probing(longwave.Fourier().window))
            exact = score(model, fork(memory, longwave.cache(model, "dense")), ids[:, context:])
            self.read.append((memory, ids[:, context:], exact))
            self.ids.append(row)
            self.weights.append(torch.tensor(weight) / sum(weight))

    def mean(self, number, values):
        """Over the tokens that count of window `number`."""
        return float((values * self.weights[number].to(values.device)).sum())

    def divergence(self, number, found):
        """Mean KL of window `number`."""
        return self.mean(number, found.divergence(self.read[number][-1])[0][0])

    def dense(self):
        return sum(self.mean(i, exact.losses[0]) for i, (*_, exact) in enumerate(self.read)) / len(self.read)

    def __call__(self, make):
        """(mean KL, its standard error, loss over dense) of caches that `make` builds."""
        kls, losses = [], []
        for number, (memory, ids, exact) in enumerate(self.read):
            found = score(self.model, fork(memory, make()), ids)
            kls.append(self.divergence(number, found))
            losses.append(self.mean(number, (found.losses - exact.losses)[0]))
        kl = torch.tensor(kls)
        return float(kl.mean()), float(kl.std() / len(kls) ** 0.5), sum(losses) / len(losses)


def now(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def every(model, windows, method, probes, temperature):
    """{form: costs [probes, windows, layers, heads, options]} and K's channel weights: every table's parts at once."""
    shape = CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)
    page, weight, found, seconds = method.page(shape), None, {form: [] for form in probe.FORMS}, []
    for row in range(len(windows.ids)):
        began = now(model)
        bench = probe.Bench(model, windows.part(slice(row, row + 1)), method, probes, row, temperature)
        layers = range(len(bench.layers))
        if weight is None:
            weight = torch.stack([bench.key_weight(position, page.segment) for position in layers])
        rows = {form: [] for form in probe.FORMS}
        for position in layers:
            dots = list(bench.dots(position, probe.stored(bench, position, weight[position], page)))
            for form in probe.FORMS:
                rows[form].append(torch.stack([probe.costs(dot, form)[:, 0] for dot in dots], -1))
        for form in probe.FORMS:
            found[form].append(torch.stack(rows[form], 1))
        seconds.append(now(model) - began)
        print(f"window {row + 1}: {seconds[-1]:.1f} s", flush=True)
    return {form: torch.stack(parts, 1) for form, parts in found.items()}, weight, seconds


def profile_of(costs, weight, rows):
    """costs [windows, layers, heads, options] as a profile."""
    about = {
        "k_options": list(planner.KEY_OPTIONS),
        "v_options": list(planner.VALUE_OPTIONS),
        "both_options": list(planner.BOTH_OPTIONS),
        "segment": 128,
        "states": 1,
    }
    sides = costs.split(probe.OPTIONS, -1)
    return Profile({}, {}, {}, sensitivity=Sensitivity(about, *sides, rows.recall[: len(costs)], weight))


def took(model, windows, method, counts):
    """{probes: seconds a window takes}, the second one's: the first loads what the others find."""
    found = {}
    probe.measure(model, windows.part(slice(0, 1)), method, 1)
    for probes in counts:
        began = now(model)
        probe.measure(model, windows.part(slice(1, 2)), method, probes)
        found[probes] = now(model) - began
    return found


def correlation(ours, theirs):
    """Of log costs, K's and V's."""
    pairs = (
        (ours.costs(side).clamp(min=1e-9).log().flatten(), theirs.costs(side).clamp(min=1e-9).log().flatten())
        for side in "kv"
    )
    return [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--model", default="smollm2-q4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=numbers, default=[2, 4, 9])
    parser.add_argument("--probes", type=numbers, default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=probe.TEMPERATURE)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--forms", type=lambda text: text.split(","), default=list(probe.FORMS))
    parser.add_argument("--perturb", type=int, default=0)
    parser.add_argument("--profile", type=Path, action="append", default=[])
    parser.add_argument("--judged", type=int, default=6, help="unseen windows")
    parser.add_argument("--context", type=int, default=3000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = longwave.load(args.model, dtype=args.dtype)
    model.to(args.device)
    method = longwave.Fourier()
    most, asked = max(args.windows), max(args.windows) // 3
    texts = [path.read_text() for path in args.text] or own_texts()
    rows = recall.windows(tokenizer, texts, args.tokens - args.scored - 1, args.scored, most - asked, asked)
    costs, weight, seconds = every(model, rows, method, max(args.probes), args.temperature)
    times = took(model, rows, method, args.probes)
    print("seconds a window by probes", times)
    judge = Judge(model, tokenizer, args.judged, args.context, 256)
    print(f"dense loss {judge.dense():.4f} on {args.judged} windows of {args.context}")
    named = {"no measurement": None}
    named |= {f"{file}": Profile.load(file) for file in args.profile}
    if args.perturb:
        began = time.perf_counter()
        measured = perturbation.measure(model, rows.part(slice(0, args.perturb)), method)
        named[f"perturbed, {args.perturb} windows, {time.perf_counter() - began:.0f} s"] = Profile(
            {}, {}, {}, sensitivity=measured
        )
    windows, probes = sorted(args.windows), sorted(args.probes)
    usual = windows[-2:][0], probes[-2:][0]
    star = [(count, usual[1]) for count in windows] + [(usual[0], count) for count in probes if count != usual[1]]
    for form in args.forms:
        for count, drawn in star:
            name = f"{form}, {count} windows, {drawn} probes, {count * times[drawn]:.1f} s"
            named[name] = profile_of(costs[form][:drawn, :count].mean(0), weight, rows)
    share = 2 / model.dtype.itemsize
    found = []
    for name, profile in named.items():
        for budget in BUDGETS:
            try:
                bound = method.bind(
                    CacheShape.of(model.config.get_text_config(decoder=True), model.dtype), profile, budget * share
                )
            except ValueError as error:
                found.append({"plan": name, "budget": budget, "refused": str(error)})
                continue
            kl, error, loss = judge(lambda bound=bound: longwave.cache(model, bound))
            expected = bound.expected and dataclasses.asdict(bound.expected)
            found.append({"plan": name, "budget": budget, "kl": kl, "error": error, "loss": loss, "expected": expected})
            print(found[-1], flush=True)
    for name, profile in named.items():
        if profile is not None and args.profile:
            k, v = correlation(profile.sensitivity, named[str(args.profile[0])].sensitivity)
            print(f"{name}: log costs correlate with {args.profile[0]}'s {k:.3f} (K), {v:.3f} (V)")
    show_table(
        "KL from dense",
        ["plan", *map(str, BUDGETS)],
        [
            [
                name,
                *(
                    f"{row['kl']:.4f} ({row['error']:.4f})" if "kl" in row else "refused"
                    for row in found
                    if row["plan"] == name
                ),
            ]
            for name in named
        ],
    )
    if args.out:
        args.out.write_text(
            json.dumps(
                {
                    "arguments": vars(args),
                    "dense_loss": judge.dense(),
                    "seconds": seconds,
                    "by_probes": times,
                    "rows": found,
                },
                default=str,
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
