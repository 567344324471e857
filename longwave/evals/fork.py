"""One prompt, many methods: read it once into a dense cache, then give every method a cache of its own.

This is exact. A prompt given in one call is read with full attention by every method that `can_fork`, and compressed
afterwards, so the K and V that it compresses are the dense ones. What a method needs to see of the prompt beside them
(queries, attention) is observed while it is read, and handed on.
"""

import copy
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from longwave.frame import LongCache, MemoryLayer, Needs, cache_argument, observing
from longwave.shape import context_limit


def padding(tokenizer: Any) -> int:
    """The token id that fills rows up. It is never read: where a tokenizer names none, any will do."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of several rows as one [rows, longest] tensor with a mask, both int64; padding comes first."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return ids, mask


@torch.no_grad()
def read(
    model: PreTrainedModel,
    memory: LongCache,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    chunk: int | None = None,
) -> None:
    """Give ids [batch, tokens] to an empty cache, in passes of `chunk` tokens, or in one. `mask` [batch, tokens] is 0
    where a row is padded."""
    padded = mask is not None and not bool(mask.all())
    for start in range(0, ids.shape[1], chunk or ids.shape[1]):
        stop = ids.shape[1] if chunk is None else min(start + chunk, ids.shape[1])
        extra = {}
        if padded:
            assert mask is not None
            extra["attention_mask"] = mask[:, :stop].to(model.device)
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop].to(model.device)
        some = ids[:, start:stop].to(model.device)
        model(some, **cache_argument(model, memory), use_cache=True, logits_to_keep=1, **extra)


def passes_of(model: PreTrainedModel, memory: Cache, tokens: int) -> int | None:
    """Tokens of a pass, where a cache takes a text of so many in several; None where one does."""
    return memory.method.passes(tokens, context_limit(model)) if isinstance(memory, LongCache) else None


def needs_of(memories: Iterable[LongCache]) -> Needs:
    """What the methods of empty caches need to see of a prompt that is read for all of them."""
    return functools.reduce(operator.or_, (memory.method.needs for memory in memories), Needs())


def prefill(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, needs: Needs | None = None
) -> LongCache:
    """A dense cache that has read ids [batch, tokens], and observed what `needs` says."""
    memory = observing(model, needs or Needs())
    read(model, memory, ids, mask)
    return memory


def can_fork(memory: Cache) -> bool:
    """Whether a cache can be filled with what another one has read: transformers' quantized cache reads for itself, and
    so does a method that reads otherwise than with full attention."""
    return isinstance(memory, LongCache) and memory.method.reads_exactly


def takes_gaps(memory: Cache) -> bool:
    """Whether rows may be padded between a context and its question: sliding windows count what lies there, and
    recurrent states decay with it."""
    return all(
        isinstance(layer, MemoryLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in memory.layers
    )


@torch.no_grad()
def fork(dense: LongCache, empty: LongCache) -> LongCache:
    """Fill an empty cache with what a dense one has read, as if it had read it itself. Rows may differ in length.

    What sliding and other layers hold of transformers' own is the same for every method, and copied.
    """
    for index, (source, target) in enumerate(zip(dense.layers, empty.layers, strict=True)):
        if isinstance(target, MemoryLayer):
            target.adopt(source)
        else:
            empty.layers[index] = copy.deepcopy(source)
    return empty
