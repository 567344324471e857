"""Which tokens a pass brings, where a method asks for it: hooks on the model that last as long as the cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.frame.cache import LongCache
from longwave.frame.hooks import Hooks
from longwave.frame.observe import Needs


def given(module: Any, args: Any, kwargs: Any, asks: Callable[[Needs], object]) -> tuple[LongCache | None, Any]:
    """The cache of a pass through a model's layers, if any of its own asks for it, and the ids."""
    found = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    found |= found.pop("kwargs", {})
    for cache in found.values():
        if isinstance(cache, LongCache) and any(asks(layer.needs) for layer in cache.memory_layers()):
            return cache, found.get("input_ids")
    return None, None


class Teller(Hooks):
    """Hooks around a model's layers: `Progress.ids` while a pass runs."""

    def __init__(self, model: PreTrainedModel):
        base = model.get_decoder()
        hooks = [
            base.register_forward_pre_hook(_before, with_kwargs=True),
            base.register_forward_hook(_after, with_kwargs=True, always_call=True),
        ]
        super().__init__(hooks)


def _asks(needs: Needs) -> bool:
    return needs.ids


@torch.compiler.disable
def _before(module: Any, args: Any, kwargs: Any) -> None:
    cache, ids = given(module, args, kwargs, _asks)
    if cache is not None:
        cache._progress.ids = ids


@torch.compiler.disable
def _after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
    cache, _ = given(module, args, kwargs, _asks)
    if cache is not None and not cache._progress.unheard:  # another one needs them still
        cache._progress.ids = None
