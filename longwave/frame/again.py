"""Reading twice: a model that has read a text repeats it, and every token is worth the most attention that it gets.

Source: KVzip, arXiv 2505.23416. A row at a time, a chunk at a time, the tokens follow the text once more, and attend to
all that is held of it. What a token of the chunk gets is its part of a softmax over sinks, chunk and the repeated
tokens alone; its score is the greatest of all query heads of its group and all repeated tokens, without a matrix of
them. The cache stays as it is: what layers are given meanwhile is forgotten, and those of transformers' own are copied.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from longwave.frame.argument import NAMES, cache_argument
from longwave.frame.attention import LogicalLength, own_arithmetic
from longwave.frame.hooks import Hooks
from longwave.frame.layer import MemoryLayer
from longwave.frame.observe import Repeat
from longwave.frame.standin import StandIn
from longwave.ops import mass
from longwave.ops.attention.reference import last_attention


@dataclass(frozen=True, eq=False)
class Given:
    """What a pass was given: token ids int64 [batch, tokens] or their embeddings [batch, tokens, hidden_size], and
    positions [..., batch, tokens] where anybody said them."""

    tokens: torch.Tensor
    positions: torch.Tensor | None

    def next_position(self, row: int) -> int | None:
        return None if self.positions is None else int(self.positions[..., row % self.positions.shape[-2], :].max()) + 1


class Reader(Hooks):
    """Hooks on a model's decoder, by which passes that layers wait for are read again as they end."""

    def __init__(self, model: PreTrainedModel, repeats: tuple[Repeat, ...]):
        decoder = model.get_decoder()
        embeddings: Any = model.get_input_embeddings()
        known = embeddings.weight.shape[0]
        for token in (token for repeat in repeats for token in repeat.ask):
            if token >= known:
                raise ValueError(f"token {token} of ask is none of this model's, which knows {known:,}")
        hooks = [
            decoder.register_forward_pre_hook(_begins, with_kwargs=True),
            decoder.register_forward_hook(_ends, with_kwargs=True, always_call=True),
        ]
        super().__init__(hooks)


def _arguments(decoder: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}


def _cache_of(given: Mapping[str, Any]) -> Any:
    """The cache of a pass, if its layers are to be read again."""
    cache = next((given[name] for name in NAMES if given.get(name) is not None), None)
    layers = getattr(cache, "layers", ())
    return cache if any(isinstance(layer, MemoryLayer) and layer.needs.again for layer in layers) else None


@torch.compiler.disable
def _begins(decoder: Any, args: Any, kwargs: Any) -> None:
    given = _arguments(decoder, args, kwargs)
    cache = _cache_of(given)
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if cache is not None and tokens is not None:
        cache._progress.given = Given(tokens, given.get("position_ids"))


@torch.compiler.disable
def _ends(decoder: Any, args: Any, kwargs: Any, out: Any) -> None:
    cache = _cache_of(_arguments(decoder, args, kwargs))
    if cache is None:
        return
    progress, given = cache._progress, cache._progress.given
    progress.given = None
    layers: list[MemoryLayer] = [layer for layer in cache.layers if isinstance(layer, MemoryLayer) and layer.waiting]
    if given is None or not layers or progress.broken or progress.reached != progress.last:
        return
    try:
        with torch.no_grad():
            for repeat in layers[0].needs.again:
                for row, new in enumerate(layers[0].waiting):
                    if new > 1:
                        _repeat(decoder, cache, repeat, row, new, given)
        for layer in layers:
            layer.waiting = []
            with own_arithmetic(layer.device.type):
                layer.conclude()
    except BaseException:
        progress.broken = True
        raise


