"""Looking before reading: a short pass is read twice, and the second time its layers know what all of them saw.

Of our own. The first reading is as any other; then its tokens are taken back, from transformers' own layers too, which
are copied before. Where a cache records its past for assisted decoding nothing is read twice: guesses come and go.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.frame.cache import LongCache
from longwave.frame.hooks import Hooks
from longwave.frame.ids import given
from longwave.frame.layer import MemoryLayer
from longwave.frame.observe import Needs


class Looker(Hooks):
    """A hook on a model's decoder that reads a pass before the model does, into caches that hold this one."""

    def __init__(self, model: PreTrainedModel):
        me = weakref.ref(self)  # the model holds the hook, and hooks last as long as caches

        @torch.compiler.disable
        def begins(decoder: Any, args: Any, kwargs: Any) -> None:
            _begins(me(), decoder, args, kwargs)

        super().__init__([model.get_decoder().register_forward_pre_hook(begins, with_kwargs=True)])


def _asks(needs: Needs) -> int:
    return needs.look


def _begins(looker: Looker | None, decoder: Any, args: Any, kwargs: Any) -> None:
    cache, tokens = given(decoder, args, kwargs, _asks)
    if cache is None or looker is None or looker not in (cache._watch or ()) or cache._progress.look is not None:
        return
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    layers = list(cache.memory_layers())
    first = layers[0]
    if tokens is None or not first.is_initialized or first.record_past:
        return
    new = tokens.shape[1]
    if 2 <= new <= first.needs.look and first.looks([row + new for row in first.rows]):
        look, counts = _look(decoder, args, kwargs, cache, layers)
        for layer in layers:
            layer.seen(look, counts)


@torch.no_grad()
def _look(
    decoder: Any, args: Any, kwargs: Any, cache: LongCache, layers: list[MemoryLayer]
) -> tuple[list[Any], list[int]]:
    """What the layers saw, and how many tokens of each row came. The cache is as it was."""
    progress = cache._progress
    before = [layer.counts() for layer in layers]
    others = {i: copy.deepcopy(layer) for i, layer in enumerate(cache.layers) if not isinstance(layer, MemoryLayer)}
    look: list[Any] = []
    progress.look = look
    try:
        decoder(*args, **kwargs)
        counts = [now - was for now, was in zip(layers[0].rows, before[0][1], strict=True)]
        for layer, was in zip(layers, before, strict=True):
            layer.take_back(was)
    except BaseException:
        if [layer.counts() for layer in layers] != before:
            progress.broken = True
        raise
    finally:
        progress.look = None
        for i, layer in others.items():
            cache.layers[i] = layer
    return look, counts
