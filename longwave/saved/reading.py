"""A prompt that is read in chunks, and coded while it is read: at no time is all of it dense.

A chunk attends over the exact first tokens, the coded middle, and the dense rest: the chunk itself, at least `WINDOW`
tokens before it, and an open segment. Behind every chunk the segments that are full are coded, all layers of them
together, as a codec wants them. A pass decodes the middle of as many layers as the codec decodes together, when the
first of them attends, and forgets them when one of others does.
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
from longwave.frame import MemoryLayer, Needs, assemble, cache_argument, stored_dtype
from longwave.frame.observe import Pass
from longwave.ops import mass as attention_mass
from longwave.ops.attention.reference import dense_attention
from longwave.saved import container
from longwave.saved.coded import SINKS, WINDOW, Coder, Room, decode_all, ends_of, segment, segments
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
    middle = Middle(coder, ids[0], todo, Room(share_of(fraction, tokens, shape), tokens))
    cache = assemble(model, lambda index: ReadingLayer(index, needs, middle), needs, "dense, coded as it was read")
    middle.layers = list(cache.memory_layers())
    with torch.no_grad():
        for part in ids.to(model.device).split(chunk, 1):
            model(part, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
            middle.code()
    facts = facts_of(cache, model, shape, "coded", about) | {"coder": coder.fingerprint.hex(), "segment": coder.tokens}
    tensors = {"ids": ids}
    put_states(facts, tensors, beside(cache))
    tensors |= ends_of(cache, coder)
    for number, blob in enumerate(middle.blobs):
        tensors |= segment(0, number, blob)
    return container.write(path, facts, tensors)


class Middle:
    """The coded tokens of a row, of all its memory layers. todo: (start, stop) of every segment that there will be;
    blobs: of those that are coded. tokens: how many these are, from number SINKS of the row on."""

    layers: list[MemoryLayer]

    def __init__(self, coder: Coder, ids: torch.Tensor, todo: list[tuple[int, int]], room: Room):
        self.coder, self.ids, self.todo, self.room = coder, ids, todo, room
        self.blobs: list[Any] = []
        self.tokens = 0
        self._held: tuple[range, torch.Tensor, torch.Tensor] | None = None

    def code(self) -> None:
        """Code the segments that are full, but for the last WINDOW tokens, and have the layers forget these tokens."""
        self._held = None
        for start, stop in self.todo[len(self.blobs) :]:
            if stop + WINDOW > self.layers[0].rows[0]:
                return
            self.blobs.append(self.room.encode(self.layers, self.coder, self.ids[start:stop], 0, start, stop))
            for layer in self.layers:
                layer.dense.drop(SINKS, [stop - start])
            self.tokens += stop - start

    def of(self, layer: MemoryLayer, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [1, kv_heads, tokens, head_dim] of a layer, in the type of `like`."""
        position = self.layers.index(layer)
        if self._held is None or position not in self._held[0]:
            self._held = None
            span = max(1, getattr(self.coder, "group", 1))
            first = position // span * span
            own = range(first, min(first + span, len(self.layers)))
            k, v = (like.new_empty(len(own), self.tokens, like.shape[1], like.shape[3]) for _ in range(2))
            todo = self.todo[: len(self.blobs)]
            ks, vs = ([x[:, start - SINKS : stop - SINKS] for start, stop in todo] for x in (k, v))
            decode_all(self.coder, self.blobs, ks, vs, own, [start for start, _ in todo])
            self._held = own, k, v
        own, k, v = self._held
        k, v = (x[position - own[0]].transpose(0, 1)[None] for x in (k, v))
        return k, v


class ReadingLayer(MemoryLayer):
    """A layer whose middle lies coded with that of all others."""

    def __init__(self, index: int, needs: Needs, middle: Middle):
        super().__init__(index, needs)
        self.middle = middle

    def refuse(self, p: Pass) -> None:
        if p.mask is not None or not p.causal:
            raise NotImplementedError("a prompt that is coded as it is read is causal text: read it at once instead")

    def attend(self, p: Pass) -> torch.Tensor:
        if not self.middle.tokens:
            return super().attend(p)
        k, v = self._whole()
        return dense_attention(p.q, k, v, p.scaling, self._seen(p))

    def log_sum_exp(self, p: Pass) -> torch.Tensor | None:
        if not self.middle.tokens:
            return None
        return attention_mass.log_sum_exp(p.q, self._whole()[0], p.scaling, self._seen(p))

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all tokens, in order."""
        dense = self.dense.view()
        coded = self.middle.of(self, dense[0])
        parts = [(x[:, :, :SINKS], y, x[:, :, SINKS:]) for x, y in zip(dense, coded, strict=True)]
        return torch.cat(parts[0], 2), torch.cat(parts[1], 2)

    def _seen(self, p: Pass) -> torch.Tensor:
        """Columns that each query sees: all up to its own."""
        count = p.q.shape[2]
        return torch.arange(self.rows[0] - count + 1, self.rows[0] + 1, device=p.q.device)[None]

    def span(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        gone = self.middle.tokens if start >= SINKS else 0
        return super().span(row, start - gone, stop - gone)
