"""Work that runs in several threads at once: checksums of large bytes, and reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 8

T = TypeVar("T")


def side_by_side(work: Callable[..., T], *given: Iterable[object]) -> list[T]:
    """work(...) of each, in order."""
    todo = list(zip(*given, strict=True))
    if len(todo) < 2:
        return [work(*one) for one in todo]
    each = -(-len(todo) // (4 * THREADS))  # handed over at once: to hand over one takes as long as a small one
    shares = [todo[first : first + each] for first in range(0, len(todo), each)]
    with ThreadPoolExecutor(THREADS) as threads:
        return [made for some in threads.map(lambda share: [work(*one) for one in share], shares) for made in some]
