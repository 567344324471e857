"""How a report writes what it counts and measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from longwave.evals.task import Task

NOTHING = "–"
SIGNS = {"worse": "✗", "better": "✓", "": ""}


def is_distance(task: Task) -> bool:
    """Whether a score is itself a distance to dense."""
    return task.unit.startswith("KL ")


def percent(task: Task, values: Sequence[float]) -> bool:
    """Whether scores are of 100."""
    return not task.lower and min(values) >= 0 and max(values) <= 100


def decimals(task: Task) -> int:
    return 4 if is_distance(task) else 3 if task.lower else 1


def number(value: float | None, places: int) -> str:
    if value is None:
        return NOTHING
    if 0 < value < 0.5 * 0.1**places:
        return f"<{0.1**places:.{places}f}"
    return f"{value:,.{places}f}".replace("-", "−")


def signed(value: float, places: int) -> str:
    text = f"{value:+,.{places}f}"
    return (text[1:] if float(text.replace(",", "")) == 0 else text).replace("-", "−")


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def counted(counts: Iterable[int], of: str) -> str:
    """ "n = 8 to 10 samples a cell"."""
    some = sorted(counts)
    most = some[-1] if some else 0
    span = f"{some[0]:,} to {most:,}" if some and some[0] < most else f"{most:,}"
    return f"n = {span} {'sample' if most == 1 else 'samples'} {of}"


def show(name: Any) -> str:
    """A meta value as a heading: 4000 -> "4,000", 0.5 -> "0.5", anything else as it is."""
    if isinstance(name, float):
        return f"{name:g}"
    return f"{name:,}" if isinstance(name, int) and not isinstance(name, bool) else str(name)


def heading(column: str) -> str:
    return show(int(column)) if column.isdecimal() else column


def options(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={'/'.join(map(str, value)) if isinstance(value, list) else value}" for key, value in values.items()
    )


def about(task: Task) -> str:
    what = (type(task).__doc__ or "").strip().split("\n")[0]
    return f"{what} Score: {task.unit.removeprefix('score, ')}{', lower is better' if task.lower else ''}."
