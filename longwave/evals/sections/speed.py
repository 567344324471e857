"""The section of times and bytes."""

from __future__ import annotations

from longwave.evals.findings import Findings
from longwave.evals.page import Block, Cell, Section, Table
from longwave.evals.summary import Cost, cost
from longwave.evals.words import NOTHING, counted, number


def speed(findings: Findings) -> Section:
    head = [Cell("method"), Cell("bytes ratio"), Cell("n"), Cell("held", "MiB a sample")]
    head += [Cell("dense", "MiB a sample"), Cell("prefill", "tokens a second"), Cell("decode", "tokens a second")]
    blocks = []
    for labels in [list(findings.tasks)] if findings.many else [[label] for label in findings.tasks]:
        tables, costs = [], []
        for budget, methods in findings.groups:
            table = []
            for method in methods:
                mine = [row for row in findings.rows if row["method"] == method and row["task"] in labels]
                if mine:
                    costs.append(cost(mine))
                    table.append([Cell(method), *cost_cells(costs[-1])])
                else:
                    table.append([Cell(method), Cell(NOTHING), Cell("0 †", tone="missing"), *[Cell(NOTHING)] * 4])
            tables.append(Table(head, table, budget))
        count = counted((one.count for one in costs), "a row")
        title = "all tasks" if findings.many else findings.titles[labels[0]]
        blocks.append(Block(tables, count, findings.commands(*labels), title))
    text = [
        "Times of this harness run, not a benchmark: tokens of all rows of a pass over its seconds, with whatever "
        "else the machine was doing. Prefill reads the context and compresses it; a context that several samples "
        "share is read once and counted for each, and methods that start from the same exact pass are each given "
        "its seconds."
    ]
    if findings.header["question"] == "with":
        text.append('With question "with" the prompt is read inside decode, which holds both times.')
    return Section("Speed and memory", blocks, text)


def cost_cells(one: Cost) -> list[Cell]:
    held, whole = (f"{value / 2**20:,.2f}" for value in (one.bytes, one.dense_bytes))
    speeds = [number(value, 0 if value is None or value >= 10 else 1) for value in (one.prefill, one.decode)]
    return [Cell(f"{one.ratio:.3f}"), Cell(f"{one.count:,}"), Cell(held), Cell(whole), *map(Cell, speeds)]
