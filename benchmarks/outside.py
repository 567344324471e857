"""The methods that kvpress has as well, on the same prompts with as many tokens kept: which stay, and what it costs.

    python3 -m venv /tmp/kvpress
    /tmp/kvpress/bin/pip install torch==2.13.0 kvpress==0.5.5      # with an older transformers: never into .venv
    python -m benchmarks.outside [--python /tmp/kvpress/bin/python] [--methods snapkv,tova] [--out out/outside]

SmolLM2 in float32, windows of the divergence task, so text that calibrated nothing. kvpress runs in a process of its
own (presses.py) and leaves its files in --out, where they are taken up again; then this side reads the same. Ratio is
the share that goes, of all tokens (ThinK: of the keys' channels), as there. Every method is run twice: "as theirs", set
so that the algorithm is the same where it can be, and with the ends it protects by default, at as many tokens.
    same tokens     both sides keep, over the larger number kept, layer by layer and head by head: mean and worst
    scores apart    the largest difference, each head's scores scaled to at most 1; of tokens that neither side protects
    KL, loss        of the next --scored tokens after the prompt: from each side's own dense model, of float32 logits
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

import longwave
from longwave.evals.data import data_folder
from longwave.evals.fork import fork, needs_of, prefill
from longwave.evals.loss import score
from longwave.evals.task import Setting
from longwave.evals.tasks.divergence import Divergence
from longwave.methods import get_method
from longwave.models import load_tokenizer, locate

CONTEXT = 1500
ALL = dict(sinks=4, window=1)
NONE = dict(sinks=0, window=1)  # kvpress lets every token go but what a score protects
# name -> options that make ours what theirs is; options beside the number of tokens by default
OURS = {
    "streaming": (ALL, {}),
    "knorm": (NONE, {}),
    "tova": (NONE, {}),
    "snapkv": ({}, {}),
    "pyramidkv": ({}, {}),
    "adakv": ({}, {}),
    "expected_attention": ({**ALL, "queries": CONTEXT - 4, "stride": 1}, {}),
    "kvzip": (ALL, {}),
    "think": (NONE, {}),
}
ASK = "\n\nRepeat the previous context exactly.\n"  # what KVzipPress says before the first chunk


def prompts(tokenizer, windows, scored):
    """int64 [windows, CONTEXT + scored + 1]."""
    task = Divergence(contexts=CONTEXT, scored=scored, windows=windows)
    made = task.samples(Setting(tokenizer, data=data_folder()))
    return torch.tensor([list(sample.ids) for sample in made])


def theirs(python, folder, job):
    """The files that kvpress wrote, by (name, ratio)."""
    paths = {(name, ratio): folder / f"{name}-{ratio:g}.safetensors" for name, ratio in job["presses"]}
    if not all(path.exists() for path in paths.values()):
        ask_kvpress(python, folder, job)
    return {key: load_file(path) for key, path in paths.items()}


def ask_kvpress(python, folder, job):
    tried = (
        subprocess.run([python, "-c", "import kvpress"], capture_output=True, text=True) if python.exists() else None
    )
    if tried is None or tried.returncode:
        why = "there is no such file" if tried is None else tried.stderr.strip().splitlines()[-1]
        raise SystemExit(
            f"{python} cannot import kvpress ({why}). Give it an environment of its own:\n"
            "    python3 -m venv /tmp/kvpress && /tmp/kvpress/bin/pip install torch==2.13.0 kvpress==0.5.5\n"
            "and name it: --python /tmp/kvpress/bin/python"
        )
    (folder / "job.json").write_text(json.dumps(job))
    subprocess.run([python, Path(__file__).with_name("presses.py"), folder], check=True)


def build(name, options, ratio, ask):
    """Our method that keeps as much."""
    if name == "think":
        return get_method(name, ratio=ratio, **options)
    extra = {"ask": ask} if name == "kvzip" and options else {}
    return get_method(name, tokens=int(CONTEXT * (1 - ratio)), **options, **extra)


def kept(memory):
    """Which tokens stay, of ThinK which channels: bool [layers, kv_heads, n]."""
    made = []
    for layer in memory.layers:
        heads = layer.bound.shape.kv_heads
        if memory.method.method.name == "think":
            index = layer.store.channels[0].long()
            width = layer.bound.shape.head_dim
        elif memory.method.method.name in ("adakv", "kvzip"):
            items = [layer.head(head) for head in range(heads)]
            index, width = [x["position"][0, 0, : n[0]].long() for x, n in items], CONTEXT
        else:
            index, width = layer.dense.column("position")[0].long(), CONTEXT
        made.append(torch.stack([torch.zeros(width, dtype=torch.bool).scatter(0, row, True) for row in index]))
    return torch.stack(made)


def settled(dense, memory):
    """memory, filled, and the scores [layers, kv_heads, n] by which it chose; None of methods without."""
    cls, noted = type(memory.method.method), []
    if not hasattr(cls, "score"):
        return fork(dense, memory), None
    asked = cls.score

    def noting(method, held):
        found = asked(method, held)
        noted.append(found[0].float().clone())
        return found

    with patch.object(cls, "score", noting):
        fork(dense, memory)
    rows = sum(layer.bound.shape.kv_heads for layer in memory.layers)  # kvzip asks again, layer by layer
    return memory, torch.cat(noted)[:rows].unflatten(0, (len(memory.layers), -1))


def apart(a, b, method):
    """The largest difference of scores [..., n], each head's scaled by its largest, of tokens that may go."""
    part = slice(max(method.sinks, 4), CONTEXT - max(method.window, 1))
    a, b = (x[..., part] / x[..., part].abs().amax(-1, keepdim=True) for x in (a, b))
    return float((a - b).abs().max())


