"""What stands first: the methods that nothing beats at their bytes, and the headline."""

from dataclasses import replace

import pytest

from longwave.evals.best import best, headline, unbeaten
from longwave.evals.summary import Line
from longwave.evals.words import number, plural, signed
from tests.evals.made_up import Grid, Nats


def line(method, ratio, value, count=8, expected=8, task="grid", **fields):
    return Line(task, method, "", value, value, value, count, ratio, expected, **fields)


DENSE = line("dense", 1.0, 90)
LINES = [
    DENSE,
    line("a", 0.1, 40),
    line("b", 0.2, 40),  # no better than a
    line("c", 0.2, 60, over=-30, pairs=8),
    line("d", 0.24, 95, count=7),  # better than all, of fewer samples
    line("e", 0.5, 70),
    line("f", 0.6, 65),
]


def said(lines, task=None, **more):
    return headline("tiny", 8, {"grid": lines}, {"grid": task or Grid()}, {"grid": "grid"})


def test_unbeaten_are_better_than_all_with_fewer_bytes():
    assert [x.method for x in unbeaten(LINES, lower=False)] == ["a", "c", "e"]
    flipped = [replace(x, value=-x.value) for x in LINES]
    assert [x.method for x in unbeaten(flipped, lower=True)] == ["a", "c", "e"]
    assert unbeaten([DENSE], lower=False) == []


def test_of_equal_scores_the_fewest_bytes():
    assert best([line("b", 0.2, 40), line("a", 0.1, 40)], lower=False).method == "a"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([DENSE], "tiny, dense alone, 8 samples of 1 task."),
        (
            LINES,
            "tiny, 6 methods beside dense, 8 samples of 1 task. Within a quarter of dense's bytes: on grid the best of "
            "3 is c, 60.0 to dense's 90.0 at 0.200 of the bytes (8 samples).",
        ),
        (LINES[1:3], "on grid 2 of 2 are alike and best, the smallest a, 40.0 at 0.100 of the bytes (8 samples)."),
        ([DENSE, LINES[5], LINES[6]], "Within half of dense's bytes: on grid only e, 70.0 at 0.500 of the bytes"),
        ([DENSE, LINES[4]], "1 method beside dense, 8 samples of 1 task: nothing has been measured whole within"),
        ([line("g", 1.1, 50)], "tiny, 1 method, 8 samples of 1 task: nothing has been measured whole within dense's"),
        ([replace(LINES[3], pairs=4)], "only c, 60.0 at 0.200"),  # dense's score on half of the samples is another one
    ],
)
def test_headline(lines, says):
    assert says in said(lines)


def test_headline_of_losses_and_of_many_tasks():
    assert "on grid (nats, lower is better) 2 of 2 are alike and best, the smallest a, 40.000 at" in said(
        [x for x in LINES if x.method not in "cd"], Nats()
    )
    names = [f"t{i}" for i in range(5)]
    tasks = dict.fromkeys(names, Grid())
    text = headline("tiny", 40, dict.fromkeys(names, LINES), tasks, {name: name for name in names})
    assert text.count("the best of 3 is c") == 3
    assert text.endswith("; 2 more tasks below.")


def test_numbers():
    assert [number(x, 4) for x in (None, 0.0, 0.00001, 0.0001, -1.5)] == ["–", "0.0000", "<0.0001", "0.0001", "−1.5000"]
    assert [signed(x, 1) for x in (0.01, -0.01, 2, -2)] == ["0.0", "0.0", "+2.0", "−2.0"]
    assert [plural(x, "task") for x in (1, 2000)] == ["1 task", "2,000 tasks"]
