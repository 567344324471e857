"""A folder of results: run.json says what was measured and how, samples.jsonl has one line a sample and method.

Lines are only ever appended, whole, under a lock, so a killed run loses at most what it was computing. Processes that
share a folder share its work: each takes what no other has taken. A line that cannot be read is reported and its sample
measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from longwave.checks import jsonable
from longwave.evals.header import check_header, continued, difference, joined, read_header, write_header

Key = tuple[str, str, str]  # task, method, sample id

# What every line has.
COLUMNS = {
    **{"task": str, "method": str, "id": str, "prompt": str},
    **{"meta": dict, "metrics": dict, "bytes": int, "dense_bytes": int},
}

# What a line may have that is added up.
NUMBERS = ("tokens", "context", "new_tokens", "scored", "rows", "prefill_seconds", "decode_seconds")


@dataclass
class Loaded:
    """What a folder holds. problems: one sentence a line that could not be read."""

    header: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def key_of(row: Mapping[str, Any]) -> Key:
    return row["task"], row["method"], row["id"]


def read_rows(path: Path, start: int = 0, lines: int = 0) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """(row, "") or (None, what is wrong) for every line from byte `start` on, which follows `lines` others."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for number, raw in enumerate(file, lines + 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
            except ValueError:  # half a line, or not UTF-8
                row = None
            if is_result(row):
                yield row, ""
            else:
                yield None, f"{path}, line {number}: not a result, ignored (its sample will be measured again)"


