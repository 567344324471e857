"""Result rows added up: a score with a bootstrap interval for each task, set and method, and its distance to dense."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from longwave.evals.results import Loaded
from longwave.evals.spec import dense_of, is_dense
from longwave.evals.task import LossTask, Task
from longwave.evals.tasks import TASKS

RESAMPLES = 1000
FEWEST = 6  # pairs that can differ from zero at 5 %: with five, all on one side still has probability 2 / 2**5
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


def bootstrap(
    rows: Sequence[Any], total: Callable[[Sequence[Any]], float], seed: str, sets: Sequence[Any] | None = None
) -> tuple[float, float]:
    """Percentile interval (2.5 %, 97.5 %) of `total` over resampled rows. Deterministic in `seed`.

    sets: the set of each row where `total` is a mean over sets: rows are then drawn within theirs, so none is lost.
    """
    if len(rows) < 2:
        return total(rows), total(rows)
    return _interval([total([rows[i] for i in pick]) for pick in _picks(sets or [None] * len(rows), seed)])


def bootstrap_mean(values: Sequence[float], seed: str) -> tuple[float, float]:
    """The same for a mean of numbers, much faster."""
    if len(values) < 2:
        return float(np.mean(values)), float(np.mean(values))
    array = np.asarray(values)
    return _interval([float(array[pick].mean()) for pick in _picks([None] * len(values), seed)])


def _picks(sets: Sequence[Any], seed: str) -> np.ndarray:
    """Row numbers of every resample: [RESAMPLES, rows], as many of each set as there are."""
    draw = np.random.default_rng(int(hashlib.sha256(seed.encode()).hexdigest()[:8], 16))
    members = [np.flatnonzero([value == name for value in sets]) for name in dict.fromkeys(sets)]
    return np.hstack([rows[draw.integers(0, len(rows), size=(RESAMPLES, len(rows)))] for rows in members])


def given(low: float | None, high: float | None, count: int) -> tuple[float, float] | None:
    """An interval where `count` samples can give one: fewer than FEWEST say too little, and samples that are all alike
    have a bootstrap without width, which is not certainty."""
    return None if low is None or high is None or low == high or count < FEWEST else (low, high)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


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


def judge(low: float, high: float, pairs: int, lower: bool) -> str:
    """What an interval of a difference to dense says: "worse", "better", or "" where it says neither."""
    if pairs < FEWEST or low <= 0 <= high:
        return ""
    return "better" if (high < 0) == lower else "worse"


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


def show(name: Any) -> str:
    """A meta value as a heading: 4000 -> "4,000", 0.5 -> "0.5", anything else as it is."""
    if isinstance(name, float):
        return f"{name:g}"
    return f"{name:,}" if isinstance(name, int) and not isinstance(name, bool) else str(name)
