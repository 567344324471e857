"""Measuring a profile: how much of every channel its smooth approximation misses, on the very signal that inference
compresses (rotated keys and values of the middle, the method's own segments or period, its own gain)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longwave.build import cache, check_supported
from longwave.methods import Fourier
from longwave.methods.base import CacheShape
from longwave.profile import Profile, signature


def windows_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int, count: int) -> list[torch.Tensor]:
    """`count` windows of `tokens` ids [1, tokens], shared evenly between the texts and spread evenly over each."""
    windows = []
    for i, text in enumerate(texts):
        share = count // len(texts) + (i < count % len(texts))
        if not share:
            continue
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        if ids.shape[1] < tokens:
            raise ValueError(
                f"text number {i + 1} has {ids.shape[1]} tokens, fewer than one window of {tokens}: "
                "give longer text or a smaller window"
            )
        room = ids.shape[1] - tokens
        share = min(share, room // tokens + 1)
        starts = [room * n // max(1, share - 1) for n in range(share)]
        windows += [ids[:, start : start + tokens] for start in starts]
    return windows


def channel_errors(layers: Sequence[Any], method: Fourier) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of every channel when all are compressed: K and V, each [layers, kv_heads, head_dim].

    `layers` are dense memory layers that have just read a window.
    """
    errors: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for layer in layers:
        k, v = layer.materialize()
        none = torch.zeros(k.shape[1], k.shape[3], dtype=torch.bool)
        bound = replace(method, keep=0.0, _kept=((none, none),))
        shape = CacheShape((0,), (), k.shape[1], k.shape[3], k.dtype)
        memory = bound.layer(0, shape)
        memory.write(k, v)
        memory.settle()
        end = method.sinks + bound.absorbed(k.shape[2])
        if end == method.sinks:
            raise ValueError(f"a window of {k.shape[2]} tokens is too short for {method} to compress anything")
        for side, exact, held in zip(errors, (k, v), memory.materialize(), strict=True):
            difference = (held - exact)[:, :, method.sinks : end].float()
            side.append(difference.square().mean(dim=(0, 2)).cpu())
    return torch.stack(errors[0]), torch.stack(errors[1])


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    method: Fourier | None = None,
    tokens: int = 4096,
    windows: int = 8,
    model_id: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Measure `method`'s channel errors on `windows` windows of `tokens` tokens of `texts`."""
    method = method or Fourier()
    config = check_supported(model)
    if not texts or not any(text.strip() for text in texts):
        raise ValueError("there is no text to measure on")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"windows of {tokens} tokens exceed the model's context of {limit}")
    if windows < len(texts):
        raise ValueError(f"{len(texts)} texts need at least as many windows, got {windows}")
    about = {"id": model_id or getattr(model.config, "_name_or_path", ""), "signature": signature(model)}
    batches = windows_of(tokenizer, texts, tokens, windows)
    sums: list[torch.Tensor] = []
    for done, ids in enumerate(batches):
        progress(done, len(batches))
        memory = cache(model, "dense")
        model(ids.to(model.device), past_key_values=memory, use_cache=True, logits_to_keep=1)
        errors = channel_errors(list(memory.memory_layers()), method)
        sums = [total + error for total, error in zip(sums, errors, strict=True)] if sums else list(errors)
    progress(len(batches), len(batches))
    options = {
        name: getattr(method, name) for name in ("basis", "states", "segment", "sinks", "window", "gain", "reserve")
    }
    return Profile(
        model=about,
        method=options,
        text={
            "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
            "tokens": sum(ids.shape[1] for ids in batches),
            "windows": len(batches),
        },
        k_error=sums[0] / len(batches),
        v_error=sums[1] / len(batches),
    )
