"""Measuring a profile: what heads, or channels, tolerate, on the very signal that inference compresses (rotated keys
and values of the middle, the method's own segments or period)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longwave.checks import whole
from longwave.frame import MemoryLayer, cache_argument, observing
from longwave.plan import probe, recall
from longwave.plan.fingerprint import fingerprint
from longwave.plan.profile import Profile
from longwave.shape import CacheShape, check_supported, context_limit


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


def channel_errors(layers: Sequence[MemoryLayer], method: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of every channel when all are compressed: K and V, each [layers, kv_heads, head_dim].

    `layers` are dense memory layers that have just read a window.
    """
    errors: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for layer in layers:
        k, v = layer.materialize()
        bound = method.smoothed(CacheShape((0,), (), k.shape[1], k.shape[3], k.dtype))
        memory = bound.layer(0)
        memory.write(k, v)
        memory.settle()
        end = method.sinks + bound.absorbed(k.shape[2])
        if end == method.sinks:
            raise ValueError(f"a window of {k.shape[2]} tokens is too short for {method.name} to compress anything")
        for side, exact, held in zip(errors, (k, v), memory.materialize(), strict=True):
            difference = (held - exact)[:, :, method.sinks : end].float()
            side.append(difference.square().mean(dim=(0, 2)).cpu())
    return torch.stack(errors[0]), torch.stack(errors[1])


def check_asked(
    model: PreTrainedModel,
    texts: Sequence[str],
    method: Any,
    tokens: int,
    windows: int,
    scored: int,
    probes: int,
    batch: int,
) -> None:
    """Raise what `calibrate` would raise of its arguments, as far as a model without weights can tell."""
    check_supported(model)
    if not texts or not any(text.strip() for text in texts):
        raise ValueError("there is no text to measure on")
    limit = context_limit(model)
    if limit is not None and tokens > limit:
        raise ValueError(f"windows of {tokens} tokens exceed the model's context of {limit}")
    if windows < len(texts):
        raise ValueError(f"{len(texts)} texts need at least as many windows, got {windows}")
    for name, value in (("batch", batch), ("probes", probes), ("scored", scored)):
        whole(name, value, 1)
    if hasattr(method, "page") and tokens - scored < 2:
        raise ValueError(f"of {tokens} tokens a window cannot have {scored} scored: some must be left to compress")


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    method: Any,
    tokens: int = 3072,
    windows: int = 9,
    scored: int = 256,
    probes: int = 8,
    batch: int = 1,
    model_id: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Measure `method` (fourier or fourier-paper, with options) on `windows` windows of `tokens` tokens of `texts`.

    fourier: what every way to store a head costs (probe.py). A third of the windows have facts hidden in them; the last
    `scored` tokens of each are scored, by `probes` backward passes. fourier-paper: the error of every channel.
    batch: windows held at once. progress gets parts done and in all.
    """
    check_asked(model, texts, method, tokens, windows, scored, probes, batch)
    shape = CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)
    about = {
        "id": model_id or getattr(model.config, "_name_or_path", ""),
        "fingerprint": fingerprint(model, shape.memory_layers),
    }
    options = {"name": method.name, **{option.name: getattr(method, option.name) for option in fields(method)}}
    text: dict[str, Any] = {"sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
    if hasattr(method, "page"):
        asked = windows // 3
        rows = recall.windows(tokenizer, texts, tokens - scored - 1, scored, windows - asked, asked)
        found = probe.measure(model, rows, method, probes, batch=batch, progress=progress)
        text |= {"tokens": rows.ids.numel(), "windows": len(rows.ids)}
        return _as_kept(Profile(about, options, text, sensitivity=found))
    batches = windows_of(tokenizer, texts, tokens, windows)
    sums: list[torch.Tensor] = []
    for done, ids in enumerate(batches):
        progress(done, len(batches))
        memory = observing(model)
        with torch.no_grad():
            model(ids.to(model.device), **cache_argument(model, memory), use_cache=True, logits_to_keep=1)
            errors = channel_errors(list(memory.memory_layers()), method)
        sums = [total + error for total, error in zip(sums, errors, strict=True)] if sums else list(errors)
    progress(len(batches), len(batches))
    k, v = (total / len(batches) for total in sums)
    text |= {"tokens": sum(ids.shape[1] for ids in batches), "windows": len(batches)}
    return _as_kept(Profile(about, options, text, k, v))


def _as_kept(profile: Profile) -> Profile:
    """As its file will hold it, so that who measured plans like those who read the file."""
    return Profile.from_dict(profile.as_dict())
