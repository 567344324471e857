"""K and V that are made in parts and held no longer than need be: the latest part, and the one that is made ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


class Latest:
    """A part is made when it is asked for, and held until another is, or until it is let go."""

    def __init__(self, make: Callable[[Any], Pair]):
        """make: from a part's key to its K and V."""
        self._make = make
        self._key: Hashable = None
        self._held: Pair | None = None
        self._ahead: _Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make, "_key": None, "_held": None, "_ahead": None}

    def get(self, key: Hashable, then: Hashable = None, device: torch.device | None = None) -> Pair:
        """The part `key`. then: what to make meanwhile for a device, in a thread and a stream of its own."""
        if self._held is None or self._key != key:
            ahead, self._held, self._ahead = self._ahead, None, None  # the old one goes before the new one comes
            self._held = ahead.result() if ahead is not None and ahead.key == key else self._make(key)
            self._key = key
            if then is not None and device is not None:
                self._ahead = _Ahead(self._make, then, device)
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


class _Ahead(threading.Thread):
    """A part that is being made."""

    def __init__(self, make: Callable[[Any], Pair], key: Hashable, device: torch.device):
        super().__init__(name="longwave-ahead", daemon=True)
        self.key, self._make, self._device = key, make, device
        self._made: Pair | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            if self._device.type != "cuda":
                self._made = self._make(self.key)
                return
            with torch.cuda.stream(torch.cuda.Stream(self._device)):
                self._made = self._make(self.key)
                torch.cuda.current_stream(self._device).synchronize()
        except BaseException as error:
            self._error = error

    def result(self) -> Pair:
        """What was made, or the error that came instead."""
        self.join()
        if self._error is not None:
            raise self._error
        assert self._made is not None
        if self._device.type == "cuda":
            for x in self._made:
                x.record_stream(torch.cuda.current_stream(self._device))
        return self._made
