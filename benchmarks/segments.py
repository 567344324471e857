"""What each part of merged segments is worth, and what more of them could be.

    python -m benchmarks.segments [--device cuda] [--segments 64,128,256] [--windows 9] [--judged 8] [--out FILE]

1. KL from the dense model on unseen windows of plans for segments of each length, measured at that length, with and
   without merging ("means": every head that is not in codes keeps plain means).
2. What plans are expected to cost if merged heads could keep two or four tokens a segment as well: these options are
   measured by the same probes, their bytes are those of merged heads of so much shorter segments.
3. Whether the heads of a layer should be chosen jointly: what the probes say of all heads of a layer together, over the
   sum of what they say of each alone, at the plan of each budget. At 1 a joint choice can find nothing.

Budgets are of 16-bit numbers whatever the model's type.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import torch

import longwave
from benchmarks.sensitivity import BUDGETS, Judge
from longwave.cli.console import show_table
from longwave.plan import planner, probe, recall
from longwave.plan.automatic import own_texts
from longwave.plan.options import both_codes, code_bytes
from longwave.plan.profile import Profile
from longwave.shape import CacheShape

MORE = (2, 4)  # merged tokens a segment


def shape_of(model):
    return CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)


def without_merging(measured):
    return dataclasses.replace(measured, both=torch.full_like(measured.both, 1e3))


def judged(model, rows, judge, segment, budgets):
    """Rows of part 1 for one length of segments, and its measurement."""
    method = longwave.Fourier(segment=segment)
    measured = probe.measure(model, rows, method)
    found = []
    for name, own in (("merged", measured), ("means", without_merging(measured))):
        for budget in budgets:
            share = budget * 2 / model.dtype.itemsize
            row = {"segment": segment, "plan": name, "budget": budget}
            try:
                bound = method.bind(shape_of(model), Profile({}, {}, {}, sensitivity=own), share)
            except ValueError as error:
                found.append(row | {"refused": str(error)})
                continue
            kl, error, loss = judge(lambda bound=bound: longwave.cache(model, bound))
            found.append(row | {"kl": kl, "error": error, "loss": loss, "expected": bound.expected.kl})
            print(found[-1], flush=True)
    return found, measured


@torch.no_grad()
def shorter(model, rows, method, tokens):
    """Costs [windows, layers, heads] of merged heads with so many tokens a segment, by the probes of `measure`."""
    page, found = method.page(shape_of(model)), []
    for row in range(len(rows.ids)):
        with torch.enable_grad():
            bench = probe.Bench(model, rows.part(slice(row, row + 1)), method, 8, row, probe.TEMPERATURE)
        layers = []
        for position in range(len(bench.layers)):
            keys, values, bias = bench.merged(position, page.segment // tokens)
            changed = iter([(keys, values, bias.half().float().repeat_interleave(page.segment // tokens, 2))])
            (dot,) = bench.dots(position, changed)
            layers.append(probe.costs(dot, "diag").mean(0)[0])
        found.append(torch.stack(layers))
    return torch.stack(found)


def expected(measured, more, page, limit):
    """Sum of costs of the plan of `limit` bytes a segment of all layers: as planner.py chooses, with `more` {tokens a
    segment: costs} beside its options."""
    layers, heads = measured.key_weight.shape[:2]
    spent, total, steps = 0, 0.0, []
    for position in range(layers):
        for head, unit in enumerate(planner.units(measured, "measured", position, heads, page)):
            sizes = [sum(code_bytes(code, page) for code in pair) for pair in unit.codes]
            costs = list(unit.costs)
            for tokens, cost in more.items():
                small = dataclasses.replace(page, segment=page.segment // tokens)
                sizes.append(tokens * sum(code_bytes(code, small) for code in both_codes("merged", small)))
                own = cost[:, position, head]
                text = float(own[~measured.recall].mean()) + 0.25 * float(own[measured.recall].mean())
                costs.append(text + planner.CAUTION * float(cost.amax(0).median()) / len(cost))
            hull = planner.lower_hull(sizes, costs)
            spent, total = spent + sizes[hull[0]], total + costs[hull[0]]
            number = len(steps)
            for a, b in itertools.pairwise(hull):
                steps.append(
                    ((costs[a] - costs[b]) / (sizes[b] - sizes[a]), number, costs[a] - costs[b], sizes[b] - sizes[a])
                )
    if spent > limit:
        raise planner.TooSmall(spent)
    for _, _, less, size in sorted(steps, key=lambda step: -step[0]):  # hulls are convex: a unit's steps come in order
        if spent + size <= limit:
            spent, total = spent + size, total - less
    return total


@torch.no_grad()
def together(model, rows, method, bounds):
    """{budget: what the probes say of the heads of a layer together over the sum of what they say of each}."""
    page, sums = method.page(shape_of(model)), {budget: torch.zeros(2) for budget in bounds}
    for row in range(len(rows.ids)):
        with torch.enable_grad():
            bench = probe.Bench(model, rows.part(slice(row, row + 1)), method, 8, row, probe.TEMPERATURE)
        weight = torch.stack([bench.key_weight(position, page.segment) for position in range(len(bench.layers))])
        for position in range(len(bench.layers)):
            dots = list(bench.dots(position, probe.stored(bench, position, weight[position], page)))
            for budget, picked in bounds.items():
                every = torch.stack([chosen(dots, pair, head) for head, pair in enumerate(picked[position])])
                alone = probe.costs(every.transpose(0, 1)[:, None], "diag").mean(0).sum()
                both = probe.costs(every.sum(0)[:, None, None], "diag").mean(0).sum()
                sums[budget] += torch.stack([both, alone])
    return {budget: float(both / alone) for budget, (both, alone) in sums.items()}


def chosen(dots, pair, head):
    """G.d [probes, Q] of one head's options (of K, of V), first order: K's and V's changes add up."""
    keys, values = len(planner.KEY_OPTIONS), len(planner.VALUE_OPTIONS)
    i, j = pair
    if i == planner.BOTH:
        return dots[keys + values + j][:, 0, head]
    found = torch.zeros_like(dots[0][:, 0, head])
    if i < keys:  # 8 bits and the model's own numbers change next to nothing
        found = found + dots[i][:, 0, head]
    if j < values and i:  # a K of means alone pays for V's
        found = found + dots[keys + j][:, 0, head]
    return found


