"""Scores by two meta keys, as a map of each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longwave.evals.summary import Row, finite
from longwave.evals.task import Task
from longwave.evals.words import show


@dataclass(frozen=True)
class Heat:
    """Scores by two meta keys: values[i][j] is of rows[i] and columns[j], None where nothing was measured.

    counts: samples of a cell with a finite score; expected: samples that any method was given there.
    """

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    counts: list[list[int]]
    expected: list[list[int]]


def heat(task: Task, rows: Sequence[Row], method: str) -> Heat:
    """The map of one method over the cells that any method has. For a task with `heat`."""
    assert task.heat is not None
    down, across = task.heat
    cells: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["meta"].get(down), row["meta"].get(across)), []).append(row)
    tops, lefts = (_in_order(list(dict.fromkeys(cell[i] for cell in cells))) for i in (0, 1))
    made = Heat([show(top) for top in tops], [show(left) for left in lefts], [], [], [])
    for top in tops:
        given = [cells.get((top, left), []) for left in lefts]
        mine = [[row for row in cell if row["method"] == method and finite(row)] for cell in given]
        made.values.append([task.total(cell) if cell else None for cell in mine])
        made.counts.append([len(cell) for cell in mine])
        made.expected.append([len({row["id"] for row in cell}) for cell in given])
    return made


def _in_order(names: list[Any]) -> list[Any]:
    return sorted(names) if all(isinstance(name, (int, float)) for name in names) else names
