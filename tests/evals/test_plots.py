"""Colours, styles and axes of the charts."""

import re

import pytest

from longwave.evals import plots


@pytest.mark.parametrize("lower", [False, True])
def test_heat_colours(lower):
    colours = {}
    for value in range(0, 101):
        pair = plots.heat_colours(value, 0, 100, lower)
        assert plots.contrast(*([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in pair)) >= 4.5
        colours[value] = pair[0]
    worst, best = colours[100 if lower else 0], colours[0 if lower else 100]
    assert int(worst[1:3], 16) > int(worst[5:7], 16)  # orange
    assert int(best[5:7], 16) > int(best[1:3], 16)  # blue
    assert plots.heat_colours(3, 3, 3, lower)[0] == plots.heat_colours(1, 0, 1)[0]


def test_lines_can_be_told_from_white_and_black():
    for colour in (*plots.COLOURS, plots.GREY):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert plots.contrast(rgb, (255, 255, 255)) >= 3
        assert plots.contrast(rgb, (20, 23, 26)) >= 3


def test_families_differ_in_more_than_the_budget():
    looks = plots.styles(["dense", "a:budget=0.5", "a:budget=0.25", "a:budget=0.25,window=64", "b"])
    assert looks["a:budget=0.5"].colour == looks["a:budget=0.25"].colour
    assert looks["a:budget=0.5"].dash != looks["a:budget=0.25"].dash
    assert len({looks[m].colour for m in ("dense", "a:budget=0.5", "a:budget=0.25,window=64", "b")}) == 4
    assert plots.family("a:budget=0.25,window=64") == plots.family("a:window=64,budget=1") == "a:window=64"
    assert plots.family("nonsense:") == "nonsense:"


def test_charts_draw_what_they_are_given():
    looks = plots.styles(["dense", "a:budget=0.5", "a:budget=0.25"])
    points = [plots.Point("dense", 1.0, 80, (70, 90)), plots.Point("a:budget=0.5", 0.5, 60, (50, 70))]
    points.append(plots.Point("a:budget=0.25", 0.25, 40))
    chart = plots.quality_chart(points, looks, "score, 0 to 100", 'a "chart"', "one")
    assert chart.startswith('<svg class="chart" role="img" aria-label="a &quot;chart&quot;" viewBox="0 0 ')
    assert chart.endswith("</svg>")
    assert ">score, 0 to 100</text>" in chart
    assert chart.count(plots.COLOURS[0]) >= 3
    assert not re.search(r'id="(?!one-)|font-family|<style|<metadata', chart)
    assert chart == plots.quality_chart(points, looks, "score, 0 to 100", 'a "chart"', "one")
    faded = plots.quality_chart(points, looks, "score, 0 to 100", "", "one", lit={"b"})
    assert plots.COLOURS[0] not in faded
    assert faded.count(plots.GREY) > chart.count(plots.GREY)


def numbers(chart, unit):
    """The numbers on the axes of a chart: of ratios, of scores."""
    found = re.findall(r">([^<>]+)</text>", chart)
    at = found.index("bytes held / bytes of a dense cache")
    return [float(text) for text in found[:at]], [float(text.replace("−", "-")) for text in found[at + 1 : -1]]


@pytest.mark.parametrize(
    ("scores", "ends", "least", "most"),
    [
        ((97.0, 100.0), (0, 100), 90, 100),
        ((0.0, 3.0), (0, 100), 0, 10),
        ((0.0, 100.0), (0, 100), 0, 100),
        ((7.1, 7.4), None, 7.0, 7.5),
        ((0.00002, 0.3), None, 0, 1),
    ],
)
def test_axes_fit_the_scores(scores, ends, least, most):
    points = [plots.Point(f"a:budget={i}", 0.4 + 0.1 * i, value) for i, value in enumerate(scores)]
    looks = plots.styles([point.method for point in points])
    x, y = numbers(plots.quality_chart(points, looks, "u", "", "one", ends), "u")
    assert min(x) == 0
    assert max(x) == 1
    assert len(y) > 2
    assert least <= min(y) <= max(y) <= most
    if max(scores) / max(min(scores), 1e-9) > plots.STEEP and ends is None:
        assert y == [0, 0.001, 0.01, 0.1, 1][: len(y)]


def test_ratios_that_are_halved_stand_on_an_axis_of_halves():
    points = [plots.Point(f"a:budget={ratio}", ratio, 50) for ratio in (0.0625, 0.125, 0.25, 0.5)]
    chart = plots.quality_chart(points, plots.styles([p.method for p in points]), "u", "", "one", (0, 100))
    assert numbers(chart, "u")[0] == [0.0625, 0.125, 0.25, 0.5, 1]
