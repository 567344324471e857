"""What a report is made from: the rows that count, their sums, the order of methods, notes on what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from longwave.evals import plots
from longwave.evals.best import unbeaten
from longwave.evals.labels import by_budget, measured_by, titles
from longwave.evals.results import Loaded
from longwave.evals.spec import is_dense
from longwave.evals.summary import Line, finite, planned, summarise, task_of
from longwave.evals.task import Task
from longwave.evals.words import plural

NEEDED = ("context", "rows", "prefill_seconds", "decode_seconds")
MANY = 16  # methods that one chart or one table can hold
NOTED = 3  # methods of a task whose missing samples are told one by one


class Findings:
    """The rows of a folder, and how they are shown.

    Of more than MANY methods, those that nothing beats at their bytes come first and are what charts show in colour;
    tables are one a budget, the best of the first task at their top.
    """

    def __init__(self, loaded: Loaded):
        self.header = loaded.header
        self.methods: list[str] = list(self.header["methods"])
        self.many = len(self.methods) > MANY
        self.titles = titles(self.header)
        self.notes = list(loaded.problems)
        self.rows = self._usable(loaded.rows)
        self.lines = summarise(Loaded(self.header, self.rows))
        measured = {line.task for line in self.lines}
        self.tasks: dict[str, Task] = {t: task_of(loaded, t) for t in self.header["tasks"] if t in measured}
        self.groups = self._groups() if self.many else [("", self.methods)]
        self.lit = self._lit()
        self.looks = plots.styles(sorted(self.methods, key=lambda method: plots.family(method) not in self.lit))
        self.has_dense = any(is_dense(line.method) for line in self.lines)
        self._notes()

    def _usable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of known tasks and methods that have every field; the others become notes."""
        good, strange, short = [], set(), 0
        for row in rows:
            if row["task"] not in self.header["tasks"] or row["method"] not in self.methods:
                strange.add((row["task"], row["method"]))
            elif any(name not in row for name in (*NEEDED, *(("scored",) if "loss" in row["metrics"] else ()))):
                short += 1
            else:
                good.append(row)
        for task, method in sorted(strange):
            self.notes.append(f"Results of {method} on {task} are left out: run.json does not name them.")
        if short:
            self.notes.append(f"{plural(short, 'result')} left out: without {', '.join(NEEDED)}.")
        return good

    def _groups(self) -> list[tuple[str, list[str]]]:
        """The methods of every budget, the best of the first task first; what it lacks samples of stands below."""
        label, task = next(iter(self.tasks.items())) if self.tasks else ("", None)

        def place(method: str) -> tuple[float, ...]:
            line = self.overall.get((label, method))
            if is_dense(method) or line is None or task is None:
                return (0,) if is_dense(method) else (3,)
            return (1 if line.complete else 2, line.value if task.lower else -line.value)

        return [(budget, sorted(methods, key=place)) for budget, methods in by_budget(self.methods)]

    def _lit(self) -> set[str]:
        """The families that charts show in colour: all, or of many methods those most often among the unbeaten."""
        if not self.many:
            return set(map(plots.family, self.methods))
        found = Counter(plots.family(x.method) for label in self.tasks for x in self.unbeaten(label))
        return {name for name, _ in found.most_common(len(plots.COLOURS))}

    def lines_of(self, label: str) -> list[Line]:
        """A task's lines over all of its samples."""
        return [self.overall[label, method] for method in self.methods if (label, method) in self.overall]

    def unbeaten(self, label: str) -> list[Line]:
        return unbeaten(self.lines_of(label), self.tasks[label].lower)

    def question(self, label: str) -> str:
        """When the question of a task is seen."""
        return str(self.header["tasks"][label].get("question", self.header["question"]))

    def _notes(self) -> None:
        for label in self.header["tasks"]:
            rows = [row for row in self.rows if row["task"] == label]
            if label not in self.tasks:
                self.notes.append(f"{self.titles[label]}: no scores yet, it is not shown.")
            expected = max(len({row["id"] for row in rows}), planned(self.header, label, ""))
            counts = Counter(row["method"] for row in rows)
            short = [method for method in self.methods if counts[method] < expected]
            if len(short) > NOTED:
                none = sum(not counts[method] for method in short)
                self.notes.append(
                    f"† {self.titles[label]}: of {plural(len(self.methods), 'method')}, "
                    f"{len(self.methods) - len(short):,} have all {expected:,} samples, "
                    f"{len(short) - none:,} a part of them, {none:,} none; what is marked here is not yet measured."
                )
            for method in self.methods:
                mine = [row for row in rows if row["method"] == method]
                bad = [row["id"] for row in mine if not finite(row)]
                if method in short and len(short) <= NOTED:
                    have = f"{len(mine):,} of {expected:,} samples" if mine else f"none of {expected:,} samples"
                    self.notes.append(f"† {self.titles[label]}: {method} has {have}.")
                if bad:
                    some = ", ".join(bad[:3]) + (", …" if len(bad) > 3 else "")
                    what = "score is" if len(bad) == 1 else "scores are"
                    self.notes.append(
                        f"† {self.titles[label]}: {len(bad):,} {what} not finite for {method}, left out ({some})."
                    )

    def rows_of(self, label: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["task"] == label]

    @cached_property
    def overall(self) -> dict[tuple[str, str], Line]:
        """(task, method) -> the line of all samples, the first of a task."""
        found: dict[tuple[str, str], Line] = {}
        for line in self.lines:
            found.setdefault((line.task, line.method), line)
        return found

    def commands(self, *labels: str) -> list[str]:
        return measured_by(self.header, labels or self.tasks)