def options(measured, page, limit):
    """The options (of K, of V) of every head, layer by layer, that the planner takes."""
    layers, heads = measured.key_weight.shape[:2]
    menu = planner.menu(measured, "measured", layers, heads, page)
    picked = [unit.options[i] for unit, i in zip(menu.units, menu.picked(limit), strict=True)]
    return [picked[position * heads : (position + 1) * heads] for position in range(layers)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-q4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--segments", type=lambda text: [int(part) for part in text.split(",")], default=[64, 128, 256])
    parser.add_argument("--windows", type=int, default=9, help="measured, a third of them recall prompts")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--judged", type=int, default=8, help="unseen windows")
    parser.add_argument("--context", type=int, default=3000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = longwave.load(args.model, dtype=args.dtype)
    model.to(args.device)
    asked = args.windows // 3
    rows = recall.windows(tokenizer, own_texts(), args.tokens - 257, 256, args.windows - asked, asked)
    judge, found = Judge(model, tokenizer, args.judged, args.context, 256), {"arguments": vars(args), "rows": []}
    found["dense_loss"] = judge.dense()
    for segment in args.segments:
        own, measured = judged(model, rows, judge, segment, BUDGETS)
        found["rows"] += own
        if segment == longwave.Fourier().segment:
            usual = measured
    method = longwave.Fourier()
    page, shape = method.page(shape_of(model)), shape_of(model)
    whole = 2 * 2 * page.segment * page.dim * shape.kv_heads * len(shape.memory_layers)  # bytes of 16-bit numbers
    more = {tokens: shorter(model, rows, method, tokens) for tokens in MORE}
    found["more"], picked = [], {}
    for budget in BUDGETS:
        limit = budget * whole
        picked[budget] = options(usual, page, limit)
        without = expected(usual, {}, page, limit)
        with_them = {f"{tokens}": expected(usual, {tokens: more[tokens]}, page, limit) / without for tokens in MORE}
        both = expected(usual, more, page, limit) / without
        found["more"].append({"budget": budget, "expected": without, **with_them, "both": both})
    ratios = together(model, rows, method, picked)
    found["together"] = [{"budget": budget, "ratio": ratio} for budget, ratio in ratios.items()]
    show_table(
        "KL from dense, expected with more tokens a segment over without, heads of a layer together over apart",
        ["", *map(str, BUDGETS)],
        [
            *(
                [
                    f"{plan}, {segment}",
                    *(
                        f"{r['kl']:.4f}" if "kl" in r else "refused"
                        for r in found["rows"]
                        if (r["segment"], r["plan"]) == (segment, plan)
                    ),
                ]
                for segment in args.segments
                for plan in ("merged", "means")
            ),
            *([f"{name} tokens", *(f"{row[name]:.3f}" for row in found["more"])] for name in (*map(str, MORE), "both")),
            ["together", *(f"{row['ratio']:.3f}" for row in found["together"])],
        ],
    )
    if args.out:
        args.out.write_text(json.dumps(found, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
