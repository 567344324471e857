from statistics import mean

import pytest

from tests.evals import made_up
from tests.evals.made_up import text_row
from tests.evals.reports import FOURIER, Page, grid_row, report, tables

pytestmark = pytest.mark.usefixtures("made_up_tasks")


def test_sets_and_averages(tmp_path):
    scores = {"narrativeqa": (0.5, 0.5), "qasper": (0.25,), "gov_report": (1.0,), "odd": (0.0,)}
    rows = [
        text_row("sets", "dense", f"{name}/{i}", score, meta={"set": name})
        for name, some in scores.items()
        for i, score in enumerate(some)
    ]
    html, markdown = report(made_up.write(tmp_path, rows, tasks=("sets",), methods=("dense",)))
    found = [row for row in Page(html).rows if "qasper" in row]
    head = [
        "method",
        "bytes ratio",
        "narrativeqa",
        "qasper",
        "average",
        "gov_report",
        "odd",
        "mean of sets",
        "all samples",
    ]
    assert found == [head]
    at = Page(html).rows.index(head)
    assert Page(html).rows[at - 1] == ["", "single-doc QA", "summaries", "other", "all"]
    spans = [attrs["colspan"] for tag, attrs in Page(html).tags if attrs.get("scope") == "colgroup"]
    assert spans == ["2", "3", "1", "1", "2"]
    values = [cell.split(" / ")[0] for cell in Page(html).rows[at + 1]]
    assert values == ["dense", "0.500", "50.0", "25.0", "37.5", "100.0", "0.0", "43.8", "45.0"]
    assert "averages of groups count each set once" in markdown
    assert "all samples counts each sample once" in markdown


def test_totals_of_their_own_are_named_for_what_they_are(tmp_path, monkeypatch):
    rows = [text_row("sets", "dense", str(i), i % 2, meta={"set": "qasper" if i else "odd"}) for i in range(3)]
    folder = made_up.write(tmp_path, rows, tasks=("sets",), methods=("dense",))
    for how, name, shown in ((None, "all samples", "33.3"), (mean, "mean of sets", "25.0"), (max, "total", "50.0")):
        if how is not None:

            def own(self, rows, how=how):
                sets = {row["meta"]["set"] for row in rows}
                means = [100 * mean(row["score"] for row in rows if row["meta"]["set"] == name) for name in sets]
                return how(means)

            monkeypatch.setattr(made_up.Sets, "total", own)
        found = Page(report(folder)[0]).rows
        at = next(i for i, row in enumerate(found) if "qasper" in row)
        assert (found[at][-1], found[at + 1][-1].split(" / ")[0]) == (name, shown)


def test_average_of_a_group_with_a_set_missing_is_not_given(tmp_path):
    rows = [
        text_row("sets", method, name, 1.0, meta={"set": name})
        for method in ("dense", FOURIER)
        for name in ("narrativeqa", "qasper")
        if (method, name) != (FOURIER, "qasper")
    ]
    html, _ = report(made_up.write(tmp_path, rows, tasks=("sets",)))
    row = next(row for row in Page(html).rows if "– / 1 of 2 sets †" in row)
    assert row[:4] == [FOURIER, "0.500", "100.0 / 0.0", "– / not measured †"]


def test_heat_map(tmp_path):
    rows = [grid_row("dense", f"{n}/{d}", float(d > 0), n, d) for n in (500, 4000) for d in (0.0, 1.0)]
    html, markdown = report(made_up.write(tmp_path, rows, methods=("dense",)))
    assert [row for row in Page(html).rows if len(row) == 3 and row[0] in ("depth ↓ / length →", "0", "1")] == [
        ["depth ↓ / length →", "500", "4,000"],
        ["0", "0", "0"],
        ["1", "100", "100"],
    ]
    assert ["depth ↓; length →", "500", "4,000"] in tables(markdown)[2]
    styles = [attrs["style"] for tag, attrs in Page(html).tags if tag == "td" and "style" in attrs]
    assert len(styles) == 4
    assert styles[0] == styles[1] != styles[2] == styles[3]
