"""`longwave.look_ahead`: a prompt is read together with what a draft model writes after it.

The drafted tokens ask once, in the same pass, for `speckv` to choose by; then they are taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from longwave.frame import LongCache, MemoryLayer, cache_argument
from longwave.methods.speckv import SpecKV, SpecKVLayer
from longwave.prefill.draft import checked_mask, placed, vocabulary, write_on

Draft = PreTrainedModel | torch.Tensor


def look_ahead(
    model: PreTrainedModel,
    cache: LongCache,
    ids: torch.Tensor,
    draft: Draft,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read a prompt into a `speckv` cache, all but its last token, by what `draft` writes after it.

    Afterwards `model.generate(ids, cache=cache)` goes on, and reads that last token over what was kept;
    `longwave.generate(..., draft=draft)` does all of it, and takes its first token from the exact pass.

    ids int64 [batch, tokens]: all of the text, what the cache has read of it before included. draft: a model with the
    same tokenizer, or what one wrote: int64 [batch, ahead]. attention_mask [batch, tokens]: 0 where a row is padded, on
    the left. Returns the drafted tokens [batch, ahead]; none where the cache keeps everything.

    Raises ValueError, before the model reads anything, for another method's cache, a prompt of one token, rows that end
    in padding, and a draft of another tokenizer; NotImplementedError for models with recurrent states, which do not go
    back.
    """
    mask = checked_mask(ids, attention_mask)
    if ids.shape[1] < 2:
        raise ValueError("look_ahead reads a prompt but for its last token, and this one has no other: just generate")
    written = drafted(model, cache, ids, draft, mask)
    read_ahead(model, cache, ids, written, mask, keep_last=False)
    return written


def ahead_of(cache: Any) -> int:
    """How many tokens a draft writes for a cache. ValueError where it asks for none."""
    method = getattr(getattr(cache, "method", None), "method", None)
    if not isinstance(method, SpecKV) or not method.ahead:
        raise ValueError(
            f"a draft decides nothing for {getattr(cache, 'method', type(cache).__name__)}: build the cache with "
            '"speckv" and ahead above 0, or leave the draft out'
        )
    return 0 if cache.method.whole else method.ahead


def drafted(
    model: PreTrainedModel, cache: LongCache, ids: torch.Tensor, draft: Draft, mask: torch.Tensor
) -> torch.Tensor:
    """What `look_ahead` returns, on the model's device. Raises what it does."""
    ahead = ahead_of(cache)
    cache._progress.check()
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        raise NotImplementedError("this model's recurrent states do not go back to before what a draft wrote: ahead=0")
    if ids.shape[1] <= cache.get_seq_length():
        raise ValueError("all of the prompt is in the cache already: cache.reset(), or cache.crop(-1), and ask again")
    if isinstance(draft, torch.Tensor):
        if draft.shape != (ids.shape[0], ahead) and ahead:
            raise ValueError(f"drafted tokens are [batch, ahead] = {[ids.shape[0], ahead]}, got {list(draft.shape)}")
        return draft[:, :ahead].to(model.device)
    if not ahead:
        return torch.empty(ids.shape[0], 0, dtype=torch.long, device=model.device)
    memory = DynamicCache(config=draft.config.get_text_config(decoder=True))
    return write_on(draft, memory, ids, mask, ahead, vocabulary(model)).to(model.device)


@torch.no_grad()
def read_ahead(
    model: PreTrainedModel,
    cache: LongCache,
    ids: torch.Tensor,
    written: torch.Tensor,
    mask: torch.Tensor,
    keep_last: bool = True,
) -> torch.Tensor:
    """One pass over those of ids that the cache lacks and what was written after them, which is taken back, the
    prompt's last token too unless keep_last. Logits [batch, vocabulary] of that token."""
    behind = written.shape[1] + (not keep_last)
    new = torch.cat([ids[:, cache.get_seq_length() :].to(model.device), written], 1)
    whole = torch.cat([mask.to(model.device), torch.ones_like(written)], 1)
    with _taking_back(cache, behind):
        logits = model(
            new,
            **cache_argument(model, cache),
            use_cache=True,
            logits_to_keep=written.shape[1] + 1,
            **placed(whole, new.shape[1]),
        ).logits[:, 0]
        cache.crop(-behind)
    return logits


@contextmanager
def _taking_back(cache: LongCache, behind: int) -> Iterator[None]:
    """In here the last `behind` tokens of a pass can be taken back, and layers choose among those before them."""
    layers: list[Any] = list(cache.layers)
    recorded = [getattr(layer, "record_past", False) for layer in layers]
    for layer in layers:
        if isinstance(layer, SpecKVLayer):
            layer.ahead = behind
        elif not isinstance(layer, MemoryLayer):  # transformers' own
            layer.activate_past_recording()
    try:
        yield
    finally:
        for layer, was in zip(layers, recorded, strict=True):
            if isinstance(layer, SpecKVLayer):
                del layer.ahead
            elif not isinstance(layer, MemoryLayer):
                layer.record_past = was
