"""Result rows added up: a score with a bootstrap interval for each task, set and method, and its distance to dense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from longwave.evals.bootstrap import bootstrap, bootstrap_mean, given, judge
from longwave.evals.results import Loaded
from longwave.evals.spec import dense_of, is_dense
from longwave.evals.task import LossTask, Task
from longwave.evals.tasks import TASKS

MEANS = {Task.total: 100.0, LossTask.total: 1.0}  # totals that are a mean times this: resampled as arrays
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One cell of a table. column: a value of the task's `columns` key, "" for all samples together.

    value: in the task's unit; low, high: bootstrap 95 % interval, resampling samples.
    count: samples with a finite score; expected: samples that any method was given here. Fewer means incomplete.
    over: value minus dense's on the `pairs` samples both have, with over_low, over_high paired; None without dense.
    verdict: "worse" or "better" than dense where that interval leaves out 0 and there are enough pairs, else "".
    ratio: bytes held over the bytes a dense cache would hold, summed over the samples.
    """

    task: str
    method: str
    column: str
    value: float
    low: float
    high: float
    count: int
    ratio: float
    expected: int = 0
    over: float | None = None
    over_low: float | None = None
    over_high: float | None = None
    pairs: int = 0
    verdict: str = ""

    @property
    def complete(self) -> bool:
        return self.count >= self.expected

    @property
    def interval(self) -> tuple[float, float] | None:
        return given(self.low, self.high, self.count)

    @property
    def over_interval(self) -> tuple[float, float] | None:
        return given(self.over_low, self.over_high, self.pairs)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def task_of(loaded: Loaded, label: str) -> Task:
    """The task behind a label, as it was when measured."""
    told = loaded.header["tasks"][label]
    if told["name"] not in TASKS:
        raise ValueError(f"these results are of a task {told['name']!r} that this longwave does not have")
    cls = TASKS[told["name"]]
    if cls.version != told["version"]:
        raise ValueError(
            f"{label} was measured with version {told['version']} of {cls.name}, this longwave has {cls.version}: "
            "measure again in a new folder"
        )
    try:
        return cls(**told["options"])
    except TypeError as error:
        raise ValueError(f"{label} was measured with options that {cls.name} does not take: {error}") from None


def finite(row: Row) -> bool:
    return row["score"] is not None and math.isfinite(row["score"])


def column_of(task: Task, row: Row) -> str:
    return str(row["meta"].get(task.columns, "")) if task.columns else ""


def sets_of(task: Task, rows: Sequence[Row]) -> list[str] | None:
    return [column_of(task, row) for row in rows] if task.equal_sets else None


def planned(header: Mapping[str, Any], label: str, column: str) -> int:
    """Samples that the runs set out to measure, so that a killed one does not look complete."""
    counts = header.get("samples", {}).get(label, {})
    return int(counts.get(column, 0) if column else sum(counts.values()))


def in_column(task: Task, rows: Sequence[Row], column: str) -> list[Row]:
    """The rows of a column; "" is all of them."""
    return [row for row in rows if column in ("", column_of(task, row))]


def summarise(loaded: Loaded) -> list[Line]:
    """Lines in the order of the header: task, then set (all together first where there are several), then method."""
    lines = []
    for label in loaded.header["tasks"]:
        given = [row for row in loaded.rows if row["task"] == label]
        rows = [row for row in given if finite(row)]
        if not rows:
            continue
        task = task_of(loaded, label)
        if isinstance(task, LossTask):  # without it a line is damaged, and does not count
            rows = [row for row in rows if "scored" in row]
        columns = sorted_columns(task, rows)
        for column in ["", *columns] if len(columns) != 1 else columns:
            here = in_column(task, rows, column)
            expected = len({row["id"] for row in in_column(task, given, column)})
            expected = max(expected, planned(loaded.header, label, column))
            for method in loaded.header["methods"]:
                mine = [row for row in here if row["method"] == method]
                if mine:
                    exact = dense_of(method, loaded.header["methods"])
                    dense = [row for row in here if row["method"] == exact]
                    made = line(task, label, method, column, mine, dense)
                    lines.append(replace(made, expected=expected))
    return lines


def sorted_columns(task: Task, rows: Sequence[Row]) -> list[str]:
    """The sets of a task, numbers in order, names as they come in the literature's groups and then as measured."""
    seen = list(dict.fromkeys(row["meta"].get(task.columns, "") for row in rows)) if task.columns else [""]
    if all(isinstance(value, (int, float)) for value in seen):
        return [str(value) for value in sorted(seen)]
    order = [name for names in task.groups.values() for name in names]
    return [str(v) for v in sorted(seen, key=lambda v: (order.index(v) if v in order else len(order), seen.index(v)))]


def bytes_ratio(rows: Sequence[Row]) -> float:
    return sum(row["bytes"] for row in rows) / sum(row["dense_bytes"] for row in rows)


