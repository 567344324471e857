"""dual_chunk: keys at their place in a chunk, queries at three: for their chunk, the one before, all older ones.

Source: Dual Chunk Attention, arXiv 2402.17463. Chunks are of s = chunk - window tokens. A query's place is its own in
its chunk, that and s but at most `chunk` for the chunk before, `chunk` for older ones: no distance is above `chunk`,
those up to `window` are as they are. The temperature that its code adds and its paper's figures do not have is left
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.methods.remapped import Look, Remapped


@dataclass(frozen=True)
class DualChunk(Remapped):
    """Every token, positions counted by chunk (Dual Chunk Attention).

    chunk: the greatest distance; three quarters of the trained length in the paper. window: tokens always at their
        distance; below chunk, an eighth of the trained length there.
    """

    name: ClassVar[str] = "dual_chunk"

    chunk: int = 1536
    window: int = 256

    def __post_init__(self) -> None:
        whole("window", self.window, 1, "tokens")
        whole("chunk", self.chunk, self.window + 1, "tokens (window + 1)")

    def exact(self) -> int:
        return self.chunk - self.window

    def reach(self, limit: int) -> int | None:
        return None if self.chunk < limit else limit

    def looks(self, i: torch.Tensor) -> Iterator[Look]:
        size = self.chunk - self.window
        own = i // size * size  # where the query's chunk begins
        before, first = (own - size).clamp(min=0), torch.zeros_like(i)
        yield Look(i % size, own, i + 1, place=lambda j: j % size)
        yield Look((i % size + size).clamp(max=self.chunk), before, own, place=lambda j: j % size)
        yield Look(torch.full_like(i, self.chunk), first, before, place=lambda j: j % size)
