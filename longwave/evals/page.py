"""What a report page is made of, and how it becomes HTML and Markdown. Everything is escaped but what `plots` drew."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Cell:
    """under: a second, smaller line. tone: "worse", "better" or "missing", and "best" where nothing in its column is.
    back, ink: colours of a heat map."""

    text: str
    under: str = ""
    tone: str = ""
    back: str = ""
    ink: str = ""


@dataclass(frozen=True)
class Table:
    """spans: (text, columns) of a row above the head. labels: how many columns of words come first."""

    head: list[Cell]
    rows: list[list[Cell]]
    title: str = ""
    spans: list[tuple[str, int]] = field(default_factory=list)
    labels: int = 1
    heat: bool = False


@dataclass(frozen=True)
class Block:
    """A chart with the numbers behind it, or tables; under it what was counted and the commands that measured it."""

    tables: list[Table]
    counted: str
    commands: list[str]
    title: str = ""
    chart: str = ""
    note: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]
    text: list[str] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)  # (swatch, label)


def render(page: dict[str, Any]) -> tuple[str, str]:
    """The page as HTML and as Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    shared: dict[str, Any] = dict(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    loader = PackageLoader("longwave.evals")
    web = Environment(loader=loader, autoescape=True, **shared)
    web.filters["svg"] = Markup  # only what `plots` drew
    web.filters["by_kind"] = by_kind
    web.filters["breakable"] = lambda text: Markup(re.sub(r"(?<=[:,])", "<wbr>", str(escape(text))))
    plain = Environment(loader=loader, finalize=escape_markdown, **shared)
    plain.filters["fence"] = fence
    plain.filters["done"] = Done
    texts = (web.get_template("report.html.j2").render(page), plain.get_template("report.md.j2").render(page))
    html, markdown = (re.sub(r"\n{3,}", "\n\n", text).strip() + "\n" for text in texts)
    return html, markdown


class Done(str):
    """Markdown that is finished."""


def escape_markdown(value: Any) -> str:
    """Text that GitHub shows as it is, in a table cell too."""
    if isinstance(value, Done):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def fence(commands: Iterable[str]) -> Done:
    """A code block that its content cannot end."""
    text = "\n".join(" ".join(command.splitlines()) for command in commands)
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Done(f"{ticks}sh\n{text}\n{ticks}")


def by_kind(blocks: Iterable[Block]) -> list[tuple[bool, list[Block]]]:
    """Neighbours that are charts stand beside each other, tables below each other."""
    return [(charts, list(some)) for charts, some in groupby(blocks, key=lambda block: bool(block.chart))]
