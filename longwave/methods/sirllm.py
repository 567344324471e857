"""sirllm: the tokens that the model expected least, the same ones in every layer and head.

Source: SirLLM, arXiv 2405.12528 ("token entropy" is minus log p of a token given those before it; positions="slots" for
input without end). What is known decays from turn to turn: a turn is a pass of several new tokens of a row. There the
cache is cut before a turn, so that with the turn it is as large as it may be; here behind every pass, and every 64
steps, so that the budget holds. Nobody knows what was expected before the last layer is through: until then all tokens
of a pass lie dense in all layers, so a long text is to be read in chunks (prefill_chunk_size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.frame import MemoryLayer, Needs
from longwave.methods.base import CacheShape
from longwave.methods.evicting import Evicting, EvictingBound, Held
from longwave.methods.evicting_layer import EvictingLayer
from longwave.plan.profile import Profile


@dataclass(frozen=True)
class SirLLM(Evicting):
    """Tokens that the model expected least, in all layers and heads alike (SirLLM).

    decay: what a token's worth is multiplied by in every later turn, above 0 and up to 1.
    """

    name: ClassVar[str] = "sirllm"
    every: ClassVar[int] = 64

    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.decay, (int, float)) and not isinstance(self.decay, bool)
        if not number or not 0 < self.decay <= 1:
            raise ValueError(f"decay is what a turn leaves of a token's worth, above 0 and up to 1; got {self.decay!r}")
        if self.store is not None:
            raise ValueError(
                "sirllm weighs what it keeps against every later turn, and pages are never opened again: leave store "
                "out"
            )

    def needs(self) -> Needs:
        return super().needs() | Needs(surprise=self.window + 1)

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        raise ValueError(
            "sirllm cannot be fitted to a size: a pass lies dense in all layers until it is through, whatever is kept "
            "then. Give the budget as a fraction, or tokens, and read in chunks"
        )

    @property
    def bound(self) -> type[SirBound]:
        return SirBound

    def score(self, held: Held) -> torch.Tensor:
        return held.columns["surprise"]


@dataclass(frozen=True, eq=False)
class SirBound(EvictingBound):
    """Beside what layers hold, the first one remembers what went into the head."""

    def layer(self, index: int) -> MemoryLayer:
        return SirLayer(index, self)

    @property
    def heard_bytes(self) -> int:
        return self.needs.surprise * (self.shape.hidden_size * self.shape.dtype.itemsize + 8)

    def layer_bytes(self, index: int, tokens: int) -> int:
        return super().layer_bytes(index, tokens) + (self.heard_bytes if index == self.shape.memory_layers[0] else 0)

    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        return super().peak_bytes(tokens, batch) + batch * self.heard_bytes


class SirLayer(EvictingLayer):
    def can_drop(self, counts: list[int]) -> None:
        super().can_drop(counts)
        for row, count in enumerate(counts):
            if self.heard is not None and count and self.rows[row] - count > 0 and self.heard.counts[row] <= count:
                raise ValueError(
                    f"cannot remove the last {count} tokens: what comes next is judged by the token before it, and of "
                    f"row {row} only the last {self.heard.counts[row]} are remembered. Keep a copy.deepcopy of the "
                    "cache to go back to"
                )

    def hear(self, surprise: list[torch.Tensor]) -> None:
        column = self.dense.columns["surprise"]
        for row, own in enumerate(surprise):
            if len(own) > 1:
                column[row, :, : self.dense.lengths[row] - len(own)] *= self.bound.method.decay
        super().hear(surprise)