def is_result(row: Any) -> bool:
    """Whether a line has what the summary reads. Score null stands for a loss that is not finite."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in COLUMNS.items()):
        return False
    numbers = [row.get("score", ""), row["meta"].get("utf8_bytes"), *row["metrics"].values()]
    curves = row.get("curve", {})
    if not isinstance(curves, dict) or not all(isinstance(curve, list) for curve in curves.values()):
        return False
    numbers += [value for curve in curves.values() for value in curve]
    if not all(value is None or is_number(value) for value in numbers):
        return False
    least = {"rows": 1, "scored": 1}
    return row["dense_bytes"] > 0 and all(
        is_number(row[name]) and row[name] >= least.get(name, 0) for name in NUMBERS if name in row
    )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def load(folder: Path) -> Loaded:
    """Everything in a folder; of rows with the same key the first one counts."""
    loaded = Loaded(read_header(folder))
    check_header(loaded.header, folder / "run.json")
    seen: set[Key] = set()
    for row, problem in read_rows(folder / "samples.jsonl"):
        if row is None:
            loaded.problems.append(problem)
        elif key_of(row) not in seen:
            seen.add(key_of(row))
            loaded.rows.append(row)
    return loaded


class Results:
    """An open folder. `done` maps the keys of measured samples to their prompt hashes, which methods share."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "samples.jsonl"
        self.done: dict[Key, str] = {}
        self._prompts: dict[tuple[str, str], str] = {}  # of a task's sample, for whichever method came first
        self.problems: list[str] = []
        self._read_to = self._lines = 0
        self._lock = FileLock(str(folder / ".lock"))
        self._claim: FileLock | None = None

    @classmethod
    def open(
        cls, folder: Path, header: Mapping[str, Any], prompts: Mapping[tuple[str, str], str] | None = None
    ) -> Results:
        """Create a folder, or continue one whose header agrees. Raises, changing nothing, where it does not.

        prompts: (task, sample id) -> prompt hash of what is going to be measured, to agree with what was.
        """
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder for the results")
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if "run.json" not in names and names - {
            ".lock",
            ".claims",
            "run.tmp",
        }:  # those two: another process begins, or was killed
            raise ValueError(f"{folder} is not empty and holds no results of longwave eval: name another folder")
        new = json.loads(json.dumps(header))  # tuples become lists, as they will be read
        if "run.json" in names:
            continued(folder, new)  # refused before even the lock is touched
        folder.mkdir(parents=True, exist_ok=True)
        results = cls(folder)
        with results._lock:
            whole = continued(folder, new) if (folder / "run.json").exists() else new
            results.refresh()
            for (task, sample), prompt in (prompts or {}).items():
                results._same_prompt(task, sample, prompt)
            write_header(folder / "run.json", whole)
        return results

    def refresh(self) -> None:
        """Read what was appended since the last time, by this process or another."""
        with self._lock:  # nobody is in the middle of a line
            if not self.path.exists() or self.path.stat().st_size == self._read_to:
                return
            for row, problem in read_rows(self.path, self._read_to, self._lines):
                if row is None:
                    self.problems.append(problem)
                else:
                    self.done.setdefault(key_of(row), row["prompt"])
                    self._prompts.setdefault((row["task"], row["id"]), row["prompt"])
            with self.path.open("rb") as file:
                file.seek(self._read_to)
                self._lines += file.read().count(b"\n")
            self._read_to = self.path.stat().st_size

    def take(self, task: str, samples: Sequence[str], wait: bool, method: str) -> bool:
        """Whether this process is to measure some samples that share a pass: not where another one does, unless it ends
        without them while this one waits, and not where they are measured. It holds one such claim at a time."""
        self.let_go()
        claims = self.folder / ".claims"
        claims.mkdir(exist_ok=True)
        name = hashlib.blake2b(json.dumps([task, method, list(samples)]).encode(), digest_size=12).hexdigest()
        claim = FileLock(str(claims / name), timeout=-1 if wait else 0)
        try:
            claim.acquire()
        except Timeout:
            return False
        self._claim = claim
        self.refresh()
        if all((task, method, sample) in self.done for sample in samples):
            self.let_go()
            return False
        return True

    def let_go(self) -> None:
        """Leave what was taken to others: a process that dies does so, too."""
        if self._claim is not None:
            with suppress(OSError):  # where systems keep it until it is free; whoever waits for it has it open
                os.unlink(self._claim.lock_file)
            self._claim.release()
            self._claim = None

    def append(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Write rows that are not there yet; returns how many. One write, flushed to disk before the lock is freed."""
        with self._lock:
            self.refresh()
            new = [row for row in rows if key_of(row) not in self.done]
            if not new:
                return 0
            text = "".join(json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) + "\n" for row in new)
            with self.path.open("ab") as file:
                if self._ends_inside_a_line():
                    file.write(b"\n")  # a killed process left half a line
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            self.refresh()
        return len(new)

    def _ends_inside_a_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def check_prompt(self, key: Key, prompt: str) -> bool:
        """Whether a sample is measured already. Raises where it was measured, with any method, on another prompt."""
        self._same_prompt(key[0], key[2], prompt)
        return key in self.done

    def _same_prompt(self, task: str, sample: str, prompt: str) -> None:
        if self._prompts.get((task, sample), prompt) != prompt:
            raise ValueError(
                f"{self.folder} holds sample {sample} of {task} measured on another prompt: data or tokenizer "
                "changed since. Use a new folder"
            )


def merge(folders: Iterable[Path]) -> Loaded:
    """Several folders as one, for a report: their headers and prompts must agree in what makes rows comparable."""
    wanted = list(folders)
    first = load(wanted[0])
    seen = {key_of(row) for row in first.rows}
    prompts = {(row["task"], row["id"]): row["prompt"] for row in first.rows}
    for folder in wanted[1:]:
        other = load(folder)
        if said := difference(first.header, other.header):
            raise ValueError(f"{folder} does not go with {wanted[0]}, which holds results of {said}")
        first.header = joined(first.header, other.header)
        for row in other.rows:
            if prompts.setdefault((row["task"], row["id"]), row["prompt"]) != row["prompt"]:
                raise ValueError(
                    f"{folder} does not go with {wanted[0]}: sample {row['id']} of {row['task']} has another prompt"
                )
        first.rows += [row for row in other.rows if key_of(row) not in seen]
        seen |= {key_of(row) for row in other.rows}
        first.problems += other.problems
    return first
