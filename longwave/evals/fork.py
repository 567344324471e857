"""One prompt, many methods: read it once into a dense cache, then give every method a cache of its own.

This is exact. A prompt given in one call is read with full attention by every method and compressed afterwards, so
the K and V that a method compresses are the dense ones.
"""

import torch
from transformers import PreTrainedModel

from longwave.build import cache
from longwave.cache import LongCache, MemoryLayer


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor) -> LongCache:
    """A dense cache that has read ids [batch, tokens] (all rows full length, no padding)."""
    memory = cache(model, "dense")
    model(ids.to(model.device), past_key_values=memory, use_cache=True, logits_to_keep=1)
    return memory


@torch.no_grad()
def fork(dense: LongCache, empty: LongCache) -> LongCache:
    """Fill an empty cache with what a dense one has read, as if it had read it itself."""
    for source, target in zip(dense.layers, empty.layers, strict=True):
        if not isinstance(source, MemoryLayer) or not isinstance(target, MemoryLayer):
            raise NotImplementedError("only caches without sliding layers can be forked")
        target.write(*source.materialize())
        target.settle()
    return empty
