"""The benchmarks' data from where it comes from: which files, under which licence, and whether they are those.

sources.tsv has a line a file: the task that reads it, its path in the data folder, sha256 and bytes there, the licence
that its source states, what is made of the download (nothing, or a function below) and the address, at a fixed commit.
What nobody licenses, and what is not used as it lies somewhere, is not in it.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

from longwave.checks import nearest
from longwave.fetch import fetch, opened

RECORD = "SOURCES.tsv"  # in the data folder: what lies there, from where, under which licence


@dataclass(frozen=True)
class Source:
    """A line of sources.tsv. made: "" for a file taken as it is."""

    task: str
    path: str
    sha256: str
    bytes: int
    licence: str
    made: str
    url: str


def sources() -> list[Source]:
    text = (resources.files("longwave.evals") / "sources.tsv").read_text(encoding="utf-8")
    return [
        Source(task, path, sha256, int(size), licence, made, url)
        for task, path, sha256, size, licence, made, url in csv.reader(text.splitlines()[1:], delimiter="\t")
    ]


def command_for(relative: str) -> str | None:
    """The command that fetches a file or folder of the data folder, None where there is none."""
    for source in sources():
        if f"{source.path}/".startswith(f"{relative}/"):
            return f"longwave eval data {source.task}"
    return None


def chosen(tasks: Sequence[str]) -> list[Source]:
    """The files of these tasks, of all for none. ValueError for a task whose data cannot be fetched."""
    known = list(dict.fromkeys(source.task for source in sources()))
    for task in tasks:
        if task not in known:
            raise ValueError(f"there is no data to fetch for {task!r}; {nearest(task, known)}")
    return [source for source in sources() if not tasks or source.task in tasks]


def download(wanted: Sequence[Source], folder: Path, advance: Callable[[int, int], None]) -> list[Source]:
    """Put files into a data folder, and say which were not there yet. advance: told (bytes, bytes in all).

    A file that is there is checked and left alone. Raises OSError where one cannot be had, or another one lies in its
    place: those that came before stay, and a next call goes on.
    """
    came, done, total = [], 0, sum(source.bytes for source in wanted)
    for source in wanted:
        path = folder / source.path
        if path.exists():
            if (found := digest(path.read_bytes())) != source.sha256:
                raise OSError(
                    f"{path} has sha256 {found}, expected {source.sha256}: move it away, or name another folder"
                )
        else:
            if source.made:
                _make(source, path)
            else:
                fetch(source.url, path, source.sha256, partial(_advance, advance, done, total))
            came.append(source)
        done += source.bytes
        advance(done, total)
    _record(wanted, folder)
    return came


def _advance(advance: Callable[[int, int], None], before: int, total: int, here: int, _: int) -> None:
    advance(before + here, total)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _make(source: Source, path: Path) -> None:
    """A file that is made of what is fetched."""
    with opened(source.url) as answer:
        content = MADE[source.made](answer.read().decode("utf-8")).encode()
    if digest(content) != source.sha256:
        raise OSError(f"what {source.url} makes has sha256 {digest(content)}, expected {source.sha256}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def prompts(code: str) -> str:
    """The system prompts of L-Eval's program as JSON: the conditions on a set, in their order, and what it is told."""
    functions = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef))
    (function,) = (node for node in functions if node.name == "get_sys_prompt")
    found: dict[str, str] = {}
    (branch,) = (node for node in function.body if isinstance(node, ast.If))
    while True:
        found[ast.unparse(branch.test)] = _told(branch.body)
        if len(branch.orelse) == 1 and isinstance(branch.orelse[0], ast.If):
            branch = branch.orelse[0]
            continue
        found["else"] = _told(branch.orelse)
        return json.dumps(found, indent=1) + "\n"


def _told(body: list[ast.stmt]) -> str:
    (told,) = (ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign))
    return str(told)


MADE: dict[str, Callable[[str], str]] = {"prompts": prompts}


def _record(wanted: Sequence[Source], folder: Path) -> None:
    """Say in the folder what lies there; lines of other files stay."""
    path = folder / RECORD
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    known = {line.split("\t")[0]: line for line in lines}
    known |= {s.path: "\t".join((s.path, s.sha256, s.licence, s.url)) for s in wanted}
    path.write_text("\n".join(["path\tsha256\tlicence\turl", *sorted(known.values())]) + "\n", encoding="utf-8")
