"""longcache: every token is kept, and attention reads a number of them that does not grow, at positions that do not.

Source: LongCache, later ReAttention, arXiv 2407.15176. Keys lie as they were before rotation. Queries look for the best
of them without positions, in every layer anew; what most of them want is read with its neighbours, between the first
tokens and the last ones, and all of it is rotated to places without gaps. So no position exceeds the `scope`, and
text of any length can be asked for what stands in it.

    scope = sinks + spans * span + window

As long as a row has no more tokens than that, all of them are read, and this is full attention. Of our own: votes are
counted row by row, a pass of few tokens chooses for each of them, and a long prompt is read in stretches by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.frame import Pass
from longwave.methods.base import CacheShape
from longwave.methods.scoped import Scoped, ScopedBound, ScopedLayer, at_places
from longwave.ops import mass, select
from longwave.ops.attention.reference import causal_attention, dense_attention, step_attention


@dataclass(frozen=True)
class ReAttention(Scoped):
    """Everything is kept; queries choose, without positions, a scope that stays finite (LongCache, ReAttention).

    sinks, window: first and last tokens, always read; the window ends with the tokens that ask. top: tokens that each
        query votes for in each of its heads. spans: of the tokens voted for, how many are read, with what stands around
        them, span tokens in all. chunk: tokens of a prompt that choose together. exact: every token may be voted for;
        False: of 128 that stand side by side only their best, which is less work on a GPU.

    It takes no budget, since all is held; 1 reads all.
    """

    name: ClassVar[str] = "longcache"
    uses: ClassVar[str] = "reads {} tokens at once (sinks + spans * span + window)"
    fewer: ClassVar[str] = "fewer spans, or a smaller window"

    sinks: int = 32
    window: int = 4096
    top: int = 4
    spans: int = 127
    span: int = 32
    chunk: int = 512
    exact: bool = True

    def __post_init__(self) -> None:
        whole("sinks", self.sinks, 0, "tokens")
        whole("top", self.top, 1, "tokens")
        whole("spans", self.spans, 0, "spans")
        whole("span", self.span, 1, "tokens")
        whole("chunk", self.chunk, 1, "tokens")
        whole("window", self.window, self.chunk, "tokens (those that choose together, chunk, lie in it)")
        if not isinstance(self.exact, bool):
            raise ValueError(f"exact is True or False, got {self.exact!r}")
        super().__post_init__()

    @property
    def scope(self) -> int:
        """Tokens that attention reads at most, and positions that it uses."""
        return self.sinks + self.spans * self.span + self.window

    @property
    def positions(self) -> int:
        return self.scope

    @property
    def plain(self) -> int:
        return self.scope

    def bound(self, shape: CacheShape, budget: float | None) -> ReAttentionBound:
        return ReAttentionBound(self, shape, budget)


@dataclass(frozen=True, eq=False)
class ReAttentionBound(ScopedBound):
    method: ReAttention

    def reads(self) -> str:
        m = self.method
        return f"{m.scope} tokens: {m.spans} spans of {m.span}, window={m.window}"

    def reading(self, index: int) -> ReAttentionLayer:
        return ReAttentionLayer(index, self)


class ReAttentionLayer(ScopedLayer):
    """Every pass rotates what it reads to places without gaps."""

    method: ReAttention

    def read(
        self,
        p: Pass,
        number: torch.Tensor,
        stop: torch.Tensor,
        longest: int,
        asks: torch.Tensor | None = None,
        square: bool = False,
    ) -> torch.Tensor:
        assert self.dense.k is not None
        keep = self._chosen(p, self.dense.k[:, :, :longest], stop, asks)
        index, count = select.places(keep, min(longest, self.method.scope))
        k, v = self.taken(index)
        k = at_places(p, k)
        place = (number - stop[:, None] + count[:, None]).clamp(min=0)  # what is read ends with the tokens that ask
        q = p.rotary.shift(p.module, p.q, p.known_positions(), place)
        if p.sinks is not None:
            p.lse = mass.log_sum_exp(q, k, p.scaling, place + 1)
        if square and longest <= self.method.scope:
            return causal_attention(q, k, v, p.scaling)
        attention = step_attention if q.shape[2] == 1 else dense_attention
        return attention(q, k, v, p.scaling, place + 1)

    def _chosen(self, p: Pass, k: torch.Tensor, stop: torch.Tensor, asks: torch.Tensor | None) -> torch.Tensor:
        """Which of the stored tokens a row reads: bool [batch, n of k]."""
        m, number, last = self.method, torch.arange(k.shape[2], device=stop.device), stop[:, None]
        keep = (number < m.sinks) | (number >= last - m.window) | (last <= m.scope)
        if m.spans and k.shape[2] > m.scope:
            q = p.rotary.unrotate(p.module, p.q, p.known_positions())
            begin, end = torch.full_like(stop, m.sinks), stop - m.window
            keep |= select.choose(q, k, begin, end, asks, top=m.top, spans=m.spans, span=m.span, exact=m.exact)
        return keep & (number < last)
