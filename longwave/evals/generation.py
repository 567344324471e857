"""Generating as a protocol says it, whatever settings a model comes with, and where its answers end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Leave the model's own generation settings out: a repetition penalty, say, forbids copying from the prompt, which
    `do_sample=False` does not switch off."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The token ids that end an answer: the model's own, and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
