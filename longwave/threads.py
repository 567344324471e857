"""Work that runs in several threads at once: checksums of large bytes, and reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS, MANY = 8, 8  # pieces of work that are worth more than one thread

T = TypeVar("T")


def side_by_side(work: Callable[..., T], *given: Iterable[object]) -> list[T]:
    """work(...) of each, in order."""
    todo = list(zip(*given, strict=True))
    if len(todo) < MANY:
        return [work(*one) for one in todo]
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(lambda one: work(*one), todo))