def compared(name, ratio, runs, other):
    """A row: what theirs and both of ours have in common, and the losses."""
    found = {"method": name, "ratio": ratio, "theirs_kept": round(float(other["kept"].sum(-1).float().mean()), 1)}
    for label, (method, stays, scores, kl, loss) in runs.items():
        both = (stays & other["kept"]).sum(-1) / torch.maximum(stays.sum(-1), other["kept"].sum(-1))
        found |= {
            f"{label}_kept": round(float(stays.sum(-1).float().mean()), 1),
            f"{label}_same": round(float(both.mean()), 4),
            f"{label}_same_worst": round(float(both.min()), 4),
            f"{label}_kl": round(float(kl.mean()), 5),
            f"{label}_loss": round(float(loss.mean()), 5),
        }
        comparable = scores is not None and name != "streaming" and not other["score"].isnan().any()
        if comparable and label == "as_theirs":
            found["scores_apart"] = float(f"{apart(scores, other['score'], method):.2g}")
    return found | {
        "theirs_kl": round(float(other["kl"].mean()), 5),
        "theirs_loss": round(float(other["loss"].mean()), 5),
    }


def measure(model, tokenizer, ids, job, others):
    ask = tuple(tokenizer(ASK, add_special_tokens=False).input_ids)
    context = job["context"]
    wanted = {
        (name, ratio): {
            label: build(name, options, ratio, ask)
            for label, options in zip(("as_theirs", "default"), OURS[name], strict=True)
        }
        for name, ratio in job["presses"]
    }
    runs = {key: {label: [] for label in methods} for key, methods in wanted.items()}
    exact = []
    for number, row in enumerate(ids[:, None]):
        caches = {
            (key, label): longwave.cache(model, method)
            for key, methods in wanted.items()
            for label, method in methods.items()
        }
        dense = prefill(model, row[:, :context], needs=needs_of(caches.values()))
        whole = score(model, fork(dense, longwave.cache(model, "dense")), row[:, context:])
        exact.append(whole.losses[0])
        for (key, label), empty in caches.items():
            memory, scores = settled(dense, empty)
            stays = kept(memory)
            told = score(model, memory, row[:, context:])
            runs[key][label].append((stays, scores, told.divergence(whole)[0][0], told.losses[0]))
        print(f"window {number}: ours done", file=sys.stderr, flush=True)
    rows = []
    for key, labels in runs.items():
        made = {}
        for label, parts in labels.items():
            stays, scores, kl, loss = zip(*parts, strict=True)
            scores = None if scores[0] is None else torch.stack(scores)
            made[label] = (wanted[key][label], torch.stack(stays), scores, torch.stack(kl), torch.stack(loss))
        rows.append(compared(*key, made, others[key]))
    return rows, float(torch.stack(exact).mean())


def show(rows):
    print("| method | goes | same tokens, mean / worst | scores apart | KL theirs / as theirs / ours | loss |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        losses = " / ".join(f"{r[f'{side}_loss']:.3f}" for side in ("theirs", "as_theirs", "default"))
        kl = " / ".join(f"{r[f'{side}_kl']:.4f}" for side in ("theirs", "as_theirs", "default"))
        same = f"{r['as_theirs_same']:.3f} / {r['as_theirs_same_worst']:.3f}"
        print(f"| `{r['method']}` | {r['ratio']:g} | {same} | {r.get('scores_apart', '–')} | {kl} | {losses} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", type=Path, default=Path("/tmp/kvpress/bin/python"), help="that kvpress is installed in"
    )
    parser.add_argument("--methods", default=",".join(OURS))
    parser.add_argument("--ratios", default="0.5,0.75")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--scored", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("out/outside"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    presses = [[name, float(ratio)] for ratio in args.ratios.split(",") for name in args.methods.split(",")]
    job = {"model": str(locate("smollm2-q4")), "context": CONTEXT, "scored": args.scored, "presses": presses}
    tokenizer = load_tokenizer(job["model"])
    ids = prompts(tokenizer, args.windows, args.scored)
    save_file({"ids": ids}, args.out / "prompts.safetensors")
    others = theirs(args.python, args.out, job)
    model, _ = longwave.load("smollm2-q4", dtype=torch.float32)
    rows, dense = measure(model, tokenizer, ids, job, {(name, ratio): others[name, ratio] for name, ratio in presses})
    show(rows)
    about = {"windows": args.windows, "context": CONTEXT, "scored": args.scored, "dense_loss": round(dense, 5)}
    (args.out / "outside.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
