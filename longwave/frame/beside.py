"""Layers that attend and keep a recurrent state as well (Falcon-H1, Zamba2): a memory layer of any method, and beside
it the state in transformers' own class."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from longwave.frame.counting import storage_bytes
from longwave.frame.layer import MemoryLayer


def with_state(layer: MemoryLayer, state: LinearAttentionLayer) -> MemoryLayer:
    """The same layer, which from now on keeps an empty `state`, too."""
    layer.__class__ = _with_state(type(layer))
    layer.state = state  # type: ignore[attr-defined]
    return layer


@functools.cache
def _with_state(kind: type[MemoryLayer]) -> type[MemoryLayer]:
    bases: tuple[type, ...] = (Beside, kind, LinearAttentionCacheLayerMixin)  # the memory layer's methods come first
    return type(f"{kind.__name__}BesideState", bases, {})


def _again(kind: type[MemoryLayer]) -> MemoryLayer:
    made = kind.__new__(kind)
    made.__class__ = _with_state(kind)
    return made


class Beside(MemoryLayer):
    """What differs from the memory layer alone."""

    state: LinearAttentionLayer
    is_croppable = property(lambda self: self.state.is_croppable)
    has_previous_state = property(lambda self: self.state.has_previous_state)
    conv_states = property(lambda self: self.state.conv_states)
    recurrent_states = property(lambda self: self.state.recurrent_states)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self).__mro__[2],), self.__dict__

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.state.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.state.update_recurrent_state(*args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.state = LinearAttentionLayer(self.state.number_of_states)

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.state.activate_past_recording()

    def check_crop(self, tokens_to_remove: int) -> list[int]:
        counts = super().check_crop(tokens_to_remove)
        if any(counts) and not (self.state.record_past and self.state.is_croppable):
            raise ValueError(
                f"cannot remove the last {-int(tokens_to_remove)} tokens: the recurrent state of layer {self.index} "
                "does not go back. Keep a copy.deepcopy of the cache to go back to"
            )
        return counts

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.state.record_past and self.state.is_croppable:
            self.state.crop(int(tokens_to_remove))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.state.device is not None:
            self.state.reorder_cache(torch.arange(self._state_rows())[indices.cpu()])

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        self.state.offload() if str(device) == "cpu" else self.state.prefetch()

    def adopt(self, source: MemoryLayer) -> None:
        super().adopt(source)
        self.state = copy.deepcopy(source.state)  # type: ignore[attr-defined]

    def unsteady(self) -> str | None:
        return f"layer {self.index} keeps a recurrent state, whose storage moves"

    def parts(self) -> dict[str, list[torch.Tensor]]:
        return {**super().parts(), "other layers": self._state_tensors()}

    @property
    def dense_nbytes(self) -> int:
        return super().dense_nbytes + storage_bytes(self._state_tensors())

    def _state_tensors(self) -> list[torch.Tensor]:
        held = (*self.state.conv_states.values(), *self.state.recurrent_states.values())
        return [tensor for tensor in held if tensor is not None]

    def _state_rows(self) -> int:
        return self._state_tensors()[0].shape[0]
