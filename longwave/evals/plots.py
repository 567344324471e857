"""Charts of the report, as SVG that stands inside an HTML page.

Text stays text and takes the page's colour; lines have colours that can be told from a white and from a black page, and
each family also has a marker of its own. Marks and swatches of the legend are drawn from the same shapes.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from longwave.evals.spec import is_dense, parse_spec

GREY = "#808080"
COLOURS = ("#2f7fd1", "#d2691e", "#1f9a6d", "#b05fc4", "#d4507f", "#8a7d1f", "#1c93a5")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
SIZE = (4.6, 3.1)  # inches; 331 units of the drawing, about the pixels it gets on a phone and in a column of the page
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


@dataclass(frozen=True)
class Point:
    """Bytes ratio, score and its interval of one method."""

    method: str
    ratio: float
    value: float
    low: float
    high: float


def quality_chart(points: Sequence[Point], looks: Mapping[str, Style], unit: str, alt: str, name: str) -> str:
    """Score against bytes ratio: a point a method, those of one family joined, dense as a line across."""
    figure, axes = _axes()
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(family(point.method), []).append(point)
        if is_dense(point.method):
            axes.axhline(point.value, color=GREY, linewidth=1, dashes=(4, 3), zorder=1)
    for members in families.values():
        style = looks[members[0].method]
        along = sorted(members, key=lambda point: point.ratio)
        x, y = [p.ratio for p in along], [p.value for p in along]
        spread = [[max(0.0, p.value - p.low) for p in along], [max(0.0, p.high - p.value) for p in along]]
        axes.errorbar(
            x,
            y,
            yerr=spread,
            color=style.colour,
            marker=list(style.shape),
            markersize=9,
            linewidth=1.5,
            elinewidth=1.2,
            capsize=3,
        )
    axes.set_xlim(0, 1.08 * max([1.0, *(p.ratio for p in points if math.isfinite(p.ratio))]))
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


def _axes() -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelsize=FONT)
    axes.xaxis.label.set_fontsize(FONT)
    axes.yaxis.label.set_fontsize(FONT)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(color=GREY, alpha=0.25, linewidth=0.8)
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Any, name: str, alt: str) -> str:
    """An <svg> element as wide as its place, with ids that start with `name`: no two charts of a page share one."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "longwave", "text.parse_math": False}):
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
