"""The section of a task that scores tokens: its losses, and charts of them by position."""

from __future__ import annotations

from longwave.evals import plots
from longwave.evals.findings import Findings
from longwave.evals.page import Block, Cell, Section, Table
from longwave.evals.rows import BIN
from longwave.evals.sections.cells import ends_of, ratio_cell
from longwave.evals.spec import dense_of, is_dense
from longwave.evals.summary import Line, Losses, curve, finite, in_column, losses, sorted_columns
from longwave.evals.task import LossTask
from longwave.evals.words import NOTHING, SIGNS, about, counted, heading, number, signed

POSITIONS = 16  # rows of a table of losses by position, at most


def loss(findings: Findings, label: str, task: LossTask) -> Section:
    rows = findings.rows_of(label)
    good = [row for row in rows if finite(row)]
    columns = sorted_columns(task, good)
    lines = {(line.method, line.column): line for line in findings.lines if line.task == label}
    made: dict[tuple[str, str], Losses] = {}
    for column in columns:
        here = in_column(task, good, column)
        for method in findings.methods:
            mine = [row for row in here if row["method"] == method]
            if mine:
                exact = dense_of(method, findings.methods)
                dense = [row for row in here if row["method"] == exact]
                made[method, column] = losses(mine, dense, f"{label}/{column}/loss", task.nats)
    tables = [_table(findings, label, columns, lines, made, *group) for group in findings.groups]
    counts = [line.count for line in lines.values() if line.column in columns]
    blocks = [Block(tables, counted(counts, "a row"), findings.commands(label))]
    metric = "kl" if task.compares else task.nats
    what = "KL from dense, nats" if task.compares else f"{task.nats}, nats"
    drawn: list[str] = []
    for index, column in enumerate([] if findings.many else columns):
        here = in_column(task, good, column)
        curves = {m: curve([row for row in here if row["method"] == m], metric) for m in findings.methods}
        curves = {m: c for m, c in curves.items() if c and not (metric == "kl" and is_dense(m))}
        if not curves:
            continue
        drawn += [method for method in curves if method not in drawn]
        title = f"{what} by position" + (f", {task.columns} {heading(column)}" if column else "")
        name = f"curve{list(findings.tasks).index(label)}x{index}"
        alt = f"{label}: {title}"
        chart = plots.curve_chart(curves, findings.looks, BIN, what, alt, name)
        count = counted((lines[m, column].count for m in curves if (m, column) in lines), "a line")
        numbers = positions(curves, max(row["scored"] for row in here), 4 if metric == "kl" else 3)
        blocks.append(Block([numbers], count, findings.commands(label), title, chart))
    text = [
        about(task),
        "Over dense: difference in nats on the same tokens, with its paired bootstrap 95 % interval; marks as in "
        "the summary.",
    ]
    legend = [(plots.swatch(findings.looks[method], line=True), method) for method in drawn]
    return Section(findings.titles[label], blocks, [*text, f"As asked for: {label}"], legend)


def _table(
    findings: Findings,
    label: str,
    columns: list[str],
    lines: dict[tuple[str, str], Line],
    made: dict[tuple[str, str], Losses],
    title: str,
    methods: list[str],
) -> Table:
    """A row for each column and method; metrics that no row has are left out."""
    task = findings.tasks[label]
    assert isinstance(task, LossTask)
    several = len(columns) > 1 or bool(columns[0])
    shows_score = task.unit != "nats" and task.metric not in ("kl",)
    extras = [
        (name, title, unit, scale, places)
        for name, title, unit, scale, places in (
            ("kl", "KL", "from dense, nats", 1, 4),
            ("top1", "same top-1", "% of positions", 100, 1),
            ("bits_per_byte", "bits per byte", "", 1, 4),
        )
        if any(getattr(one, name) is not None for one in made.values())
    ]
    head = [Cell("method")] + [Cell(task.columns or "set")] * several + [Cell("bytes ratio"), Cell("n")]
    head += [Cell(task.unit, "95 % interval below")] * shows_score
    head += [Cell(task.nats, "nats"), Cell("over dense", "nats")]
    head += [Cell(title, unit) for _, title, unit, _, _ in extras]
    rows = []
    for column in columns:
        for method in methods:
            row = [Cell(method)] + [Cell(heading(column))] * several + [ratio_cell(findings, method, [label], column)]
            line, one = lines.get((method, column)), made.get((method, column))
            if line is None or one is None:
                rows.append([*row, Cell("0 †", tone="missing"), *[Cell(NOTHING)] * (len(head) - len(row) - 1)])
                continue
            whole = f"{line.count:,}" if line.complete else f"{line.count:,} of {line.expected:,} †"
            row.append(Cell(whole, tone="" if line.complete else "missing"))
            if shows_score:
                row.append(Cell(number(line.value, 3), ends_of(line, 3)))
            row += [Cell(number(one.loss, 3)), over_dense(one)]
            for name, _, _, scale, places in extras:
                value = getattr(one, name)
                row.append(Cell(number(None if value is None else scale * value, places)))
            rows.append(row)
    return Table(head, rows, title, labels=1 + several)


def over_dense(one: Losses) -> Cell:
    if one.over is None:
        return Cell(NOTHING)
    ends = " to ".join(signed(end, 3) for end in one.over_interval or ())
    mark = f"{SIGNS[one.verdict]} {one.verdict}" if one.verdict else ""
    return Cell(signed(one.over, 3), f"{ends} {mark}".strip(), one.verdict)


def positions(curves: dict[str, list[float]], scored: int, places: int) -> Table:
    """The numbers of a chart, neighbouring points averaged so that there are not too many."""
    length = max(map(len, curves.values()))
    step = -(-length // POSITIONS)
    rows = []
    for start in range(0, length, step):
        row = [Cell(f"{start * BIN + 1:,} to {min((start + step) * BIN, length * BIN, scored):,}")]
        for values in curves.values():
            part = values[start : start + step]
            row.append(Cell(number(sum(part) / len(part) if part else None, places)))
        rows.append(row)
    return Table([Cell("tokens after the context"), *map(Cell, curves)], rows)
