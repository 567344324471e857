"""Layers that attend and keep a recurrent state as well (Falcon-H1, Zamba2): a memory layer of any method, and beside
it the state in transformers' own class."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from longwave.frame.counting import storage_bytes
from longwave.frame.layer import MemoryLayer
from longwave.frame.others import load_own_state, own_state
from longwave.store.state import State, under, within


def with_state(layer: MemoryLayer, state: LinearAttentionLayer) -> MemoryLayer:
    """The same layer, which from now on keeps an empty `state`, too."""
    layer.__class__ = _with_state(type(layer))
    layer.recurrent = state  # type: ignore[attr-defined]
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

    recurrent: LinearAttentionLayer
    is_croppable = property(lambda self: self.recurrent.is_croppable)
    has_previous_state = property(lambda self: self.recurrent.has_previous_state)
    conv_states = property(lambda self: self.recurrent.conv_states)
    recurrent_states = property(lambda self: self.recurrent.recurrent_states)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self).__mro__[2],), self.__dict__

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.recurrent.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.recurrent.update_recurrent_state(*args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.recurrent = LinearAttentionLayer(self.recurrent.number_of_states)

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.recurrent.activate_past_recording()

    def check_crop(self, tokens_to_remove: int) -> list[int]:
        counts = super().check_crop(tokens_to_remove)
        if any(counts) and not (self.recurrent.record_past and self.recurrent.is_croppable):
            raise ValueError(
                f"cannot remove the last {-int(tokens_to_remove)} tokens: the recurrent state of layer {self.index} "
                "does not go back. Keep a copy.deepcopy of the cache to go back to"
            )
        return counts

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.recurrent.record_past and self.recurrent.is_croppable:
            self.recurrent.crop(int(tokens_to_remove))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.recurrent.device is not None:
            self.recurrent.reorder_cache(torch.arange(self._state_rows())[indices.cpu()])

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        self.recurrent.offload() if str(device) == "cpu" else self.recurrent.prefetch()

    def state(self) -> State:
        return super().state() | self.state_beside()

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        own = within("beside", state)
        super().load_state({name: value for name, value in state.items() if not name.startswith("beside.")}, device)
        self.recurrent = LinearAttentionLayer(self.recurrent.number_of_states)
        self.load_beside(own, device)

    def load_beside(self, own: Mapping[str, Any], device: torch.device) -> None:
        if own:
            load_own_state(self.recurrent, own, device)

    def state_beside(self) -> State:
        """Everything that the recurrent state holds, under "beside"."""
        return under("beside", own_state(self.recurrent))

    def adopt(self, source: MemoryLayer) -> None:
        super().adopt(source)
        self.recurrent = copy.deepcopy(source.recurrent)  # type: ignore[attr-defined]

    def unsteady(self) -> str | None:
        return f"layer {self.index} keeps a recurrent state, whose storage moves"

    def parts(self) -> dict[str, list[torch.Tensor]]:
        return {**super().parts(), "other layers": self._state_tensors()}

    @property
    def dense_nbytes(self) -> int:
        return super().dense_nbytes + storage_bytes(self._state_tensors())

    def _state_tensors(self) -> list[torch.Tensor]:
        held = (*self.recurrent.conv_states.values(), *self.recurrent.recurrent_states.values())
        return [tensor for tensor in held if tensor is not None]

    def _state_rows(self) -> int:
        return self._state_tensors()[0].shape[0]
