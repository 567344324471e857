"""dense: keep every token. The frame's own baseline, and the proof that it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from longwave.cache import MemoryLayer
from longwave.methods.base import CacheShape, Method
from longwave.store.tokens import capacity

if TYPE_CHECKING:
    from longwave.profile import Profile


@dataclass(frozen=True)
class Dense(Method):
    """Every token of every layer, as it is; the only budget it can meet is 1."""

    name: ClassVar[str] = "dense"

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> Dense:
        if budget is not None and budget < 1:
            raise ValueError(f"dense keeps everything, so its budget is 1; got {budget}. Use fourier for less")
        return self

    def layer(self, index: int, shape: CacheShape) -> MemoryLayer:
        return MemoryLayer(index)

    def layer_bytes(self, index: int, shape: CacheShape, tokens: int) -> int:
        return capacity(tokens) * shape.token_bytes

    def least_budget(self, shape: CacheShape) -> float:
        return 1.0
