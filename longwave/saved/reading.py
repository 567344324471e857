"""A prompt that is read in chunks, and coded while it is read: at no time is all of it dense.

A chunk attends over the exact first tokens, the coded middle, and the dense rest: the chunk itself, at least `WINDOW`
tokens before it, and an open segment. Behind every chunk the segments that are full are coded, all layers of them
together, as files have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.budget import parse_budget
from longwave.checks import whole
from longwave.codec import codec_for
from longwave.codec.coder import Coder, Room
from longwave.codec.layer import CodedLayer
from longwave.codec.middle import Part
from longwave.frame import Needs, assemble, cache_argument, stored_dtype
from longwave.saved import container
from longwave.saved.coded import ends_of, segment, segments
from longwave.saved.saving import beside, coder_at, facts_of, put_states, share_of
from longwave.shape import CacheShape, check_supported


def read_coded(
    model: PreTrainedModel,
    ids: torch.Tensor,
    path: str | Path,
    *,
    size: float | str = 0.1,
    chunk: int = 2048,
    coder: Coder | None = None,
    needs: Needs | None = None,
    tokenizer: Any = None,
    about: Mapping[str, Any] | None = None,
) -> int:
    """Read a prompt and write it as `save(size=)` does, without ever holding it whole; the file's bytes.

    ids: integers [1, n], all of it real. size: a fraction of what the middle takes in 16 bits. chunk: tokens of a pass.
    needs: what is to be remembered of the last queries, for a method that asks for them (`cache.method.needs`). coder,
    tokenizer, about: as in `save`.

    Later chunks read what was coded of the earlier ones, so it is less exact than reading at once and saving. Raises
    ValueError for arguments that do not fit, before anything is read, and what a model raises that cannot go on in
    chunks. The file is written at the end, whole or not at all.
    """
    container.check_place(path := Path(path))
    whole("chunk", chunk, 1, "tokens")
    fraction, _ = parse_budget(size)
    if fraction is None:
        raise ValueError(
            f"size is a fraction here, such as 0.1: what a file takes beside is not known yet; got {size!r}"
        )
    if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1] or ids.is_floating_point():
        raise ValueError(f"ids are whole numbers [1, n], one row without padding; got {list(ids.shape)} of {ids.dtype}")
    needs = needs or Needs()
    if needs.in_passing:
        raise ValueError("of a prompt that is coded nothing but queries is remembered: needs=Needs(queries=...)")
    shape = CacheShape.of(check_supported(model), stored_dtype(model.dtype, model.device.type))
    coder = coder_at(codec_for(model, tokenizer), model.device, fraction) if coder is None else coder
    ids = ids.detach().long().cpu()
    todo = [(start, stop) for *_, start, stop in segments([ids.shape[1]], coder.tokens)]
    tokens = sum(stop - start for start, stop in todo)
    layers = shape.memory_layers
    part = Part(range(len(layers)), coder, Room(share_of(fraction, tokens, shape), tokens))  # as files have them
    cache = assemble(
        model,
        lambda index: CodedLayer(index, layers.index(index), [part], needs, ahead=False),
        needs | Needs(ids=True),
        "dense, coded as it was read",
    )
    with torch.no_grad():
        for some in ids.to(model.device).split(chunk, 1):
            model(some, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    first = next(cache.memory_layers())
    assert isinstance(first, CodedLayer)
    assert first.middle is not None
    middle = first.middle.parts[0]
    first.middle.code(middle, rest=True)
    facts = facts_of(cache, model, shape, "coded", about) | {"coder": coder.fingerprint.hex(), "segment": coder.tokens}
    tensors = {"ids": ids}
    put_states(facts, tensors, beside(cache))
    tensors |= ends_of(cache, coder)
    tensors |= {segment(0, number): blob for number, blob in enumerate(middle.blobs)}
    return container.write(path, facts, tensors)
