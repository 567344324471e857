"""How far the running pass got, and what the layers of a cache share besides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longwave.frame.scratch import Scratch


@dataclass
class Progress:
    """How far the running forward pass got, shared by a cache's layers: failing half-way leaves them unequal."""

    first: int | None = 0  # the layer that a pass meets first; None where one that only transformers sees comes before
    last: int = 0
    last_memory: int = 0
    reached: int | None = None  # the last layer given tokens in this pass
    broken: bool = False
    parked: bool = False  # what the layers hold lies in host memory until `LongCache.wake`
    lent: object | None = None  # of the decoder that holds the layers' storage and counts for them
    rotary: Any = None  # of the model, where a method needs it (rotary/)
    switch: int | None = None  # tokens beyond which the model rotates all of them otherwise (longrope, dynamic)
    drifts: bool = False  # whether it does so at every length beyond (dynamic)
    ids: Any = None  # of the running pass's tokens, where a method needs to know them (surprise.py)
    unheard: bool = False  # layers wait behind a pass for what its last layer says
    mask: tuple[Any, Any, list[int]] | None = None  # a pass's 4D mask, the plain one that it is, tokens of rows before
    given: Any = None  # what the running pass was given, where somebody is to read it again (again.py)
    look: list[Any] | None = None  # what layers saw so far of a pass that is read for the first of two times (look.py)
    concluding: list[Any] = field(default_factory=list)  # layers that hold a text whole until the last one does
    scratch: Scratch = field(default_factory=Scratch)  # what one layer's pass may take at a time

    def check(self) -> None:
        self.check_here()
        if self.broken or self.unheard or self.reached not in (None, self.last):
            raise ValueError(
                "the last forward pass failed half-way and layers hold different tokens: call cache.reset()"
            )

    def check_here(self) -> None:
        if self.parked:
            raise RuntimeError("this cache is parked in host memory: call cache.wake() first")

    def check_lent(self) -> None:
        self.check_here()
        self._check_counted()

    def _check_counted(self) -> None:
        if self.lent is not None:
            raise RuntimeError("a decoder holds this cache: call the decoder's finish(), or cache.reset()")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles of the cache: what a decoder holds is not counted yet."""
        self._check_counted()
        return vars(self)

    def refused(self, index: int) -> None:
        """A layer took nothing. If it was the first one, the pass never happened."""
        self.mask = self.ids = None
        if index == self.first:
            self.reached = None
        else:
            self.broken = True
