"""The frontier of quality against bytes: tables and a plot from measured samples.

    longwave eval run --recipe benchmarks/frontier.yaml --device cuda --batch 24 --batch-tokens 210000
    python -m benchmarks.frontier [out/frontier/samples.jsonl ...] [--plot frontier.svg]

Ratios of the middle, metadata included, follow from the methods and the profile; those of the whole cache, losses and
agreement are read from the samples (default: the committed ones of docs/results/frontier). Where a later file has as
many windows of a method and context as an earlier one, it takes their place.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

import longwave
from longwave.evals import style
from longwave.evals.spec import parse_spec
from longwave.methods import get_method
from longwave.methods.base import CacheShape
from longwave.plan.profile import Profile

BEFORE = "before "
HERE = Path(__file__).parents[1] / "docs" / "results" / "frontier"
SHAPE = CacheShape(tuple(range(30)), (), 3, 64, torch.float16)  # SmolLM2-135M
FAMILIES = {  # name -> (style, which methods)
    "fourier": (style.line(0), lambda name, o: name == "fourier" and set(o) == {"budget"}),
    "uniform plan": (style.line(2, dash=2), lambda name, o: o.get("plan") == "uniform"),
    "fourier before merged segments": (
        style.line(0, dash=1) | {"mfc": "white"},
        lambda name, o: False,
    ),  # before.jsonl: plain means, commit 1999030
    "kivi": (style.line(1), lambda name, o: name == "kivi"),
    "fourier-paper": (
        {"color": "black", "marker": "*", "ms": 8, "ls": "none"},
        lambda name, o: name == "fourier-paper",
    ),
}


def middle_ratio(spec, context):
    """Bytes of the compressed middle, metadata included, over those of the same tokens dense; of earlier plans, which
    cannot be made any more, their budget, within 0.001."""
    name, options = parse_spec(spec.removeprefix(BEFORE))
    budget = options.pop("budget", None)
    if spec.startswith(BEFORE):
        return budget
    folder = Path(longwave.__file__).parent / "plan" / "profiles"
    profile = Profile.load(folder / ("smollm2-paper.json" if name == "fourier-paper" else "smollm2.json"))
    method = get_method(name, **options)
    bound = method.bind(SHAPE, profile if method.uses_profile else None, budget)
    middle = bound.absorbed(context)
    held = sum(bound._bytes(i, 0, middle) for i in SHAPE.memory_layers)
    return held / (middle * SHAPE.token_bytes * len(SHAPE.memory_layers))


def read(paths):
    """(method, context) -> rows."""
    found = {}
    for path in paths:
        rows = {}
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["method"] != "dense":
                rows.setdefault((row["method"], row["meta"]["context"]), []).append(row)
        found |= {key: new for key, new in rows.items() if len(new) >= len(found.get(key, []))}
    return found


def family(spec):
    """None for options that are gone: docs/results.md has what they gave, from samples that are still here."""
    if spec.startswith(BEFORE):
        plain = FAMILIES["fourier"][1](*parse_spec(spec.removeprefix(BEFORE)))
        return "fourier before merged segments" if plain else None
    name, options = parse_spec(spec)
    return next((label for label, (_, belongs) in FAMILIES.items() if belongs(name, options)), None)


def summary(rows):
    found = []
    for (spec, context), group in rows.items():
        if family(spec) is None:
            continue
        over = [row["metrics"]["loss"] - row["metrics"]["dense_loss"] for row in group]
        found.append(
            {
                "family": family(spec),
                "method": spec,
                "context": context,
                "windows": len(group),
                "middle": middle_ratio(spec, context),
                "whole": sum(r["bytes"] for r in group) / sum(r["dense_bytes"] for r in group),
                "over": statistics.mean(over),
                "error": statistics.stdev(over) / len(over) ** 0.5,
                "kl": statistics.mean(row["metrics"]["kl"] for row in group),
                "top1": statistics.mean(row["metrics"]["top1"] for row in group),
            }
        )
    order = list(FAMILIES)
    return sorted(found, key=lambda row: (row["context"], order.index(row["family"]), -row["middle"]))


def committed(paths=(HERE / "divergence.jsonl",)):
    """The rows of the table and the plot: of samples, and of what was before."""
    earlier = read([HERE / "before.jsonl"]).items()
    return summary(read(paths) | {(BEFORE + spec, context): rows for (spec, context), rows in earlier})


@style.paper()
def plot(found, path):
    contexts = sorted({row["context"] for row in found})
    figure = style.blank(3.6)
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    for panel, context in zip(panels, contexts, strict=True):
        for label, (look, _) in FAMILIES.items():
            rows = [row for row in found if row["family"] == label and row["context"] == context]
            panel.errorbar(
                [row["middle"] for row in rows],
                [row["over"] for row in rows],
                [row["error"] for row in rows],
                label=label,
                zorder=3 if label == "fourier" else 2,
                **look,
            )
        panel.set_xscale("log")
        panel.set_yscale("symlog", linthresh=0.002)
        panel.set_xlim(0.025, 0.75)
        panel.set_xticks(
            [0.03, 0.04, 0.06, 0.1, 0.156, 0.25, 0.5], ["0.03", "0.04", "0.06", "0.10", "0.156", "0.25", "0.50"]
        )
        panel.minorticks_off()
        ticks = [0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_ylim(-0.0015, 0.8)
        panel.set_xlabel("bytes of the middle, of a 16-bit cache")
        panel.set_title(f"{context:,} tokens of context")
    panels[0].set_ylabel("loss over dense, nats (bars: standard error)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(FAMILIES))
    figure.suptitle("SmolLM2-135M, 24 windows of text that calibrated nothing: what the bytes cost")
    style.save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="*", type=Path, default=[HERE / "divergence.jsonl"])
    parser.add_argument("--plot", type=Path, default=HERE / "frontier.svg")
    args = parser.parse_args()
    found = committed(args.samples)
    print("| context | method | middle | whole | loss over dense | KL | top-1 | windows |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row['context']:,} | `{row['method']}` | {row['middle']:.4f} | {row['whole']:.3f} | "
            f"{row['over']:+.4f} ± {row['error']:.4f} | {row['kl']:.4f} | {row['top1']:.3f} | {row['windows']} |"
        )
    plot(found, args.plot)


if __name__ == "__main__":
    main()
