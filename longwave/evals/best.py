"""What a report says first: which methods nothing beats at their bytes, and a sentence about them.

Both count only what was measured whole: a method that lacks samples of a task was asked less, and takes no part there.
Nothing is said of whether a lead over the next would show again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from longwave.evals.spec import is_dense
from longwave.evals.summary import Line
from longwave.evals.task import Task
from longwave.evals.words import decimals, is_distance, number, plural

SHARES = {0.25: "a quarter of dense's bytes", 0.5: "half of dense's bytes", 1.0: "dense's bytes"}
NAMED = 3  # tasks of a headline


def compared(lines: Sequence[Line], most: float = float("inf")) -> list[Line]:
    """The lines of methods that can be compared: complete, not dense, and with a bytes ratio of `most`."""
    return [line for line in lines if line.complete and not is_dense(line.method) and line.ratio <= most]


def best(lines: Sequence[Line], lower: bool) -> Line:
    """The best score; among equal ones, the fewest bytes."""
    return min(lines, key=lambda line: (line.value if lower else -line.value, line.ratio))


def unbeaten(lines: Sequence[Line], lower: bool) -> list[Line]:
    """Of one task's lines, by bytes: those that score better than every other one with as many bytes or fewer."""
    found: list[Line] = []
    for line in sorted(compared(lines), key=lambda line: (line.ratio, line.value if lower else -line.value)):
        if not found or (line.value < found[-1].value if lower else line.value > found[-1].value):
            found.append(line)
    return found


def headline(
    model: str, samples: int, lines: Mapping[str, Sequence[Line]], tasks: Mapping[str, Task], titles: Mapping[str, str]
) -> str:
    """What was measured, and the best within a share of dense's bytes, the smallest share that anything stays within.

    lines: of each task over all of its samples.
    """
    measured = list(dict.fromkeys(line.method for some in lines.values() for line in some))
    others = [method for method in measured if not is_dense(method)]
    beside = " beside dense" if len(others) < len(measured) else ""
    what = plural(len(others), "method") + beside if others else "dense alone"
    said = f"{model}, {what}, {plural(samples, 'sample')} of {plural(len(tasks), 'task')}"
    share = next((x for x in SHARES if any(compared(some, x) for some in lines.values())), None)
    if not others:
        return f"{said}."
    if share is None:
        return f"{said}: nothing has been measured whole within dense's bytes yet."
    named = [label for label in tasks if compared(lines[label], share)]
    clauses = [clause(compared(lines[label], share), tasks[label], titles[label]) for label in named[:NAMED]]
    left = len(tasks) - len(clauses)
    more = f"; {plural(left, 'more task')} below" if left else ""
    return f"{said}. Within {SHARES[share]}: {'; '.join(clauses)}{more}."


def clause(lines: Sequence[Line], task: Task, title: str) -> str:
    """ "on needle the best of 9 is fourier:budget=0.25, 46.7 to dense's 50.0 at 0.192 of the bytes (60 samples)"."""
    first, places = best(lines, task.lower), decimals(task)
    alike = sum(line.value == first.value for line in lines)
    which = (
        f"the best of {len(lines)} is" if alike == 1 else f"{alike} of {len(lines)} are alike and best, the smallest"
    )
    score = number(first.value, places)
    if first.over is not None and first.pairs == first.count and not is_distance(task):
        score += f" to dense's {number(first.value - first.over, places)}"
    unit = f" ({task.unit}, lower is better)" * task.lower
    count = plural(first.count, "sample")
    what = which if len(lines) > 1 else "only"
    return f"on {title}{unit} {what} {first.method}, {score} at {first.ratio:.3f} of the bytes ({count})"
