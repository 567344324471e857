"""How a report writes what it counts and measures."""

from __future__ import annotations

from longwave.evals.task import Task

NOTHING = "–"
SIGNS = {"worse": "✗", "better": "✓", "": ""}


def is_distance(task: Task) -> bool:
    """Whether a score is itself a distance to dense."""
    return task.unit.startswith("KL ")


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
