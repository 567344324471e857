"""Hooks on a model that a cache needs: they last as long as it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any


class Hooks:
    """Caches that are copied share it; with the last of them the hooks go."""

    def __init__(self, handles: Sequence[Any]):
        """handles: what registering them gave."""
        self._end = weakref.finalize(self, _remove, handles)

    def __deepcopy__(self, memo: object) -> Hooks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # a pickle leaves the model behind
        return type(None), ()


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
