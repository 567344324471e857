"""Tensors that are made while something else is computed: in a thread and, for a GPU, in a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def side_stream(device: torch.device, of: str) -> torch.cuda.Stream:
    """A GPU's stream for one purpose, always the same: what was freed in another one would not be used again in it."""
    return torch.cuda.Stream(device)


class Ahead(threading.Thread):
    """make(key), which began when this was built."""

    def __init__(self, make: Callable[[Any], tuple[torch.Tensor, ...]], key: Any, device: torch.device):
        """device: where the tensors will be used."""
        super().__init__(name="longwave-ahead", daemon=True)
        self.key, self._make, self._device = key, make, device
        self._made: tuple[torch.Tensor, ...] | None = None
        self._error: BaseException | None = None
        self.start()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy has nothing on its way

    def run(self) -> None:
        try:
            if self._device.type != "cuda":
                self._made = self._make(self.key)
                return
            with torch.cuda.stream(side_stream(self._device, "ahead")):
                self._made = self._make(self.key)
                torch.cuda.current_stream(self._device).synchronize()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        """What was made, or the error that came instead."""
        self.join()
        if self._error is not None:
            raise self._error
        assert self._made is not None
        if self._device.type == "cuda":
            for x in self._made:
                x.record_stream(torch.cuda.current_stream(self._device))
        return self._made
