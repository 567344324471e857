"""Charts of the report, as SVG that stands inside an HTML page.

Text stays text and takes the page's colour; lines have colours that can be told from a white and from a black page, and
each family also has a marker of its own. Marks and swatches of the legend are drawn from the same shapes.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from longwave.evals.spec import is_dense, parse_spec
from longwave.evals.style import COLOURS, DASHES, GREY, SHARED

SIZE = (4.6, 3.1)  # inches; 331 units of the drawing, about the pixels it gets on a phone and in a column of the page
WIDE = 4  # largest bytes ratio over the smallest, from which on the axis goes by halves
STEEP = 30  # largest loss over the smallest, from which on the axis goes by decades
DECADES = 3  # of such an axis, above which it goes on to 0
LEAST = 5  # of 100, what an axis of scores shows at least
FONT = 12  # in the same units, so that it is never below 11 pixels there


def polygon(corners: int, turn: float = 0.0, inner: float = 1.0) -> list[tuple[float, float]]:
    """Points on the unit circle, the first one up; every second one moved in to `inner` makes a star."""
    angles = [2 * math.pi * (i / corners) + turn for i in range(corners)]
    return [
        (radius * math.sin(angle), radius * math.cos(angle))
        for angle, radius in zip(angles, [1.0, inner] * corners, strict=False)
    ]


SHAPES = (
    polygon(24),
    polygon(4, math.pi / 4),
    polygon(3),
    polygon(4),
    polygon(10, inner=0.45),
    polygon(3, math.pi),
    polygon(6),
)


@dataclass(frozen=True)
class Style:
    """How a method is drawn. Methods of one family differ in their dashes only."""

    colour: str
    shape: Sequence[tuple[float, float]]
    dash: tuple[float, ...] = ()


def family(method: str) -> str:
    """What methods that differ in their budget only have in common, "fourier" of "fourier:budget=0.25"."""
    try:
        name, options = parse_spec(method)
    except ValueError:
        return method
    options.pop("budget", None)
    return name + (":" if options else "") + ",".join(f"{key}={value}" for key, value in options.items())


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each method; dense is grey."""
    families = list(dict.fromkeys(family(method) for method in methods if not is_dense(method)))
    members: dict[str, int] = {}
    made: dict[str, Style] = {}
    for method in methods:
        if is_dense(method):
            made[method] = Style(GREY, SHAPES[0], DASHES[sum(map(is_dense, made)) % len(DASHES)])
            continue
        number = families.index(family(method))
        order = members[family(method)] = members.get(family(method), -1) + 1
        colour, shape = COLOURS[number % len(COLOURS)], SHAPES[(number + number // len(COLOURS)) % len(SHAPES)]
        made[method] = Style(colour, shape, DASHES[order % len(DASHES)])
    return made


def swatch(style: Style, line: bool = False) -> str:
    """A small SVG of a style for a legend: its mark, or a stretch of its line."""
    if line:
        dash = " ".join(map(str, style.dash))
        inside = f'<path d="M1 7H27" fill="none" stroke="{style.colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        return f'<svg class="swatch" width="28" height="14" viewBox="0 0 28 14" aria-hidden="true">{inside}</svg>'
    points = " ".join(f"{7 + 5 * x:.2f},{7 - 5 * y:.2f}" for x, y in style.shape)
    inside = f'<polygon points="{points}" fill="{style.colour}"/>'
    return f'<svg class="swatch" width="14" height="14" viewBox="0 0 14 14" aria-hidden="true">{inside}</svg>'


FADED = (
    '<svg class="swatch" width="28" height="14" viewBox="0 0 28 14" aria-hidden="true"><path d="M1 7H27" '
    f'stroke="{GREY}" stroke-opacity="0.45"/><circle cx="14" cy="7" r="2.5" fill="{GREY}"/></svg>'
)


@dataclass(frozen=True)
class Point:
    """Bytes ratio, score and its interval, if it has one, of one method."""

    method: str
    ratio: float
    value: float
    interval: tuple[float, float] | None = None


def quality_chart(
    points: Sequence[Point],
    looks: Mapping[str, Style],
    unit: str,
    alt: str,
    name: str,
    ends: tuple[float, float] | None = None,
    lit: Collection[str] | None = None,
) -> str:
    """Score against bytes ratio: a point a method, those of one family joined, dense as a line across.

    ends: what a score can be at least and at most, where it cannot be more. lit: the families to show in colour, the
    others stay in the background; all of them unless said.
    """
    figure, axes = _axes()
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(family(point.method), []).append(point)
        if is_dense(point.method):
            axes.axhline(point.value, color=GREY, linewidth=1, dashes=(4, 3), zorder=1)
    for label, members in families.items():
        style = looks[members[0].method]
        along = sorted(members, key=lambda point: point.ratio)
        x, y = [p.ratio for p in along], [p.value for p in along]
        if not (lit is None or label in lit or is_dense(members[0].method)):
            axes.plot(x, y, color=GREY, alpha=0.45, linewidth=0.8, marker="o", markersize=2.5, zorder=1)
            continue
        axes.plot(x, y, color=style.colour, marker=list(style.shape), markersize=9, linewidth=1.5, zorder=3)
        for p in along:
            if p.interval is not None:
                low, high = (abs(end - p.value) for end in p.interval)
                axes.errorbar(
                    p.ratio, p.value, [[low], [high]], color=style.colour, elinewidth=1.2, capsize=3, zorder=2
                )
    _fit_ratios(axes, [p.ratio for p in points if math.isfinite(p.ratio)])
    _fit_scores(axes, [p.value for p in points], ends)
    axes.set_xlabel("bytes held / bytes of a dense cache")
    axes.set_ylabel(textwrap.fill(unit, 32))
    return _svg(figure, name, alt)


def curve_chart(
    curves: Mapping[str, Sequence[float]],
    looks: Mapping[str, Style],
    step: int,
    what: str,
    alt: str,
    name: str,
) -> str:
    """A loss by position: one line a method, a point every `step` tokens."""
    figure, axes = _axes()
    for method, values in curves.items():
        style = looks[method]
        x = [step * (i + 0.5) for i in range(len(values))]
        dot = list(style.shape) if len(values) < 4 else None
        axes.plot(
            x, values, color=style.colour, linewidth=1.8, marker=dot, markersize=7, dashes=style.dash or (None, None)
        )
    axes.set_xlim(0, step * max([1, *map(len, curves.values())]))
    axes.set_xlabel("scored tokens after the context")
    axes.set_ylabel(textwrap.fill(what, 32))
    return _svg(figure, name, alt)


def _fit_ratios(axes: Any, ratios: Sequence[float]) -> None:
    """From 0 to the dense cache; in halves where budgets are halved."""
    least, most = min(ratios, default=1.0), max([1.0, *ratios])
    if least <= 0 or most / least < WIDE:
        axes.set_xlim(0, 1.08 * most)
        return
    axes.set_xscale("log", base=2)
    ticks = [2.0**power for power in range(math.floor(math.log2(least)), math.ceil(math.log2(most)) + 1)]
    axes.set_xticks(ticks[-6:], [f"{tick:.4g}" for tick in ticks[-6:]])
    axes.minorticks_off()
    axes.set_xlim(least / 1.25, most * 1.2)


def _fit_scores(axes: Any, values: Sequence[float], ends: tuple[float, float] | None) -> None:
    """What is drawn fills the axis, with no number on it that a score cannot be. Losses of many sizes are shown by
    their size."""
    from matplotlib.ticker import MaxNLocator

    positive = [value for value in values if value > 0]
    if ends is None and min(values) >= 0 and positive and max(positive) / min(positive) > STEEP:
        top = math.ceil(math.log10(max(positive)))
        axes.set_yscale("symlog", linthresh=10.0 ** (top - DECADES), linscale=0.4)
        ticks = [0.0, *(10.0**power for power in range(top - DECADES, top + 1))]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(-(10.0 ** (top - DECADES)) / 3, 1.6 * max(positive))
    elif ends is not None:
        low, high = axes.get_ylim()
        low, high = max(ends[0], low), min(ends[1], high)
        low, high = max(ends[0], min(low, high - LEAST)), min(ends[1], max(high, low + LEAST))
        axes.set_yticks([tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high])
        room = 0.04 * (high - low)  # for the marks that stand at an end
        axes.set_ylim(low - room, high + room)


def _axes() -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(
        SHARED | {"text.parse_math": False, "font.size": FONT, "xtick.labelsize": FONT, "ytick.labelsize": FONT}
    ):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
    axes.xaxis.label.set_fontsize(FONT)
    axes.yaxis.label.set_fontsize(FONT)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Any, name: str, alt: str) -> str:
    """An <svg> element as wide as its place, with ids that start with `name`: no two charts of a page share one."""
    from matplotlib import rc_context

    with rc_context(SHARED | {"svg.fonttype": "none", "text.parse_math": False}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<(metadata|style).*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r" font-family: [^;\"]*;", "", text)  # the page's own
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg class="chart" role="img" aria-label="{escape(alt)}" {box[0]} '
    opening += 'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg">'
    return opening + text[text.index(">") + 1 :].strip()


def heat_colours(value: float, low: float, high: float, lower: bool = False) -> tuple[str, str]:
    """(background, ink) of a value between two ends: orange is bad, blue is good, and the ink can be read on both."""
    share = 1.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
    share = 1 - share if lower and high > low else share
    stops = ((0.0, (166, 72, 15)), (0.5, (240, 228, 205)), (1.0, (23, 92, 150)))
    (a, first), (b, last) = (stops[0], stops[1]) if share < 0.5 else (stops[1], stops[2])
    part = (share - a) / (b - a)
    back = tuple(round(x + part * (y - x)) for x, y in zip(first, last, strict=True))
    ink = max(((0, 0, 0), (255, 255, 255)), key=lambda colour: contrast(back, colour))
    return "#{:02x}{:02x}{:02x}".format(*back), "#{:02x}{:02x}{:02x}".format(*ink)


def contrast(one: Iterable[float], other: Iterable[float]) -> float:
    """WCAG contrast ratio of two colours, each red, green, blue from 0 to 255."""

    def luminance(colour: Iterable[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
