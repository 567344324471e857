"""What methods there are and which options they have, read from their source: importing them imports torch, which
takes seconds, and help and a misspelt name should take none."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import longwave


@dataclass(frozen=True)
class About:
    """what: a method in a line. options: those that a user may set, in their order."""

    what: str
    options: tuple[str, ...]


def methods() -> dict[str, About]:
    """All methods by name, in the order of `longwave.methods.METHODS`. Where that is imported already it is asked: a
    program may have registered its own."""
    there = sys.modules.get("longwave.methods")
    if there is not None:
        return {name: About(first_line(cls), tuple(options_of(cls))) for name, cls in there.METHODS.items()}
    return from_source(Path(longwave.__file__).parent / "methods")


def first_line(cls: type) -> str:
    """What a method or a task is, in a line: the first one of its docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def options_of(cls: Any) -> list[str]:
    """The options that a user may set."""
    return [field.name for field in fields(cls) if not field.name.startswith("_")]


def from_source(folder: Path) -> dict[str, About]:
    """The methods in the table METHODS of a folder's __init__.py, as importing them would give them."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")).body for path in folder.glob("*.py")}
    classes = {node.name: node for body in trees.values() for node in body if isinstance(node, ast.ClassDef)}
    (table,) = (
        node.value
        for node in trees["__init__"]
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "METHODS"
    )
    assert isinstance(table, ast.DictComp)
    found = {}
    for node in ast.walk(table.generators[0].iter):
        if isinstance(node, ast.Name):
            cls = classes[node.id]
            what = (ast.get_docstring(cls) or "").partition("\n")[0]
            options = (name for name in dict.fromkeys(_fields(cls, classes)) if not name.startswith("_"))
            found[_name(cls)] = About(what, tuple(options))
    return found


def _fields(cls: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """A dataclass's fields, those of its bases first; one may come again."""
    for base in reversed(cls.bases):
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _fields(classes[base.id], classes)
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
            yield ast.unparse(node.target)


def _name(cls: ast.ClassDef) -> str:
    (name,) = (
        ast.literal_eval(node.value)
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "name" and node.value is not None
    )
    return str(name)
