"""attention_matching: of every head some tokens stay, with a bias and a value that were fitted to answer as all did.

Source: attention matching, arXiv 2602.16284, with the keys of highest root mean square of attention. What is fitted to
whom stands in ops/match.py. Reference queries are those of the prompt, turned to later positions: a query close by is
no model of a later one. Budgets are equal among heads. In the paper one block is compacted once; here the middle is
compacted again as it grows, every 64 steps, biases and values of before included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.frame import MemoryLayer, Needs, Pass, Step
from longwave.methods.evicting import Evicting, EvictingBound, Held
from longwave.methods.evicting_layer import EvictingLayer
from longwave.methods.held import evictable
from longwave.methods.segmented import BESIDE
from longwave.ops import match
from longwave.ops.attention.reference import group_heads


@dataclass(frozen=True)
class AttentionMatching(Evicting):
    """Tokens with a bias and a value fitted to what the whole middle answered (attention matching).

    queries: how many are asked, of the last `queries` x `stride` tokens. later: whether they are turned to later
    positions, where the model's rotation can be undone. ridge: how much the fit is drawn to the tokens as they are, of
    the mean square of a query's attention.
    """

    name: ClassVar[str] = "attention_matching"
    every: ClassVar[int] = 64
    folds: ClassVar[bool] = True

    queries: int = 64
    stride: int = 16
    later: bool = True
    ridge: float = 0.1

    def __post_init__(self) -> None:
        whole("queries", self.queries, 1, "tokens")
        whole("stride", self.stride, 1, "tokens")
        if not isinstance(self.later, bool):
            raise ValueError(f"later is True or False, got {self.later!r}")
        if isinstance(self.ridge, bool) or not isinstance(self.ridge, (int, float)) or not 1e-6 <= self.ridge < 1e6:
            raise ValueError(f"ridge is a weight from 1e-6 on (32 bits solve no less), got {self.ridge!r}")
        super().__post_init__()
        if self.store is not None:
            raise ValueError("attention_matching gives every token a bias, and pages have none: leave store out")

    def needs(self) -> Needs:
        return super().needs() | Needs(queries=self.queries, every=self.stride, shifts=self.later, bias=True)

    @property
    def bound(self) -> type[MatchingBound]:
        return MatchingBound

    def score(self, held: Held) -> torch.Tensor:
        score = torch.zeros_like(held.columns["bias"])
        for row, head, q, k, _, bias in self.heads(held):
            score[row, head, : len(k)] = match.shares(q, k, bias, held.scaling).square().mean(0).sqrt()
        return score

    def fit(self, held: Held, gone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values as held.v and biases [batch, kv_heads, n] once the tokens gone, bool alike, have left."""
        values, biases = held.v.clone(), held.columns["bias"].clone()
        middle = evictable(self, held, held.lengths)
        for row, head, q, k, v, bias in self.heads(held):
            if not bool(gone[row].any()):
                continue
            own = middle[row, 0, : len(k)]
            fitted, raised = match.match(q, k, v, bias, held.scaling, own, own & ~gone[row, head, : len(k)], self.ridge)
            values[row, head, : len(k)], biases[row, head, : len(k)] = fitted.to(values.dtype), raised.to(biases.dtype)
        return values, biases

    def heads(self, held: Held) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of every row and KV head, in float32 or float64: its reference queries [R, D], K and V [n, D] and biases [n].
        A row that asked nothing has none."""
        if held.queries is None or held.queries.q is None:  # written without a pass
            return
        wide = torch.float64 if held.k.dtype == torch.float64 else torch.float32
        asked, sees = held.queries.later(held.rotary if self.later else None, held.index)
        for row, length in enumerate(held.lengths.tolist()):
            known = sees[row] > 0
            if not bool(known.any()):
                continue
            own = group_heads(asked[row : row + 1, :, known], held.k.shape[1])[0].to(wide)
            for head, q in enumerate(own):
                k, v, bias = (x[row, head, :length].to(wide) for x in (held.k, held.v, held.columns["bias"]))
                yield row, head, q, k, v, bias


class MatchingBound(EvictingBound):
    def layer(self, index: int) -> MemoryLayer:
        return super().layer(index) if self.whole else MatchingLayer(index, self)


class MatchingLayer(EvictingLayer):
    """Tokens whose scores are raised by their bias."""

    def fold(self, held: Held, gone: torch.Tensor, most: int) -> None:
        values, biases = self.bound.method.fit(held, gone)
        self.dense.set_values(values)
        self.dense.set_column("bias", biases)

    @contextmanager
    def _raised(self, p: Pass) -> Iterator[None]:
        """In here keys have their bias in further channels, in two parts since 16 bits would round it, queries ones.

        Values are as wide, and so is what is answered.
        """
        k, v, q = self.dense.k, self.dense.v, p.q
        assert k is not None
        assert v is not None
        bias = self.dense.columns["bias"].to(torch.promote_types(k.dtype, torch.float32)) / p.scaling
        high = bias.to(k.dtype)
        parts = torch.stack([high, (bias - high).to(k.dtype)], -1)
        self.dense.k = torch.cat([k, parts, k.new_zeros(*k.shape[:3], BESIDE - 2)], -1)
        self.dense.v = torch.cat([v, v.new_zeros(*v.shape[:3], BESIDE)], -1)
        p.q = torch.cat([q, q.new_ones(*q.shape[:3], 2), q.new_zeros(*q.shape[:3], BESIDE - 2)], -1)
        try:
            yield
        finally:
            self.dense.k, self.dense.v, p.q = k, v, q

    def attend(self, p: Pass) -> torch.Tensor:
        if not any(self._evicted):  # no token has a bias yet
            return super().attend(p)
        with self._raised(p):
            out = super().attend(p)
        return out[..., : p.q.shape[3]]

    def lse(self, p: Pass) -> torch.Tensor:
        with self._raised(p):
            return super().lse(p)

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        with self._raised(p):
            out = super().attend_step(p, step)
        return out[..., : p.q.shape[3]]
