"""What is checked in many places and says the same in each: names, whole numbers, and files that a user wrote.

Nothing here imports more than the standard library. An error is one sentence with the value or the file in it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint of an error about an unknown name."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names) or 'none'}"


def check_options(name: str, options: Iterable[str], known: Mapping[str, Collection[str]], what: str) -> None:
    """Raise ValueError for a name that is not among the `known`, or an option that is none of its own. what: "method",
    "task"."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; {nearest(name, known)}")
    for option in options:
        if option not in known[name]:
            raise ValueError(f"{name} has no option {option!r}; {nearest(option, known[name])}")


def whole(name: str, value: Any, least: int | None, unit: str = "") -> int:
    """`value` where it is a whole number, at least `least` (None: any); a bool is none. unit: what it counts."""
    if isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least):
        return value
    of, bound = (f" of {unit}" if unit else ""), ("" if least is None else f", at least {least}")
    raise ValueError(f"{name} is a whole number{of}{bound}; got {value!r}")


def read_text(path: Path, *, blank: bool = True) -> str:
    """A file's UTF-8 text. blank: whether nothing but white space will do. A file that is not there is an OSError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    if not blank and not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """What a JSON text of a file means. line: its number in the file, where it is one of many."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{line or error.lineno} is not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}{f':{line}' if line else ''} is nested too deeply") from None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object that a JSON file holds. what: what it is, for the error where it holds something else."""
    data = parse_json(read_text(path), path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not {what}: it holds a {type(data).__name__}, not an object")
    return data


def jsonable(value: Any) -> Any:
    """What JSON can say of a value: it has no NaN and no infinity, which become None, however deep they lie."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value
