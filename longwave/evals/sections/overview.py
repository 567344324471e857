"""The section of one score for each task and method."""

from __future__ import annotations

from dataclasses import replace

from longwave.evals.best import best, compared
from longwave.evals.bootstrap import FEWEST
from longwave.evals.findings import Findings
from longwave.evals.page import Block, Cell, Section, Table
from longwave.evals.sections.cells import ratio_cell, score_cell
from longwave.evals.words import SIGNS, counted


def overview(findings: Findings) -> Section:
    inside = [label for label in findings.tasks if findings.question(label) == "inside"]
    before = [label for label in findings.tasks if label not in inside]
    parts = [("query-agnostic", before), ("query-aware", inside)] if findings.many and before and inside else []
    blocks = []
    for title, labels in parts or [("", list(findings.tasks))]:
        counts = [line.count for (label, _), line in findings.overall.items() if label in labels]
        tables = [_table(findings, labels, methods, budget) for budget, methods in findings.groups]
        blocks.append(Block(tables, counted(counts, "a cell"), findings.commands(*labels), title))
    text = []
    if findings.many:
        text.append(
            "Methods stand by their budget, the best of the first task first; in bold the best of a column, of "
            "those that have all samples."
        )
    if findings.has_dense:
        text.append(
            "Below each score: its difference to dense on the samples both have"
            + (", from the paired bootstrap. " if findings.many else ", with the paired bootstrap 95 % interval. ")
            + f"{SIGNS['worse']} worse and {SIGNS['better']} better mark intervals that leave out 0, from "
            f"{FEWEST} pairs on, as intervals are given; each is judged by itself, not corrected for their number."
        )
    else:
        text.append(
            "Dense was not measured, so no differences to it are shown; below each score stands its bootstrap 95 % "
            f"interval, from {FEWEST} samples on."
        )
    text.append(
        "Bytes ratio: live bytes of the whole cache, metadata included, over those a dense cache of the same "
        "tokens holds. † marks cells with fewer samples than were to be measured, or scores that are not finite."
    )
    return Section("Summary", blocks, text)


def _table(findings: Findings, labels: list[str], methods: list[str], title: str) -> Table:
    """A score of each task for each method."""
    head = [Cell("method"), Cell("bytes ratio", "whole cache" + (", and by task" if len(labels) > 1 else ""))]
    table = [[Cell(method), ratio_cell(findings, method, labels)] for method in methods]
    for label in labels:
        task = findings.tasks[label]
        head.append(Cell(findings.titles[label], task.unit + (", lower is better" if task.lower else "")))
        lines = [findings.overall.get((label, method)) for method in methods]
        known = compared([line for line in lines if line is not None]) if findings.many else []
        top = best(known, task.lower).value if len(known) > 1 else None
        for row, line in zip(table, lines, strict=True):
            cell = score_cell(findings, line, task, findings.many)
            leads = line in known and line is not None and line.value == top
            row.append(replace(cell, tone=f"{cell.tone} best".strip()) if leads else cell)
    return Table(head, table, title)
