"""K and V that are made in parts and held no longer than need be: the latest part, and the one that is made ahead."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from longwave.ops.ahead import Ahead

Pair = tuple[torch.Tensor, torch.Tensor]


class Latest:
    """A part is made when it is asked for, and held until another is, or until it is let go."""

    def __init__(self, make: Callable[[Any], Pair]):
        """make: from a part's key to its K and V."""
        self._make = make
        self._key: Hashable = None
        self._held: Pair | None = None
        self._ahead: Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make, "_key": None, "_held": None, "_ahead": None}

    def get(self, key: Hashable, then: Hashable = None, device: torch.device | None = None) -> Pair:
        """The part `key`. then: what to make meanwhile for a device, in a thread and a stream of its own."""
        if self._held is None or self._key != key:
            ahead, self._held, self._ahead = self._ahead, None, None  # the old one goes before the new one comes
            self._held = ahead.result() if ahead is not None and ahead.key == key else self._make(key)
            self._key = key
            if then is not None and device is not None:
                self._ahead = Ahead(self._make, then, device)
        return self._held

    def let_go(self) -> None:
        """Forget the latest part; what is made ahead stays."""
        self._held = None

    def forget(self) -> None:
        """Forget both: what they were made of is another now."""
        self._held = self._ahead = None

    def tensors(self) -> list[torch.Tensor]:
        """The latest part's."""
        return list(self._held or ())
