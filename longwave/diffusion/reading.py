"""What the model says of a block: read whole, or with K and V of the tokens around it taken from a cache.

Attention in both directions makes K and V of every token depend on all of them, the masks too, so a cache is right for
the pass that filled it and an approximation after it (Fast-dLLM, arXiv 2505.22618). "prefix" keeps the tokens before a
block and reads the block and what follows; "dual" keeps both sides and reads the block alone. To attention the order of
keys is nothing, since they are rotated to their positions: so what is read again comes last, the cache records its past
and is cropped after every pass, as in assisted decoding, and any method can hold what stays.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.frame import LongCache, cache_argument

KEEPS = ("prefix", "dual")


class Reader:
    """Reads one block after the other of texts [batch, tokens], masks included.

    real bool [batch, tokens]: which are no padding, which comes first. shift: whether the logits at a position speak of
    the next token. cache: an empty one, None: everything is read in every pass. keep: as above.
    """

    def __init__(self, model: PreTrainedModel, real: torch.Tensor, shift: bool, cache: LongCache | None, keep: str):
        self.model, self.shift, self.cache, self.keep = model, int(shift), cache, keep
        self.positions = (real.cumsum(-1) - 1).clamp(min=0)
        self.real = None if bool(real.all()) else real
        self.passes = 0
        if cache is not None:
            if len(list(cache.memory_layers())) < len(cache.layers):
                raise NotImplementedError(
                    "some layers of this model attend to a window or keep a state, and what they hold of a text read "
                    "out of order is not known: leave cache out"
                )
            if keep == "dual" and any(layer.renumbers for layer in cache.memory_layers()):
                raise NotImplementedError(
                    f'{cache.method} reads keys at their numbers in the cache, where keep="dual" has what follows a '
                    'block before it: keep="prefix"'
                )
            self._record(cache)

    def plain(self, text: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits [batch, stop - start, vocabulary] of the tokens from start to stop, all of the text read and nothing
        kept."""
        columns = torch.arange(text.shape[1], device=text.device)
        return self._logits(text, columns, 0, start, stop)

    def whole(self, text: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The same, and a cache keeps what is around them."""
        assert self.cache is not None
        kept, again = self._sides(text.shape[1], start, stop)
        self.cache.reset()
        self._record(self.cache)
        return self._logits(text, torch.cat([kept, again]), 0, start, stop, taken_back=len(again))

    def again(self, text: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The same with what the last `whole` kept, which stays as it is."""
        kept, again = self._sides(text.shape[1], start, stop)
        return self._logits(text, torch.cat([kept, again]), len(kept), start, stop, taken_back=len(again))

    @staticmethod
    def _record(cache: LongCache) -> None:
        for layer in cache.layers:
            layer.activate_past_recording()
            if not layer.is_croppable:
                raise ValueError(
                    f"{cache.method} cannot take back what it has read, and a block is read many times: give "
                    "the budget as a fraction, or use another method"
                )

    def _sides(self, tokens: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns that are kept, and those that are read again: with the one whose logits speak of the first."""
        columns = torch.arange(tokens, device=self.positions.device)
        first, last = start - self.shift, tokens if self.keep == "prefix" else stop
        inside = (columns >= first) & (columns < last)
        return columns[~inside], columns[inside]

    def _logits(
        self, text: torch.Tensor, columns: torch.Tensor, known: int, start: int, stop: int, taken_back: int = 0
    ) -> torch.Tensor:
        """One pass over the columns after the `known` first of them, of which the last so many are taken back."""
        new = columns[known:]
        asked = torch.arange(start - self.shift, stop - self.shift, device=new.device)
        cached = self.cache is not None and taken_back > 0
        given: dict[str, Any] = cache_argument(self.model, self.cache) if cached else {}
        if self.real is not None:
            given["attention_mask"] = self.real[:, columns].long()
        logits = self.model(
            text[:, new],
            position_ids=self.positions[:, new],
            logits_to_keep=(new[None] == asked[:, None]).long().argmax(-1),  # where they stand among the new
            use_cache=cached,
            **given,
        ).logits
        if cached:
            self._take_back(taken_back)
        self.passes += 1
        return logits

    def _take_back(self, tokens: int) -> None:
        assert self.cache is not None
        try:
            self.cache.crop(-tokens)
        except ValueError as error:
            dual = "" if self.keep == "dual" else ', or keep="dual", which reads a block alone'
            raise ValueError(
                f"{tokens} tokens are read again in every pass of this block, and the cache's method keeps fewer as "
                f"they came: {error}. Give it a window of {tokens} or more{dual}"
            ) from error
