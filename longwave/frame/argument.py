"""What models call the cache they are given: `cache` since transformers 5.24, `past_key_values` before."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Cache, GenerationMixin

NAMES = ("cache", "past_key_values")
_OWN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters  # of the transformers that is here


def cache_name(model: Any) -> str:
    """The argument of a model's `forward` and `generate` that takes a cache."""
    for taken in (inspect.signature(model.forward).parameters, _OWN):  # a wrapper's says nothing
        for name in NAMES:
            if name in taken:
                return name
    return NAMES[-1]


def cache_argument(model: Any, cache: Cache | None) -> dict[str, Cache | None]:
    """`model(ids, **cache_argument(model, cache))`."""
    return {cache_name(model): cache}
