"""Draw what benchmarks/diffusion_pair.py measured; `python -m benchmarks.diffusion_pair --plot FILE --out PNG` does."""

import statistics

from longwave.evals import style
from longwave.evals.plots import heat_colours
from longwave.evals.style import INKS

MODELS = {"diffusion": 0, "autoregressive": 1}  # number of its line


def cells(rows, part="needle"):
    """Retrieval by (model, factor, steps): {times: {depth: share of right answers}}."""
    made = {}
    for row in rows:
        if row["part"] == part:
            by_times = made.setdefault((row["model"], row["factor"], row["steps"]), {})
            by_times.setdefault(row["times"], {})[row["depth"]] = row["right"]
    return made


def by_length(rows, lengths):
    """Lines of a table: model, factor, steps, and the mean over depths at every length, empty where not measured."""
    return [
        [*key[:2], key[2] or "", *(f"{means(found)[times]:.2f}" if times in found else "" for times in lengths)]
        for part in ("needle", "steps")
        for key, found in cells(rows, part).items()
    ]


def means(found):
    return {times: statistics.mean(depths.values()) for times, depths in sorted(found.items())}


def perplexities(rows):
    """{times: perplexity} by (model, factor)."""
    made = {}
    for row in rows:
        if row["part"] == "perplexity":
            made.setdefault((row["model"], row["factor"]), {})[row["times"]] = row["perplexity"]
    return made


def line(axes, points, label, number):
    axes.plot(list(points), list(points.values()), label=label, **style.line(number % len(INKS)))


def finish(axes, title, ylabel, legend=True):
    axes.set_title(title)
    axes.set_xlabel("length, of the trained one")
    axes.set_ylabel(ylabel)
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend()


def draw_lines(axes, rows, context):
    """Perplexity above, retrieval below: without a factor, then for each model by factor."""
    texts, needles = perplexities(rows), cells(rows)
    reaches = {(row["model"], row["factor"]): row for row in rows if row["part"] == "reach"}
    for model, number in MODELS.items():
        if (model, 1) in texts:
            line(axes[0][0], texts[model, 1], model, number)
    for steps, found in sorted((key[2], found) for key, found in cells(rows, "steps").items()):
        for number, (times, mean) in enumerate(means(found).items()):
            look = style.line(number % len(INKS)) | {"linestyle": "none"}
            axes[1][0].plot(steps, mean, label=f"{times}x" if steps == 1 else None, **look)
    finish(axes[0][0], "perplexity, the bases as trained", "perplexity (diffusion: bound)")
    finish(axes[1][0], "diffusion: retrieval by sampling steps", "answers right, all depths")
    axes[1][0].set_xlabel("steps of the answer")
    axes[1][0].set_xticks(sorted({key[2] for key in cells(rows, "steps")}))
    factors = sorted({key[1] for key in (*texts, *needles)})  # one colour each, whichever model
    for column, model in enumerate(MODELS, 1):
        for number, factor in enumerate(factors):
            if (model, factor) in texts:
                line(axes[0][column], texts[model, factor], f"base x {factor}", number)
            for key, found in needles.items():
                if key[:2] == (model, factor):
                    line(axes[1][column], means(found), f"base x {factor}", number)
            if (model, factor) in reaches:
                for law, dash in (("ntk", ":"), ("ntk_both_signs", "--")):
                    at, ink = reaches[model, factor][law] / context, INKS[number % len(INKS)]
                    axes[1][column].axvline(at, color=ink, ls=dash, lw=0.9)
        finish(axes[0][column], f"{model}: perplexity", "perplexity", legend=False)
        title = f"{model}: retrieval; upright, what the laws predict"
        finish(axes[1][column], title, "answers right, all depths", legend=False)
        last = max((times for found in needles.values() for times in found), default=1)
        axes[1][column].set_xlim(0.5, last + 0.5)
    drawn = [each for row in axes for each in row[1:] if each.get_legend_handles_labels()[1]]
    for each in drawn[:1]:  # colours are the same in all four
        each.legend()
    for each in axes[0]:
        if each.lines:
            each.set_yscale("log")
            each.yaxis.set_major_formatter("{x:,.0f}")
            each.yaxis.set_minor_formatter("{x:,.0f}")
    for each in axes[1]:
        each.set_ylim(-0.03, 1.03)


def draw_grid(axes, found, title):
    lengths, depths = sorted(found), sorted({depth for column in found.values() for depth in column})
    for x, times in enumerate(lengths):
        for y, depth in enumerate(depths):
            if depth in found[times]:
                back, ink = heat_colours(found[times][depth], 0, 1)
                axes.fill([x - 0.5, x + 0.5, x + 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5], color=back, lw=0)
                axes.text(x, y, f"{100 * found[times][depth]:.0f}", ha="center", va="center", color=ink, fontsize=6)
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [f"{times}x" for times in lengths], fontsize=7)
    axes.grid(False)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)


@style.paper()
def plot(rows, path):
    about = next((row for row in rows if row["part"] == "about"), None)
    if about is None or len(rows) == 1:
        raise SystemExit("nothing was measured, so there is nothing to draw")
    needles = cells(rows)
    factors = sorted({key[1] for key in needles}) or [1]
    figure = style.blank(10, width=2 * style.WIDTH)  # a sheet of its own
    above, below = figure.subfigures(2, 1)
    draw_lines(above.subplots(2, 3), rows, about["context"])
    panels = below.subplots(2, len(factors), squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for (model, factor, _), found in needles.items():
        panel = panels[list(MODELS).index(model)][factors.index(factor)]
        panel.set_axis_on()
        draw_grid(panel, found, f"{model}, base x {factor}")
    below.suptitle(
        "answers right of 100, by length and depth of the fact (100%: just before the question)", fontsize=style.FONT
    )
    trained = about.get("training", {})
    figure.suptitle(
        f"Trained on {about['context']} tokens: {about['parameters']['diffusion'] / 1e6:.1f} M parameters each, "
        + (f"{trained['steps']:,} steps, {trained['tokens'] / 1e6:.1f} M tokens, " if trained else "")
        + about["device"]
    )
    style.save(figure, path)
