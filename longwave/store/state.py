"""What a store or a layer holds as one flat mapping: tensors, and what JSON can say, by dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

State = dict[str, Any]
"""Name -> a tensor, or None, a bool, a number, a text, or a list of these."""


def under(name: str, state: Mapping[str, Any]) -> State:
    """The same, each name with `name` and a dot before it."""
    return {f"{name}.{key}": value for key, value in state.items()}


def within(name: str, state: Mapping[str, Any]) -> State:
    """What `under` was given."""
    start = f"{name}."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def demand(met: bool, why: str) -> None:
    """ValueError where what was kept does not fit together."""
    if not met:
        raise ValueError(why)
