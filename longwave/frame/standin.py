"""What layers have in common that a model sees for a pass in place of those that hold its tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from longwave.frame.attention import Handle


class StandIn(CacheLayerMixin):
    """Takes the new tokens' K and V in `update` and gives a handle for them; a subclass answers in `forward`."""

    _new: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(  # type: ignore[override]  # as in MemoryLayer
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        self._new = key_states, value_states
        handle = Handle(self)
        return handle, handle

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens' K and V, once."""
        assert self._new is not None
        new, self._new = self._new, None
        return new

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("what a layer stands in for has its storage already")

    def get_seq_length(self) -> int:
        return 0  # a model that makes a mask of this makes one of the new tokens

    def get_max_length(self) -> int:
        return -1
