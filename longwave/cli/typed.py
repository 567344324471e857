"""What is typed in a talk, line by line: the prompt, what was typed before, and what Ctrl-C and Ctrl-D mean there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longwave.cli.console import say

KEPT = 1000  # lines of history


def lines(held: Callable[[], str]) -> Iterator[str]:
    """What is typed behind "[...] > ", until it ends. Ctrl-C forgets a line. It may come a moment after an answer that
    it was to end, so it takes two of them to end a talk."""
    pressed = False
    while True:
        try:
            line = input(f"[{held()}] > ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if pressed:
                return
            pressed = True
            say("Ctrl-C once more, Ctrl-D or /quit ends the talk")
            continue
        pressed = False
        if line:
            yield line


@contextmanager
def history(path: Path) -> Iterator[None]:
    """Lines typed before, for the arrow keys of a terminal, and these kept for the next time, readable by their owner
    only. Nothing where Python has no readline, or nobody types; a file that cannot be read or written is let be."""
    try:
        import readline
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(KEPT)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
