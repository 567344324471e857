"""Cells that tables of several sections have."""

from __future__ import annotations

from collections.abc import Sequence

from longwave.evals.findings import Findings
from longwave.evals.page import Cell
from longwave.evals.spec import is_dense
from longwave.evals.summary import Line, Row, cost, in_column
from longwave.evals.task import Task
from longwave.evals.words import NOTHING, SIGNS, decimals, is_distance, number, signed


def ratio_cell(findings: Findings, method: str, labels: Sequence[str], column: str = "") -> Cell:
    """The bytes ratio of all samples of some tasks, with the tasks' own below; or of a set of one task."""
    mine = [row for row in findings.rows if row["method"] == method and row["task"] in labels]
    rows = in_column(findings.tasks[labels[0]], mine, column) if column else list[Row](mine)
    if not rows:
        return Cell(NOTHING, "not measured †", "missing")
    own = [findings.overall[label, method].ratio for label in labels if (label, method) in findings.overall]
    low, high = (f"{end(own, default=0):.3f}" for end in (min, max))
    return Cell(f"{cost(rows).ratio:.3f}", f"{low} to {high}" if low != high else "")


def score_cell(findings: Findings, line: Line | None, task: Task, brief: bool = False) -> Cell:
    """A score with its difference to dense below; brief: without the interval, and without a difference that the
    score itself is."""
    if line is None:
        return Cell(NOTHING, "not measured †", "missing")
    places = decimals(task)
    notes = []
    if line.over is not None and brief:
        said = "" if is_distance(task) else signed(line.over, places)
        notes += [words] if (words := f"{said} {SIGNS[line.verdict]}".strip()) else []
    elif line.over is not None:
        ends = line.over_interval
        interval = f" ({signed(ends[0], places)} to {signed(ends[1], places)})" if ends else ""
        mark = f" {SIGNS[line.verdict]} {line.verdict}" if line.verdict else ""
        notes.append(f"{signed(line.over, places)}{interval}{mark}")
        if line.pairs < line.count:
            notes.append(f"{line.pairs:,} pairs")
    elif findings.has_dense and is_dense(line.method):
        notes.append("reference")
    elif not brief and line.interval:
        notes.append(f"95 %: {ends_of(line, places)}")
    if not line.complete:
        notes.append(f"n {line.count:,}/{line.expected:,}")
    tone = line.verdict or ("" if line.complete else "missing")
    return Cell(number(line.value, places) + ("" if line.complete else " †"), ", ".join(notes), tone)


def ends_of(line: Line, places: int) -> str:
    return " to ".join(number(end, places) for end in line.interval or ())


def point_head(task: Task) -> list[Cell]:
    score = Cell("score", task.unit.removeprefix("score, ") + ", lower is better" * task.lower)
    return [Cell("method"), Cell("bytes ratio"), score, Cell("95 % interval"), Cell("n")]


def point_cells(line: Line, places: int) -> list[Cell]:
    count = f"{line.count:,}" if line.complete else f"{line.count:,} of {line.expected:,} †"
    ends = ends_of(line, places) or NOTHING
    return [Cell(line.method), Cell(f"{line.ratio:.3f}"), Cell(number(line.value, places)), Cell(ends), Cell(count)]
