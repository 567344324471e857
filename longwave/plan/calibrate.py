"""Measuring a profile: what channels and heads tolerate, on the very signal that inference compresses (rotated keys and
values of the middle, the method's own segments or period, its own gain)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longwave.frame import MemoryLayer, observing
from longwave.plan import recall, sensitivity
from longwave.plan.profile import Profile, signature
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


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    method: Any,
    tokens: int = 3072,
    windows: int = 8,
    scored: int = 128,
    plan: bool | None = None,
    batch: int = 8,
    partial: Path | None = None,
    model_id: str = "",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Measure `method` (fourier or fourier-paper, with their options) on windows of `tokens` tokens of `texts`: channel
    errors, and what a plan needs.

    A plan is measured on `windows` windows, two thirds of them running text and one third with facts hidden in it; the
    last `scored` tokens of each are what is scored. plan: None measures it where the method plans. batch: windows held
    at once. partial: where finished parts are kept until the end, so that a killed run goes on. progress gets parts
    done and in all.
    """
    check_supported(model)
    plans = hasattr(method, "page")
    plan = plans if plan is None else plan
    if plan and not plans:
        raise ValueError("one period has no plan: measure its channels alone (plan=False)")
    if not texts or not any(text.strip() for text in texts):
        raise ValueError("there is no text to measure on")
    limit = context_limit(model)
    if limit is not None and tokens > limit:
        raise ValueError(f"windows of {tokens} tokens exceed the model's context of {limit}")
    if windows < len(texts):
        raise ValueError(f"{len(texts)} texts need at least as many windows, got {windows}")
    if plan and (scored < 1 or tokens - scored < 1):
        raise ValueError(f"of {tokens} tokens a window cannot have {scored} scored: some must be left to compress")
    if batch < 1:
        raise ValueError(f"batch is a whole number of windows, at least 1; got {batch}")
    about = {"id": model_id or getattr(model.config, "_name_or_path", ""), "signature": signature(model)}
    batches = windows_of(tokenizer, texts, tokens, windows)
    rows = None
    if plan:
        asked = windows // 3
        rows = recall.windows(tokenizer, texts, tokens - scored - 1, scored, windows - asked, asked, seed)
    parts = len(batches) + (sensitivity.parts(model, rows, batch) if rows is not None else 0)
    sums: list[torch.Tensor] = []
    for done, ids in enumerate(batches):
        progress(done, parts)
        memory = observing(model)
        model(ids.to(model.device), past_key_values=memory, use_cache=True, logits_to_keep=1)
        errors = channel_errors(list(memory.memory_layers()), method)
        sums = [total + error for total, error in zip(sums, errors, strict=True)] if sums else list(errors)
    found = None
    if rows is not None:
        found = sensitivity.measure(
            model, rows, method, batch, partial, lambda done, _: progress(len(batches) + done, parts)
        )
    progress(parts, parts)
    options = {"name": method.name, **{option.name: getattr(method, option.name) for option in fields(method)}}
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
        sensitivity=found,
    )
