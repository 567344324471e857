"""Result folders as one page: report.html, a single file that needs no network, and report.md with the same facts.

Both are made from the same sections of tables and charts, behind a headline. Under each of them stand the samples
counted and the commands that measured them. Whatever comes out of a results folder is escaped.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from longwave.evals import plots
from longwave.evals.best import best, compared, headline, unbeaten
from longwave.evals.page import Block, Cell, Section, Table, render
from longwave.evals.results import Loaded, merge
from longwave.evals.runner import BIN
from longwave.evals.spec import dense_of, is_dense, parse_spec
from longwave.evals.summary import (
    FEWEST,
    MEANS,
    Cost,
    Line,
    Losses,
    Row,
    cost,
    curve,
    finite,
    heat,
    in_column,
    losses,
    planned,
    show,
    sorted_columns,
    summarise,
    task_of,
)
from longwave.evals.task import LossTask, Task
from longwave.evals.words import NOTHING, SIGNS, decimals, is_distance, number, plural, signed

NEEDED = ("context", "rows", "prefill_seconds", "decode_seconds")
POSITIONS = 16  # rows of a table of losses by position, at most
MANY = 16  # methods that one chart or one table can hold
NOTED = 3  # methods of a task whose missing samples are told one by one


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write report.html and report.md into the folder `out`; several folders of results are shown as one."""
    if not folders:
        raise ValueError("name at least one folder of results")
    loaded = merge(folders)
    where = ", ".join(map(str, folders))
    if not loaded.rows:
        raise ValueError(f"{where}: no results yet, there is nothing to report; start `longwave eval run` with it")
    report = Report(loaded)
    if not report.lines:
        raise ValueError(f"{where}: none of {len(loaded.rows)} results has a score that is a finite number")
    page = report.page()
    html, markdown = render(page)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder for the report")
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "report.html", out / "report.md"]
    for path in paths:
        if path.exists() and "longwave eval" not in path.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"{path} is not a report of longwave eval: name another folder, nothing was overwritten")
    for path, text in zip(paths, (html, markdown), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def heading(column: str) -> str:
    return show(int(column)) if column.isdecimal() else column


def counted(counts: Iterable[int], of: str) -> str:
    """ "n = 8 to 10 samples a cell"."""
    some = sorted(counts)
    most = some[-1] if some else 0
    span = f"{some[0]:,} to {most:,}" if some and some[0] < most else f"{most:,}"
    return f"n = {span} {'sample' if most == 1 else 'samples'} {of}"


def measured_by(header: dict[str, Any], labels: Iterable[str]) -> list[str]:
    """The commands that may have measured these tasks: those that name others with --task have not."""
    wanted = set(labels)
    found = []
    for run in header["runs"]:
        command = run.get("command") or ""
        try:
            words = shlex.split(command)
        except ValueError:
            words = []
        named = {after for word, after in pairwise(words) if word == "--task"}
        named |= {word.removeprefix("--task=") for word in words if word.startswith("--task=")}
        if command and (not named & set(header["tasks"]) or named & wanted):
            found.append(command)
    return list(dict.fromkeys(found)) or ["(run from Python: no command was recorded)"]


def titles(header: dict[str, Any]) -> dict[str, str]:
    """A short name for every task: its own, with the options that tell it from others of the same name."""
    named: dict[str, str] = {}
    for label, told in header["tasks"].items():
        alike = [asked(other) for other in header["tasks"].values() if other["name"] == told["name"]]
        differing = {k: v for k, v in asked(told).items() if any(other.get(k) != v for other in alike)}
        short = {key: value for key, value in differing.items() if not isinstance(value, list)} or differing
        said = f"{told['name']}, {options(short)}" if differing else str(told["name"])
        named[label] = said if len(said) < len(label) or not differing else label
    return {label: said if list(named.values()).count(said) == 1 else label for label, said in named.items()}


def asked(told: dict[str, Any]) -> dict[str, Any]:
    """A task's options, and when its question is seen where the task says so itself."""
    return {**told["options"], **({"question": told["question"]} if "question" in told else {})}


def by_budget(methods: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(title, methods) for every budget, the largest first, and for methods without one; dense leads each of them."""
    found: dict[Any, list[str]] = {}
    for method in methods:
        if not is_dense(method):
            try:
                budget = parse_spec(method)[1].get("budget", "")
            except ValueError:  # of a damaged folder
                budget = ""
            found.setdefault(budget, []).append(method)
    shares: list[Any] = sorted((x for x in found if not isinstance(x, str)), reverse=True)
    sizes = [x for x in found if isinstance(x, str) and x]
    dense = [method for method in methods if is_dense(method)]
    groups = [(f"budget {x}", dense + found[x]) for x in [*shares, *sizes]]
    return groups + ([("no budget", dense + found[""])] if "" in found else [])


class Report:
    """The sections of a page, from the rows of a folder.

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
        found = Counter(plots.family(x.method) for label in self.tasks for x in self._unbeaten(label))
        return {name for name, _ in found.most_common(len(plots.COLOURS))}

    def _of(self, label: str) -> list[Line]:
        """A task's lines over all of its samples."""
        return [self.overall[label, method] for method in self.methods if (label, method) in self.overall]

    def _unbeaten(self, label: str) -> list[Line]:
        return unbeaten(self._of(label), self.tasks[label].lower)

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

    def of_task(self, label: str) -> list[dict[str, Any]]:
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

    def page(self) -> dict[str, Any]:
        """What the templates show."""
        header, runs = self.header, self.header["runs"]
        samples = len({(row["task"], row["id"]) for row in self.rows})
        cut = f", prompts cut to {header['max_tokens']:,} tokens" if header.get("max_tokens") else ""
        window = f"a window of {header['window']:,} tokens" if header.get("window") else "no stated window"
        window += f" (rotary tables extended by {header['extension']})" if header.get("extension") else ""
        lead = (
            f"{plural(samples, 'sample')} of {plural(len(self.tasks), 'task')}, the same for "
            f"{plural(len(self.methods), 'method')}: model {header['model']} in "
            f"{header['dtype']} on {'; '.join(distinct(runs, 'device'))}, seed {header['seed']}, {window}{cut}, chat "
            f"template {'used where the protocol has one' if header['chat'] else 'not used'}. "
        )
        lead += {
            "after": 'Question "after" (query-agnostic): the context is compressed before the question is seen.',
            "inside": 'Question "inside" (query-aware): the question is compressed with its context.',
            "with": 'Question "with": context and question are read in one exact pass before anything is compressed.',
        }.get(header["question"], f"Question {header['question']!r}.")
        if own := [self.titles[label] for label in self.tasks if self._question(label) != header["question"]]:
            lead += f" Otherwise where a task says so: {'; '.join(own)}."
        days = sorted({str(run.get("started", ""))[:10] for run in runs} - {""})
        versions = [
            f"{name} {' / '.join(distinct(runs, name))}"
            for name in ("longwave", "torch", "transformers", "python")
            if distinct(runs, name)
        ]
        sections = [self.summary(), self.quality()]
        if self.many and (first := self.unbeaten()).blocks:
            sections = [first, self.quality(), self.summary()]
        for label, task in self.tasks.items():
            if isinstance(task, LossTask):
                sections.append(self.loss(label, task))
            elif (made := self.detail(label, task)).blocks:
                sections.append(made)
        when = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "at an unknown date"
        return {
            "title": f"Long-context evaluation of {header['model']}",
            "headline": headline(
                header["model"], samples, {x: self._of(x) for x in self.tasks}, self.tasks, self.titles
            ),
            "lead": lead,
            "facts": f"Measured {when} with {', '.join(versions)}.",
            "notes": self.notes,
            "sections": [*sections, self.speed(), self.settings()],
        }

    def summary(self) -> Section:
        inside = [label for label in self.tasks if self._question(label) == "inside"]
        before = [label for label in self.tasks if label not in inside]
        parts = [("query-agnostic", before), ("query-aware", inside)] if self.many and before and inside else []
        blocks = []
        for title, labels in parts or [("", list(self.tasks))]:
            counts = [line.count for (label, _), line in self.overall.items() if label in labels]
            tables = [self._overview(labels, methods, budget) for budget, methods in self.groups]
            blocks.append(Block(tables, counted(counts, "a cell"), self.commands(*labels), title))
        text = []
        if self.many:
            text.append(
                "Methods stand by their budget, the best of the first task first; in bold the best of a column, of "
                "those that have all samples."
            )
        if self.has_dense:
            text.append(
                "Below each score: its difference to dense on the samples both have"
                + (", from the paired bootstrap. " if self.many else ", with the paired bootstrap 95 % interval. ")
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

    def _question(self, label: str) -> str:
        """When the question of a task is seen."""
        return str(self.header["tasks"][label].get("question", self.header["question"]))

    def _overview(self, labels: list[str], methods: list[str], title: str) -> Table:
        """A score of each task for each method."""
        head = [Cell("method"), Cell("bytes ratio", "whole cache" + (", and by task" if len(labels) > 1 else ""))]
        table = [[Cell(method), self._ratio(method, labels)] for method in methods]
        for label in labels:
            task = self.tasks[label]
            head.append(Cell(self.titles[label], task.unit + (", lower is better" if task.lower else "")))
            lines = [self.overall.get((label, method)) for method in methods]
            known = compared([line for line in lines if line is not None]) if self.many else []
            top = best(known, task.lower).value if len(known) > 1 else None
            for row, line in zip(table, lines, strict=True):
                cell = self._score(line, task, self.many)
                leads = line in known and line is not None and line.value == top
                row.append(replace(cell, tone=f"{cell.tone} best".strip()) if leads else cell)
        return Table(head, table, title)

    def _ratio(self, method: str, labels: Sequence[str], column: str = "") -> Cell:
        """The bytes ratio of all samples of some tasks, with the tasks' own below; or of a set of one task."""
        mine = [row for row in self.rows if row["method"] == method and row["task"] in labels]
        rows = in_column(self.tasks[labels[0]], mine, column) if column else list[Row](mine)
        if not rows:
            return Cell(NOTHING, "not measured †", "missing")
        own = [self.overall[label, method].ratio for label in labels if (label, method) in self.overall]
        low, high = (f"{end(own, default=0):.3f}" for end in (min, max))
        return Cell(f"{cost(rows).ratio:.3f}", f"{low} to {high}" if low != high else "")

    def _score(self, line: Line | None, task: Task, brief: bool = False) -> Cell:
        """A score with its difference to dense below; brief: without the interval, and without a difference that the
        score itself is."""
        if line is None:
            return Cell(NOTHING, "not measured †", "missing")
        places = decimals(task)
        notes = []
        if line.over is not None and brief:
            said = "" if is_distance(task) else signed(line.over, places)
            notes += [words] if (words := f"{said} {SIGNS[line.verdict]}".strip()) else []
        elif line.over is not None:
            ends = line.over_interval
            interval = f" ({signed(ends[0], places)} to {signed(ends[1], places)})" if ends else ""
            mark = f" {SIGNS[line.verdict]} {line.verdict}" if line.verdict else ""
            notes.append(f"{signed(line.over, places)}{interval}{mark}")
            if line.pairs < line.count:
                notes.append(f"{line.pairs:,} pairs")
        elif self.has_dense and is_dense(line.method):
            notes.append("reference")
        elif not brief and line.interval:
            notes.append(f"95 %: {ends_of(line, places)}")
        if not line.complete:
            notes.append(f"n {line.count:,}/{line.expected:,}")
        tone = line.verdict or ("" if line.complete else "missing")
        return Cell(number(line.value, places) + ("" if line.complete else " †"), ", ".join(notes), tone)

    def quality(self) -> Section:
        blocks = []
        for index, (label, task) in enumerate(self.tasks.items()):
            lines = self._of(label)
            shown = [x for x in lines if not self.many or x.complete or is_dense(x.method)]
            points = [plots.Point(x.method, x.ratio, x.value, x.interval) for x in shown]
            unit = task.unit + (" (lower is better)" if task.lower else "")
            alt = f"{label}: {unit} against bytes ratio"
            ends = (0.0, 100.0) if percent(task, [x.value for x in lines]) else None
            count = counted((x.count for x in shown), "a point")
            numbers = Table(point_head(task), [point_cells(x, decimals(task)) for x in lines])
            if not points:
                continue
            chart = plots.quality_chart(points, self.looks, unit, alt, f"quality{index}", ends, self.lit)
            blocks.append(Block([numbers], count, self.commands(label), self.titles[label], chart))
        families: dict[str, str] = {}
        for method in self.methods:
            if plots.family(method) in self.lit or is_dense(method):
                families.setdefault(plots.family(method), method)
        legend = [(plots.swatch(self.looks[method]), name) for name, method in families.items()]
        left = len(set(map(plots.family, self.methods))) - len(families)
        legend += [(plots.FADED, f"{left} others")] if left else []
        text = [
            f"A point a method, with the bootstrap 95 % interval of its score where {FEWEST} samples or more give one; "
            "points of one family that differ in their budget are joined."
            + (" The dashed line is dense." if self.has_dense else "")
            + (" Of methods that have all samples; in colour the families most often unbeaten." if self.many else "")
        ]
        return Section("Quality against bytes", blocks, text, legend)

    def unbeaten(self) -> Section:
        """For each task, the methods that nothing beats at their bytes."""
        blocks = []
        for label, task in self.tasks.items():
            if lines := self._unbeaten(label):
                exact = [line for line in self._of(label) if is_dense(line.method)]
                rows = [point_cells(line, decimals(task)) for line in [*exact, *lines]]
                note = f"{len(lines)} of {plural(len(compared(self._of(label))), 'method')} that have all samples"
                count = counted((line.count for line in lines), "a row")
                blocks.append(
                    Block([Table(point_head(task), rows)], count, self.commands(label), self.titles[label], note=note)
                )
        text = [
            "Each scores better than every method that held as many bytes or fewer; of many methods on few samples, "
            "some of that is luck: the intervals say how much."
        ]
        return Section("Best for their bytes", blocks, text)

    def detail(self, label: str, task: Task) -> Section:
        """Heat maps and the table of sets, where a task has them."""
        blocks = []
        columns = sorted_columns(task, [row for row in self.of_task(label) if finite(row)])
        if task.heat and not self.many and len({row["meta"].get(task.heat[1]) for row in self.of_task(label)}) > 1:
            blocks.append(self._heat(label, task))
        if len(columns) > 1:
            blocks.append(self._sets(label, task, columns))
        return Section(self.titles[label], blocks, [about(task), f"As asked for: {label}"])

    def _heat(self, label: str, task: Task) -> Block:
        assert task.heat is not None
        maps = {method: heat(task, self.of_task(label), method) for method in self.methods}
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
        return Block(tables, counted(counts, "a cell"), self.commands(label), f"{task.heat[0]} by {task.heat[1]}")

    def _sets(self, label: str, task: Task, columns: list[str]) -> Block:
        """One column a set, under the heads of their groups with an average each."""
        lines = {(line.method, line.column): line for line in self.lines if line.task == label}
        groups = {name: [c for c in columns if c in sets] for name, sets in task.groups.items()}
        groups = {name: sets for name, sets in groups.items() if sets}
        rest = [c for c in columns if not any(c in sets for sets in groups.values())]
        parts = [*groups.items(), *([("other" if groups else "", rest)] if rest else [])]
        averaged = {name for name, sets in groups.items() if len(sets) > 1 and len(parts) > 1}
        by_sample = type(task).total in MEANS
        last = "all samples" if by_sample else "mean of sets" if self._is_mean(lines, columns) else "total"
        means = bool(groups) and by_sample  # else the task's own total is one, or there are no sets to speak of
        head, spans = [Cell("method"), Cell("bytes ratio")], [("", 2)]
        for name, sets in parts:
            head += [Cell(heading(column)) for column in sets]
            head += [Cell("average")] * (name in averaged)
            spans.append((name, len(sets) + (name in averaged)))
        head += [Cell("mean of sets")] * means + [Cell(last)]
        spans.append(("all", 1 + means))
        tables = []
        for budget, methods in self.groups:
            rows = []
            for method in methods:
                row = [Cell(method), self._ratio(method, [label])]
                for name, sets in parts:
                    row += [self._score(lines.get((method, column)), task, brief=True) for column in sets]
                    if name in averaged:
                        row.append(self._average([lines.get((method, column)) for column in sets], task))
                if means:
                    row.append(self._average([lines.get((method, column)) for column in columns], task))
                row.append(self._score(self.overall.get((label, method)), task, brief=True))
                rows.append(row)
            tables.append(Table(head, rows, budget, spans=spans if groups else []))
        counts = [line.count for line in lines.values() if line.column]
        said = "below each score its difference to dense; " * self.has_dense
        said += "averages of groups count each set once; " * bool(averaged)
        said += "the mean of sets counts each set once; " * (means or last == "mean of sets")
        said += "all samples counts each sample once; " * (last == "all samples")
        title = f"by {task.columns}"
        return Block(tables, counted(counts, "a set"), self.commands(label), title, note=said.strip("; ").capitalize())

    def _is_mean(self, lines: dict[tuple[str, str], Line], columns: list[str]) -> bool:
        """Whether the task's own total is the mean of its sets, seen in the methods that have them all."""
        seen = []
        for method in self.methods:
            some = [lines[method, column].value for column in columns if (method, column) in lines]
            if (method, "") in lines and len(some) == len(columns):
                seen.append(math.isclose(lines[method, ""].value, sum(some) / len(some), abs_tol=1e-9))
        return bool(seen) and all(seen)

    def _average(self, lines: Sequence[Line | None], task: Task) -> Cell:
        known = [line for line in lines if line is not None]
        if len(known) < len(lines):
            return Cell(NOTHING, f"{len(known)} of {len(lines)} sets †", "missing")
        places = decimals(task)
        value = number(sum(line.value for line in known) / len(known), places)
        over = [line.over for line in known if line.over is not None]
        under = signed(sum(over) / len(over), places) if len(over) == len(known) else ""
        whole = all(line.complete for line in known)
        return Cell(value if whole else f"{value} †", under, "" if whole else "missing")

    def loss(self, label: str, task: LossTask) -> Section:
        rows = self.of_task(label)
        good = [row for row in rows if finite(row)]
        columns = sorted_columns(task, good)
        lines = {(line.method, line.column): line for line in self.lines if line.task == label}
        made: dict[tuple[str, str], Losses] = {}
        for column in columns:
            here = in_column(task, good, column)
            for method in self.methods:
                mine = [row for row in here if row["method"] == method]
                if mine:
                    exact = dense_of(method, self.methods)
                    dense = [row for row in here if row["method"] == exact]
                    made[method, column] = losses(mine, dense, f"{label}/{column}/loss", task.nats)
        tables = [self._loss_table(label, columns, lines, made, *group) for group in self.groups]
        counts = [line.count for line in lines.values() if line.column in columns]
        blocks = [Block(tables, counted(counts, "a row"), self.commands(label))]
        metric = "kl" if task.compares else task.nats
        what = "KL from dense, nats" if task.compares else f"{task.nats}, nats"
        drawn: list[str] = []
        for index, column in enumerate([] if self.many else columns):
            here = in_column(task, good, column)
            curves = {m: curve([row for row in here if row["method"] == m], metric) for m in self.methods}
            curves = {m: c for m, c in curves.items() if c and not (metric == "kl" and is_dense(m))}
            if not curves:
                continue
            drawn += [method for method in curves if method not in drawn]
            title = f"{what} by position" + (f", {task.columns} {heading(column)}" if column else "")
            name = f"curve{list(self.tasks).index(label)}x{index}"
            alt = f"{label}: {title}"
            chart = plots.curve_chart(curves, self.looks, BIN, what, alt, name)
            count = counted((lines[m, column].count for m in curves if (m, column) in lines), "a line")
            numbers = positions(curves, max(row["scored"] for row in here), 4 if metric == "kl" else 3)
            blocks.append(Block([numbers], count, self.commands(label), title, chart))
        text = [
            about(task),
            "Over dense: difference in nats on the same tokens, with its paired bootstrap 95 % interval; marks as in "
            "the summary.",
        ]
        legend = [(plots.swatch(self.looks[method], line=True), method) for method in drawn]
        return Section(self.titles[label], blocks, [*text, f"As asked for: {label}"], legend)

    def _loss_table(
        self,
        label: str,
        columns: list[str],
        lines: dict[tuple[str, str], Line],
        made: dict[tuple[str, str], Losses],
        title: str,
        methods: list[str],
    ) -> Table:
        """A row for each column and method; metrics that no row has are left out."""
        task = self.tasks[label]
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
                row = [Cell(method)] + [Cell(heading(column))] * several + [self._ratio(method, [label], column)]
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

    def speed(self) -> Section:
        head = [Cell("method"), Cell("bytes ratio"), Cell("n"), Cell("held", "MiB a sample")]
        head += [Cell("dense", "MiB a sample"), Cell("prefill", "tokens a second"), Cell("decode", "tokens a second")]
        blocks = []
        for labels in [list(self.tasks)] if self.many else [[label] for label in self.tasks]:
            tables, costs = [], []
            for budget, methods in self.groups:
                table = []
                for method in methods:
                    mine = [row for row in self.rows if row["method"] == method and row["task"] in labels]
                    if mine:
                        costs.append(cost(mine))
                        table.append([Cell(method), *cost_cells(costs[-1])])
                    else:
                        table.append([Cell(method), Cell(NOTHING), Cell("0 †", tone="missing"), *[Cell(NOTHING)] * 4])
                tables.append(Table(head, table, budget))
            count = counted((one.count for one in costs), "a row")
            title = "all tasks" if self.many else self.titles[labels[0]]
            blocks.append(Block(tables, count, self.commands(*labels), title))
        text = [
            "Times of this harness run, not a benchmark: tokens of all rows of a pass over its seconds, with whatever "
            "else the machine was doing. Prefill reads the context and compresses it; a context that several samples "
            "share is read once and counted for each, and methods that start from the same exact pass are each given "
            "its seconds."
        ]
        if self.header["question"] == "with":
            text.append('With question "with" the prompt is read inside decode, which holds both times.')
        return Section("Speed and memory", blocks, text)

    def settings(self) -> Section:
        methods = Table(
            [Cell("method"), Cell("resolved settings")],
            [[Cell(label), Cell(words)] for label, words in self.header["methods"].items()],
            labels=2,
        )
        tasks = Table(
            [Cell("task"), Cell("version"), Cell("options")],
            [
                [Cell(label), Cell(str(told["version"])), Cell(options(told["options"]))]
                for label, told in self.header["tasks"].items()
            ],
            labels=3,
        )
        names = ("started", "device", "threads", "batch", "batch_tokens", "limit", "longwave", "torch", "transformers")
        runs = Table(
            [Cell(name.replace("_", " ")) for name in names],
            [
                [Cell(NOTHING if run.get(name) is None else str(run[name])) for name in names]
                for run in self.header["runs"]
            ],
            labels=2,
        )
        rows = f"n = {len(self.rows):,} results"
        blocks = [
            Block([methods], rows, self.commands(), "Methods"),
            Block([tasks], rows, self.commands(), "Tasks"),
            Block([runs], rows, self.commands(), "Runs"),
        ]
        signature, template = self.header.get("signature"), self.header.get("chat_template")
        text = f"Weights {signature}, chat template {template or 'none'} (the first digits of their hashes)."
        return Section("Settings", blocks, [text])


def about(task: Task) -> str:
    what = (type(task).__doc__ or "").strip().split("\n")[0]
    return f"{what} Score: {task.unit.removeprefix('score, ')}{', lower is better' if task.lower else ''}."


def percent(task: Task, values: Sequence[float]) -> bool:
    """Whether scores are of 100."""
    return not task.lower and min(values) >= 0 and max(values) <= 100


def ends_of(line: Line, places: int) -> str:
    return " to ".join(number(end, places) for end in line.interval or ())


def point_head(task: Task) -> list[Cell]:
    score = Cell("score", task.unit.removeprefix("score, ") + ", lower is better" * task.lower)
    return [Cell("method"), Cell("bytes ratio"), score, Cell("95 % interval"), Cell("n")]


def point_cells(line: Line, places: int) -> list[Cell]:
    count = f"{line.count:,}" if line.complete else f"{line.count:,} of {line.expected:,} †"
    ends = ends_of(line, places) or NOTHING
    return [Cell(line.method), Cell(f"{line.ratio:.3f}"), Cell(number(line.value, places)), Cell(ends), Cell(count)]


def distinct(runs: Sequence[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(str(run[name]) for run in runs if run.get(name)))


def options(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={'/'.join(map(str, value)) if isinstance(value, list) else value}" for key, value in values.items()
    )


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


def cost_cells(one: Cost) -> list[Cell]:
    held, whole = (f"{value / 2**20:,.2f}" for value in (one.bytes, one.dense_bytes))
    speeds = [number(value, 0 if value is None or value >= 10 else 1) for value in (one.prefill, one.decode)]
    return [Cell(f"{one.ratio:.3f}"), Cell(f"{one.count:,}"), Cell(held), Cell(whole), *map(Cell, speeds)]
