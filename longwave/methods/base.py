"""What a method is to the rest of the package: options that know their bytes, and a layer for each model layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PretrainedConfig

from longwave.cache import MemoryLayer, other_layers

if TYPE_CHECKING:
    from longwave.profile import Profile


@dataclass(frozen=True)
class CacheShape:
    """The part of a model that decides how many bytes a cache takes."""

    memory_layers: tuple[int, ...]  # indices of the full-attention layers
    sliding_tokens: tuple[int, ...]  # tokens that each sliding layer holds at most
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype) -> CacheShape:
        """From a decoder config (`config.get_text_config(decoder=True)`)."""
        others = other_layers(config)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(
            memory_layers=tuple(i for i, layer in enumerate(others) if layer is None),
            sliding_tokens=tuple(layer.sliding_window for layer in others if getattr(layer, "is_sliding", False)),
            kv_heads=heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
        )

    @property
    def token_bytes(self) -> int:
        """Dense K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def sliding_bytes(self, tokens: int) -> int:
        """At most: a window, a quarter more where transformers holds a view of it, and a counter."""
        return sum(min(tokens, limit + limit // 4) * self.token_bytes + 64 for limit in self.sliding_tokens)


@dataclass(frozen=True)
class Method(ABC):
    """Options of a method. Frozen and checked when built; `bind` fits them to a model, a budget and a profile."""

    name: ClassVar[str]

    @abstractmethod
    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> Method:
        """The same method with everything decided. `budget` is a fraction of the dense bytes of the middle."""

    @abstractmethod
    def layer(self, index: int, shape: CacheShape) -> MemoryLayer:
        """An empty layer for the model's layer `index`. Called on a bound method."""

    @abstractmethod
    def layer_bytes(self, index: int, shape: CacheShape, tokens: int) -> int:
        """Bytes that layer `index` holds for one row of `tokens`, to the byte. Called on a bound method."""

    @abstractmethod
    def least_budget(self, shape: CacheShape) -> float:
        """The smallest fraction that `bind` accepts."""

    def fits_budget(self) -> bool:
        """Whether a budget decides anything here: False where the options already say everything."""
        return True

    def nbytes(self, shape: CacheShape, tokens: int, batch: int = 1) -> int:
        """Bytes of the whole cache for `batch` rows of `tokens` each, sliding layers included."""
        memory = sum(self.layer_bytes(index, shape, tokens) for index in shape.memory_layers)
        return batch * (memory + shape.sliding_bytes(tokens))

    def peak_bytes(self, shape: CacheShape, tokens: int, batch: int = 1) -> int:
        """The most that `nbytes` reaches on the way to `tokens`."""
        return self.nbytes(shape, tokens, batch)
