"""dense: keep every token. The frame's own baseline, and the proof that it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longwave.frame import MemoryLayer
from longwave.methods.base import Bound, CacheShape, Method
from longwave.plan.profile import Profile
from longwave.store.tokens import capacity


@dataclass(frozen=True)
class Dense(Method):
    """Every token of every layer, as it is; the only budget it can meet is 1."""

    name: ClassVar[str] = "dense"

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> DenseBound:
        if budget is not None and budget < 1:
            raise ValueError(f"dense keeps everything, so its budget is 1; got {budget}. Use fourier for less")
        return DenseBound(self, shape, budget)

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        return 1.0


class DenseBound(Bound):
    def layer(self, index: int) -> MemoryLayer:
        return MemoryLayer(index)

    def layer_bytes(self, index: int, tokens: int) -> int:
        return capacity(tokens) * self.shape.token_bytes