def _repeat(decoder: Any, cache: Any, repeat: Repeat, row: int, new: int, given: Given) -> None:
    """Row `row` repeats the last `new` tokens that it has read."""
    first = next(layer for layer in cache.layers if isinstance(layer, MemoryLayer))
    own = given.tokens[row]
    own = own[-new:] if first._valid is None else own[first._valid[row].to(own.device)]
    ask = torch.tensor(repeat.ask, dtype=torch.long, device=own.device)
    if own.is_floating_point():
        ask = decoder.get_input_embeddings()(ask).to(own.dtype)
    padded = any(not isinstance(layer, MemoryLayer) for layer in cache.layers)  # they count columns
    columns = first.columns if padded else first.rows[row]
    position = given.next_position(row)
    for start in range(0, new, repeat.chunk):
        stop = min(start + repeat.chunk, new)
        tokens = torch.cat([ask, own[max(0, start - repeat.lead) : start], own[start:stop]])[None]
        layers = [
            Repeating(layer, row, columns, repeat, slice(start - new, stop - new))
            if isinstance(layer, MemoryLayer)
            else _row_of(layer, row)
            for layer in cache.layers
        ]
        mask = None
        if columns > first.rows[row]:
            mask = torch.ones(1, columns + tokens.shape[1], dtype=torch.long, device=own.device)
            mask[:, :columns] = cache.mask()[row]
        begin = first.columns if position is None else position  # unasked, models count columns
        decoder(
            **{"inputs_embeds" if own.is_floating_point() else "input_ids": tokens},
            attention_mask=mask,
            position_ids=begin + torch.arange(tokens.shape[1], device=own.device)[None],
            **cache_argument(decoder, Cache(layers=layers)),
            use_cache=True,
        )


def _row_of(layer: Any, row: int) -> Any:
    """A copy of a layer of transformers' own, of one row."""
    copied = copy.deepcopy(layer)
    copied.reorder_cache(torch.tensor([row]))
    return copied


class Repeating(StandIn):
    """What the model sees of one row of a memory layer while it repeats some of its last tokens."""

    def __init__(self, layer: MemoryLayer, row: int, columns: int, repeat: Repeat, last: slice):
        """last: the tokens that are repeated, counted from the row's end."""
        super().__init__()
        self.layer, self.row, self.columns, self.repeat = layer, row, columns, repeat
        near = layer.dense.lengths[row]  # of which these are the last
        self.last, self.chunk = last, slice(near + last.start, near + last.stop)

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return LogicalLength(self.columns + query_length), 0

    def forward(
        self,
        q: torch.Tensor,
        scaling: float,
        mask: object,  # of a plain pass
        module: Any = None,
        positions: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        layer = self.layer
        q, k, v = (x.detach().to(layer.dtype) for x in (q, *self.take()))
        out, group = torch.empty_like(q), q.shape[1] // k.shape[1]
        for heads, held_k, held_v in layer.by_heads(self.row):
            own = slice(heads.start * group, heads.stop * group)
            learned = None if sinks is None else sinks[own]
            out[:, own] = self._answer(q[:, own], heads, (held_k, held_v), (k[:, heads], v[:, heads]), scaling, learned)
        return out

    def _answer(
        self,
        q: torch.Tensor,
        heads: slice,
        held: tuple[torch.Tensor, torch.Tensor],
        new: tuple[torch.Tensor, torch.Tensor],
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Of some KV heads, over K and V that are held and new ones."""
        self._note(q, heads, new[0], held[0], scaling, sinks)
        k, v = (torch.cat(pair, 2) for pair in zip(held, new, strict=True))
        out = last_attention(q, k, v, scaling)
        if sinks is not None:
            seen = torch.arange(held[0].shape[2] + 1, k.shape[2] + 1, device=q.device)[None]
            alone = mass.log_sum_exp(q, k, scaling, seen)
            out = (out * torch.sigmoid(alone - sinks.to(alone.dtype)[:, None])[..., None]).to(out.dtype)
        return out

    def _note(
        self,
        q: torch.Tensor,
        heads: slice,
        k: torch.Tensor,
        held: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> None:
        """The most that each token of the chunk gets of q, into its column."""
        start, stop = held.shape[2] + self.last.start, held.shape[2] + self.last.stop
        chunk = held[:, :, start:stop]
        text = torch.cat([held[:, :, : min(self.repeat.sinks, start)], chunk], 2)
        after = torch.arange(1, k.shape[2] + 1, device=q.device)[None]
        lse = torch.logaddexp(mass.log_sum_exp(q, text, scaling, None), mass.log_sum_exp(q, k, scaling, after))
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        column = self.layer.dense.column(self.repeat.column)
        column[self.row, heads, self.chunk] = mass.peak(q, chunk, scaling, None, lse=lse)[0].to(column.dtype)
