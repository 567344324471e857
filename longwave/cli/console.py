"""What the commands say and show: tables for people, JSON for programs, progress on stderr, errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from longwave.checks import jsonable

stderr = Console(stderr=True)

# what installs a package that a part of longwave needs; all others are the evaluation's
EXTRAS = {"matplotlib": "plot", "gguf": "gguf", "jieba": "chinese", "lm_eval": "lm-eval"}


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2, no traceback: the user's input was at fault, not the program."""
    print(f"longwave: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(2)


def say(line: str) -> None:
    """A line beside the answer, on stderr. Brackets are words in it, no markup."""
    stderr.print(line, style="dim", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def user_errors(stopped: str = "nothing was kept: run the command again") -> Iterator[None]:
    """Turn what a user can get wrong into one line; anything else is a bug and keeps its traceback. stopped: what
    Ctrl-C leaves, and how to go on. A reader who closes the pipe wants no more, and no line about it."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nlongwave: stopped; {stopped}", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "longwave"):
            raise
        fail(f"{name} is not installed: pip install 'longwave[{EXTRAS.get(name, 'eval')}]'")
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; it is not imported here
            raise
        fail(f"the device has too little memory ({error}): read fewer tokens, or use another --device or --dtype")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on an interactive stderr, silence elsewhere. Yields a function of (done, total)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """A spinner with the time that passed, for steps whose length is not known. Yields what ends it early."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        bar.add_task(what, total=None)
        yield bar.stop


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A rich table on a terminal, its rows one below the other where words would not fit; tab-separated lines
    elsewhere, which other programs can cut."""
    if not sys.stdout.isatty():
        print("\t".join(columns))
        for row in rows:
            print("\t".join(str(cell) for cell in row))
        return
    console = Console()
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    if Measurement.get(console, console.options.update(max_width=10_000), table).minimum <= console.width:
        console.print(table)
        return
    console.print(title, style="italic", markup=False)
    for row in rows:
        folded = Table.grid(Column(style="dim"), Column(overflow="fold"), padding=(0, 2, 0, 0))
        for column, cell in zip(columns, row, strict=True):
            folded.add_row(escape(column), escape(str(cell)))
        console.print(folded, "")


def show_json(data: Any) -> None:
    print(json.dumps(jsonable(data), allow_nan=False))
