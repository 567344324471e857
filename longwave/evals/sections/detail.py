"""The section of a task that writes answers: heat maps and a table of its sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longwave.evals import plots
from longwave.evals.findings import Findings
from longwave.evals.heat import heat
from longwave.evals.page import Block, Cell, Section, Table
from longwave.evals.sections.cells import ratio_cell, score_cell
from longwave.evals.summary import MEANS, Line, finite, sorted_columns
from longwave.evals.task import Task
from longwave.evals.words import NOTHING, about, counted, decimals, heading, number, percent, signed


def detail(findings: Findings, label: str, task: Task) -> Section:
    """Heat maps and the table of sets, where a task has them."""
    blocks = []
    columns = sorted_columns(task, [row for row in findings.rows_of(label) if finite(row)])
    if task.heat and not findings.many and len({row["meta"].get(task.heat[1]) for row in findings.rows_of(label)}) > 1:
        blocks.append(_heat(findings, label, task))
    if len(columns) > 1:
        blocks.append(_sets(findings, label, task, columns))
    return Section(findings.titles[label], blocks, [about(task), f"As asked for: {label}"])


def _heat(findings: Findings, label: str, task: Task) -> Block:
    assert task.heat is not None
    maps = {method: heat(task, findings.rows_of(label), method) for method in findings.methods}
    values = [value for one in maps.values() for row in one.values for value in row if value is not None]
    whole = percent(task, values)
    low, high = (0.0, 100.0) if whole else (min(values), max(values))
    places = 0 if whole else decimals(task)
    corner = Cell(f"{task.heat[0]} ↓", f"{task.heat[1]} →")
    tables, counts = [], []
    for method, one in maps.items():
        rows = []
        for top, across, some, asked_of in zip(one.rows, one.values, one.counts, one.expected, strict=True):
            row = [Cell(top)]
            for value, count, expected in zip(across, some, asked_of, strict=True):
                if value is None:
                    row.append(Cell(NOTHING + (" †" if expected else ""), tone="missing"))
                    continue
                counts.append(count)
                back, ink = plots.heat_colours(value, low, high, task.lower)
                row.append(Cell(number(value, places) + (" †" if count < expected else ""), back=back, ink=ink))
            rows.append(row)
        tables.append(Table([corner, *map(Cell, one.columns)], rows, method, heat=True))
    return Block(tables, counted(counts, "a cell"), findings.commands(label), f"{task.heat[0]} by {task.heat[1]}")


def _sets(findings: Findings, label: str, task: Task, columns: list[str]) -> Block:
    """One column a set, under the heads of their groups with an average each."""
    lines = {(line.method, line.column): line for line in findings.lines if line.task == label}
    groups = {name: [c for c in columns if c in sets] for name, sets in task.groups.items()}
    groups = {name: sets for name, sets in groups.items() if sets}
    rest = [c for c in columns if not any(c in sets for sets in groups.values())]
    parts = [*groups.items(), *([("other" if groups else "", rest)] if rest else [])]
    averaged = {name for name, sets in groups.items() if len(sets) > 1 and len(parts) > 1}
    by_sample = type(task).total in MEANS
    last = "all samples" if by_sample else "mean of sets" if _is_mean(findings, lines, columns) else "total"
    means = bool(groups) and by_sample  # else the task's own total is one, or there are no sets to speak of
    head, spans = [Cell("method"), Cell("bytes ratio")], [("", 2)]
    for name, sets in parts:
        head += [Cell(heading(column)) for column in sets]
        head += [Cell("average")] * (name in averaged)
        spans.append((name, len(sets) + (name in averaged)))
    head += [Cell("mean of sets")] * means + [Cell(last)]
    spans.append(("all", 1 + means))
    tables = []
    for budget, methods in findings.groups:
        rows = []
        for method in methods:
            row = [Cell(method), ratio_cell(findings, method, [label])]
            for name, sets in parts:
                row += [score_cell(findings, lines.get((method, column)), task, brief=True) for column in sets]
                if name in averaged:
                    row.append(_average([lines.get((method, column)) for column in sets], task))
            if means:
                row.append(_average([lines.get((method, column)) for column in columns], task))
            row.append(score_cell(findings, findings.overall.get((label, method)), task, brief=True))
            rows.append(row)
        tables.append(Table(head, rows, budget, spans=spans if groups else []))
    counts = [line.count for line in lines.values() if line.column]
    said = "below each score its difference to dense; " * findings.has_dense
    said += "averages of groups count each set once; " * bool(averaged)
    said += "the mean of sets counts each set once; " * (means or last == "mean of sets")
    said += "all samples counts each sample once; " * (last == "all samples")
    title = f"by {task.columns}"
    return Block(tables, counted(counts, "a set"), findings.commands(label), title, note=said.strip("; ").capitalize())


def _is_mean(findings: Findings, lines: dict[tuple[str, str], Line], columns: list[str]) -> bool:
    """Whether the task's own total is the mean of its sets, seen in the methods that have them all."""
    seen = []
    for method in findings.methods:
        some = [lines[method, column].value for column in columns if (method, column) in lines]
        if (method, "") in lines and len(some) == len(columns):
            seen.append(math.isclose(lines[method, ""].value, sum(some) / len(some), abs_tol=1e-9))
    return bool(seen) and all(seen)


def _average(lines: Sequence[Line | None], task: Task) -> Cell:
    known = [line for line in lines if line is not None]
    if len(known) < len(lines):
        return Cell(NOTHING, f"{len(known)} of {len(lines)} sets †", "missing")
    places = decimals(task)
    value = number(sum(line.value for line in known) / len(known), places)
    over = [line.over for line in known if line.over is not None]
    under = signed(sum(over) / len(over), places) if len(over) == len(known) else ""
    whole = all(line.complete for line in known)
    return Cell(value if whole else f"{value} †", under, "" if whole else "missing")
