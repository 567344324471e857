"""What the layers that a model sees during a step have in common."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from longwave.frame.attention import Handle


class LayerInStep(CacheLayerMixin):
    """Takes the new token's K and V in `update` and gives a handle for them; a subclass answers in `forward`."""

    _new: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(  # type: ignore[override]  # as in MemoryLayer
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        self._new = key_states, value_states
        handle = Handle(self)
        return handle, handle

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The new token's K and V, once."""
        assert self._new is not None
        new, self._new = self._new, None
        return new

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("a step's layer has its storage already")

    def get_seq_length(self) -> int:
        return 0  # a model that makes a mask of this makes one of the new token
