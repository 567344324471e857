"""The state of transformers' own layers, whatever attributes they keep it in, as one flat mapping and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from longwave.store.state import State, within

_DEVICE, _DTYPE, _KEYS, _ITEMS = "device", "dtype", "keys", "items"  # what a mapping in a state says instead of a value


def own_state(layer: Any) -> State:
    """All attributes of a layer, tensors not copied. NotImplementedError for what is no tensor, number or text."""
    made: State = {}
    for name, value in vars(layer).items():
        _put(made, name, value, type(layer).__name__)
    return made


def _put(made: State, name: str, value: Any, kind: str) -> None:
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)):
        made[name] = value
    elif isinstance(value, torch.device):
        made[name] = {_DEVICE: True}
    elif isinstance(value, torch.dtype):
        made[name] = {_DTYPE: str(value).removeprefix("torch.")}
    elif isinstance(value, dict) and all(isinstance(key, (int, str)) for key in value):
        made[name] = {_KEYS: list(value)}
        for i, item in enumerate(value.values()):
            _put(made, f"{name}.{i}", item, kind)
    elif isinstance(value, (list, tuple)):
        made[name] = {_ITEMS: len(value), "tuple": isinstance(value, tuple)}
        for i, item in enumerate(value):
            _put(made, f"{name}.{i}", item, kind)
    else:
        raise NotImplementedError(
            f"{kind} keeps {name}, a {type(value).__name__}, which cannot be put away and taken back"
        )


def load_own_state(layer: Any, state: Mapping[str, Any], device: torch.device | None) -> None:
    """Give a layer the attributes that `own_state` found, the tensors where they lie; `device` is where it belongs.

    ValueError, and the layer as it was, where it was built otherwise: another window, another number of states.
    """
    made = {name: _get(state, name, device) for name in state if "." not in name}
    for name in ("sliding_window", "number_of_states"):
        if name in vars(layer) and made.get(name) != vars(layer)[name]:
            raise ValueError(f"{name} is {made.get(name)} there and {vars(layer)[name]} here")
    vars(layer).clear()
    vars(layer).update(made)


def _get(state: Mapping[str, Any], name: str, device: torch.device | None) -> Any:
    value = state[name]
    if not isinstance(value, dict):
        return value
    if _DEVICE in value:
        return device
    if _DTYPE in value:
        return getattr(torch, value[_DTYPE])
    inner = within(name, state)
    if _KEYS in value:
        return {key: _get(inner, str(i), device) for i, key in enumerate(value[_KEYS])}
    items = [_get(inner, str(i), device) for i in range(value[_ITEMS])]
    return tuple(items) if value["tuple"] else items