def line(task: Task, label: str, method: str, column: str, mine: Sequence[Row], dense: Sequence[Row]) -> Line:
    seed = f"{label}/{column}"
    scale = MEANS.get(type(task).total)

    def interval(rows: Sequence[Row]) -> tuple[float, float]:
        return (
            bootstrap_mean([scale * r["score"] for r in rows], seed)
            if scale
            else bootstrap(rows, task.total, seed, sets_of(task, rows))
        )

    low, high = interval(mine)
    made = Line(label, method, column, task.total(mine), low, high, len(mine), bytes_ratio(mine))
    pairs = paired(mine, dense)
    if not pairs:
        return made

    def difference(some: Sequence[Any]) -> float:
        return task.total([a for a, _ in some]) - task.total([b for _, b in some])

    if scale:
        over_low, over_high = bootstrap_mean([scale * (a["score"] - b["score"]) for a, b in pairs], seed)
    else:
        over_low, over_high = bootstrap(pairs, difference, seed, sets_of(task, [a for a, _ in pairs]))
    verdict = judge(over_low, over_high, len(pairs), task.lower)
    over = difference(pairs)
    return replace(made, over=over, over_low=over_low, over_high=over_high, pairs=len(pairs), verdict=verdict)


def paired(mine: Sequence[Row], dense: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(a method's row, dense's row) of the samples both have."""
    exact = {row["id"]: row for row in dense}
    return [(row, exact[row["id"]]) for row in mine if row["id"] in exact]


@dataclass(frozen=True)
class Cost:
    """What a method's samples of a task took. bytes, dense_bytes: means per sample; speeds: tokens per second.

    A pass's seconds are shared out over its rows, so each pass counts once; None where nothing was timed.
    """

    count: int
    bytes: float
    dense_bytes: float
    ratio: float
    prefill: float | None
    decode: float | None


def cost(rows: Sequence[Row]) -> Cost:
    def seconds(name: str) -> float:
        return float(sum(row[name] / row["rows"] for row in rows))

    def speed(tokens: int, time: float) -> float | None:
        return tokens / time if time > 0 else None

    count = len(rows)
    held, whole = (sum(row[name] for row in rows) / count for name in ("bytes", "dense_bytes"))
    prefill = speed(sum(row["context"] for row in rows), seconds("prefill_seconds"))
    decode = speed(sum(row.get("new_tokens", row.get("scored", 0)) for row in rows), seconds("decode_seconds"))
    return Cost(count, held, whole, bytes_ratio(rows), prefill, decode)


@dataclass(frozen=True)
class Losses:
    """A loss task's metrics for one method and column, means over the scored tokens. None: not measured.

    over: loss minus dense's on the same tokens, with over_low, over_high paired, and a verdict as in `Line`.
    """

    loss: float | None
    over: float | None = None
    over_low: float | None = None
    over_high: float | None = None
    pairs: int = 0
    verdict: str = ""
    kl: float | None = None
    top1: float | None = None
    bits_per_byte: float | None = None

    @property
    def over_interval(self) -> tuple[float, float] | None:
        return given(self.over_low, self.over_high, self.pairs)


def losses(mine: Sequence[Row], dense: Sequence[Row], seed: str, metric: str = "loss") -> Losses:
    """dense: rows of the dense method, used where the rows do not carry the dense loss themselves. metric: what a
    token's nats are, a loss or a bound of it."""
    exact = {row["id"]: row["metrics"].get(metric) for row in dense}
    over = []
    for row in mine:
        loss, whole = row["metrics"].get(metric), row["metrics"].get("dense_loss", exact.get(row["id"]))
        if loss is not None and whole is not None:
            over.append(loss - whole)
    made = Losses(mean(mine, metric), kl=mean(mine, "kl"), top1=mean(mine, "top1"), bits_per_byte=_bits_per_byte(mine))
    if not over or all(is_dense(row["method"]) for row in mine):
        return made
    low, high = bootstrap_mean(over, seed)
    verdict = judge(low, high, len(over), lower=True)
    difference = float(np.mean(over))
    return replace(made, over=difference, over_low=low, over_high=high, pairs=len(over), verdict=verdict)


def mean(rows: Sequence[Row], metric: str) -> float | None:
    """A metric's mean, each row weighted by the tokens it scored."""
    known = [(row["metrics"][metric], row["scored"]) for row in rows if row["metrics"].get(metric) is not None]
    return sum(value * tokens for value, tokens in known) / sum(tokens for _, tokens in known) if known else None


def _bits_per_byte(rows: Sequence[Row]) -> float | None:
    if not rows or any(row["meta"].get("utf8_bytes") is None or row["metrics"].get("loss") is None for row in rows):
        return None
    nats = sum(row["metrics"]["loss"] * row["scored"] for row in rows)
    return float(nats / math.log(2) / sum(row["meta"]["utf8_bytes"] for row in rows))


def curve(rows: Sequence[Row], metric: str) -> list[float]:
    """A metric by position, averaged over the rows as far as all of them go."""
    curves = [row["curve"][metric] for row in rows if metric in row.get("curve", {})]
    curves = [values for values in curves if all(value is not None for value in values)]
    return [float(np.mean(values)) for values in zip(*curves, strict=False)]
