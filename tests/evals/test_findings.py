"""What is missing or cannot be shown is named."""

import json
import re

import pytest

from tests.evals import made_up
from tests.evals.made_up import text_row
from tests.evals.reports import FOURIER, Page, grid, grid_row, report, tables

pytestmark = pytest.mark.usefixtures("made_up_tasks")


def test_missing_samples_are_marked(tmp_path):
    html, markdown = report(made_up.write(tmp_path, grid(lost=[(FOURIER, 5), (FOURIER, 4)])))
    for text in (html, markdown):
        assert re.search(r"† grid: fourier:budget=0\.25 has 4 of 6 samples\.", text)
    cell = Page(html).rows[2][2]
    assert cell.startswith("75.0 † / ")
    assert cell.endswith("n 4/6")
    assert tables(markdown)[0][3][2].startswith("75.0 †; ")


def test_non_finite_scores_are_named(tmp_path):
    rows = grid()
    rows[-1]["score"] = None
    html, markdown = report(made_up.write(tmp_path, rows))
    for text in (html, markdown):
        assert "1 score is not finite for fourier:budget=0.25, left out (5)" in text
    assert Page(html).rows[2][2].startswith("60.0 †")


def test_unreadable_and_unknown_lines_are_reported(tmp_path):
    folder = made_up.write(tmp_path, [*grid(), text_row("other", "dense", "a", 1.0)])
    with (folder / "samples.jsonl").open("a") as file:
        short = grid_row("dense", "short", 1.0)
        del short["prefill_seconds"]
        file.write(json.dumps(short) + '\n{"task": "gr\n')
    html, markdown = report(folder)
    for text in (html, markdown):
        assert "samples.jsonl, line 15: not a result" in text
        assert "Results of dense on other are left out" in text
        assert "1 result left out: without context, rows, prefill" in text


def test_a_task_without_rows_is_named(tmp_path):
    html, _ = report(made_up.write(tmp_path, grid(), tasks=("grid", "ppl")))
    assert "ppl: no scores yet" in html


def test_a_killed_run_says_what_is_missing(tmp_path):
    folder = made_up.write(tmp_path, grid(), samples={"grid": {"500": 100}})
    html, _ = report(folder)
    assert "of 100 samples" in html


def test_many_incomplete_methods_are_one_note(tmp_path):
    methods = ["dense", *(f"m{i}:budget=0.5" for i in range(20))]
    lost = [(f"m{i}:budget=0.5", 5) for i in range(1, 6)] + [("m0:budget=0.5", i) for i in range(6)]
    rows = grid(methods, lost=lost)
    html, markdown = report(made_up.write(tmp_path, rows, methods=methods))
    assert "† grid: of 21 methods, 15 have all 6 samples, 5 a part of them, 1 none" in markdown
    assert html.count("† grid") == 1
    assert "| m0:budget=0.5 | –; not measured † |" in markdown
    assert "of 14 methods that have all samples" in markdown
