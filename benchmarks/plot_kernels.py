"""Draw what benchmarks/kernels.py measured: time against context at batch 1, speed-up for each batch and context.

python -m benchmarks.plot_kernels out/kernels.json [--out out/kernels.svg]
"""

import argparse
import json
import math
from pathlib import Path

from longwave.evals import style
from longwave.evals.plots import heat_colours
from longwave.evals.style import GREY

TITLES = {
    "a": "(a) 32 of 128 channels kept, 4 states a segment",
    "b": "(b) the shipped 0.156 plan, mean of 30 layers",
}
# name -> label, style
LINES = {
    "full": ("full attention (SDPA)", style.line(5)),
    "a": ("ours (a)", style.line(0)),
    "b": ("ours (b)", style.line(1)),
    "cuFFT": ("cuFFT, unfused", style.line(3, dash=1)),
    "rebuild, segments": ("rebuild K, V: segments", style.line(4, dash=1)),
    "rebuild, period": ("rebuild K, V: one period", style.line(2, dash=1)),
}


def tokens(n):
    return f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}"


def curves(found, batch):
    """Microseconds by context at one batch, by name."""
    made = {name: {} for name in LINES}
    for row in found["rows"]:
        if row["batch"] == batch:
            made["full"][row["context"]] = row["full_us"]
            made.setdefault(row["layout"], {})[row["context"]] = row["us"]
    for row in found.get("rivals", ()):
        if row["batch"] == batch:
            made.setdefault(row["name"], {})[row["context"]] = row["us"]
    return {name: dict(sorted(points.items())) for name, points in made.items() if points}


def draw_times(axes, found, batch):
    lines = curves(found, batch)
    for name, points in lines.items():
        label, look = LINES.get(name, (name, {"color": GREY, "marker": "x", "linestyle": ":"}))
        axes.plot(list(points), list(points.values()), label=label, **look)
    contexts = sorted({context for points in lines.values() for context in points})
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="µs per layer and step (lower is better)")
    axes.set_xticks(contexts, [tokens(context) for context in contexts])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [t * 10**e for e in range(-1, 8) for t in (1, 2, 5) if low <= t * 10**e <= high]
    axes.set_yticks(ticks, [f"{t:,g}" for t in ticks])
    axes.set_title(f"batch {batch}")
    last_first = sorted(lines, key=lambda name: list(lines[name].values())[-1], reverse=True)
    handles, labels = axes.get_legend_handles_labels()
    order = [list(lines).index(name) for name in last_first]  # as the lines stand above each other
    axes.legend([handles[i] for i in order], [labels[i] for i in order], loc="upper left")


def draw_speedups(axes, rows, contexts, batches, layout):
    """A cell each: how much faster than full attention, and the share of the copy's bandwidth."""
    held = {(row["batch"], row["context"]): row for row in rows if row["layout"] == layout}
    for y, batch in enumerate(batches):
        for x, context in enumerate(contexts):
            row = held.get((batch, context))
            if row is None:
                axes.text(x, y, "—", ha="center", va="center", color=GREY)
                continue
            back, ink = heat_colours(math.log2(row["ratio"]), -2, 2)
            axes.fill(
                [x - 0.49, x + 0.49, x + 0.49, x - 0.49], [y - 0.48, y - 0.48, y + 0.48, y + 0.48], color=back, lw=0
            )
            axes.text(x, y - 0.13, f"{row['ratio']:.2f}×", ha="center", va="center", color=ink, fontsize=6.5)
            axes.text(x, y + 0.25, f"{row['of_copy']:.0%}", ha="center", va="center", color=ink, fontsize=5)
    axes.set_xlim(-0.5, len(contexts) - 0.5)
    axes.set_ylim(len(batches) - 0.5, -0.5)
    axes.set_xticks(range(len(contexts)), [tokens(context) for context in contexts])
    axes.set_yticks(range(len(batches)), batches)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("batch")
    axes.set_title(TITLES.get(layout, layout))


@style.paper()
def plot(found, path):
    rows = found["rows"]
    if not rows:
        raise SystemExit("nothing was measured, so there is nothing to draw")
    layouts = sorted({row["layout"] for row in rows})
    batches, contexts = (sorted({row[key] for row in rows}) for key in ("batch", "context"))
    figure = style.blank(2.2 + 2.0 * max(1, len(layouts) - 1))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    draw_times(left.subplots(), found, min(batches))
    panels = right.subplots(len(layouts), 1, squeeze=False)[:, 0]
    for axes, layout in zip(panels, layouts, strict=True):
        draw_speedups(axes, rows, contexts, batches, layout)
    panels[-1].set_xlabel("context, tokens")
    right.suptitle("times as fast as full attention; below it, share of the copy's bandwidth", fontsize=style.FONT - 1)
    copy = found["copy_bytes_per_s"] / 1e12
    figure.suptitle(
        f"Decode attention, one Llama-3.1-8B layer, bfloat16: {found['device']}, copy {copy:.2f} TB/s, "
        f"torch {found['torch']}"
    )
    style.save(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--out", type=Path, help="the same name with .svg")
    args = parser.parse_args(argv)
    plot(json.loads(args.measured.read_text()), args.out or args.measured.with_suffix(".svg"))


if __name__ == "__main__":
    main()
