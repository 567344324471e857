"""All that a cache holds moved to host memory and back: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from longwave.frame.layer import MemoryLayer
from longwave.frame.others import load_own_state, own_state
from longwave.store.state import State


def states_of(layers: list[Any]) -> list[State]:
    """What each layer holds, tensors not copied."""
    return [layer.state() if isinstance(layer, MemoryLayer) else own_state(layer) for layer in layers]


def give_states(layers: list[Any], states: list[State], devices: list[torch.device | None]) -> None:
    """The inverse. devices: where each layer belongs, wherever its tensors lie."""
    for layer, state, device in zip(layers, states, devices, strict=True):
        if not isinstance(layer, MemoryLayer):
            load_own_state(layer, state, device)
        elif state:
            assert device is not None
            layer.load_state(state, device)


def exchange(layers: list[Any], move: Callable[[int, str, torch.Tensor], torch.Tensor]) -> None:
    """Have every layer hold what `move` makes of each tensor, given the layer's number and the tensor's name.

    Everything is made before the first layer changes; if anything fails all layers hold what they held.
    """
    before = states_of(layers)
    devices = [getattr(layer, "device", None) for layer in layers]
    after = [_moved(i, state, move) for i, state in enumerate(before)]
    if any(device is not None and device.type == "cuda" for device in devices):
        torch.cuda.synchronize()
    try:
        give_states(layers, after, devices)
    except BaseException:
        give_states(layers, before, devices)
        raise


def _moved(index: int, state: Mapping[str, Any], move: Callable[[int, str, torch.Tensor], torch.Tensor]) -> State:
    return {
        name: move(index, name, value) if isinstance(value, torch.Tensor) else value for name, value in state.items()
    }


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where it comes from a GPU; what lies there already as it is."""
    if x.device.type == "cpu":
        return x
    return torch.empty_like(x, device="cpu", pin_memory=x.device.type == "cuda").copy_(x, non_blocking=True)
