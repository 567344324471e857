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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from longwave.checks import whole
from longwave.frame import MemoryLayer, Pass
from longwave.methods.base import Bound, CacheShape
from longwave.methods.scoped import Scoped, ScopedBound, ScopedLayer, at_places
from longwave.methods.scoped_pages import PagedScopedBound, PagedScopedLayer, bind_pages
from longwave.methods.segmented import Segmented, pages_of
from longwave.ops import mass, select
from longwave.ops.ahead import Ahead
from longwave.ops.attention.reference import causal_attention, dense_attention, step_attention
from longwave.ops.pieces import Coming, Made, fetched, on_its_way
from longwave.plan.profile import Profile
from longwave.store.mapped import MappedTokens
from longwave.store.tokens import capacity


@dataclass(frozen=True)
class ReAttention(Scoped):
    """Everything is kept; queries choose, without positions, a scope that stays finite (LongCache, ReAttention).

    sinks, window: first and last tokens, always read; the window ends with the tokens that ask. top: tokens that each
        query votes for in each of its heads. spans: of the tokens voted for, how many are read, with what stands around
        them, span tokens in all. chunk: tokens of a prompt that choose together. exact: every token may be voted for;
        False: of 128 that stand side by side only their best, which is less work on a GPU. store: a method of pages, by
        name or with options, that what leaves the window goes into; the budget is that of the pages then.

    Without store it takes no budget, since all is held; 1 reads all.
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
    store: Segmented | str | None = None

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
        if self.store is not None:
            object.__setattr__(self, "store", pages_of(self.store, self.name))
            if self.host:
                raise ValueError(f"pages lie on the device: leave store or host={self.host!r} out")

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

    @property
    def words(self) -> str:
        """What is read."""
        return f"{self.scope} tokens: {self.spans} spans of {self.span}, window={self.window}"

    def bound(self, shape: CacheShape, budget: float | None) -> ReAttentionBound:
        return ReAttentionBound(self, shape, budget)

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> Bound:
        if not isinstance(self.store, Segmented):
            return super().bind(shape, profile, budget)
        inner = bind_pages(self, self.store, shape, budget)
        return PagedReAttentionBound(self, shape, budget, inner=inner)

    def fits_budget(self) -> bool:
        return isinstance(self.store, Segmented) and self.store.fits_budget()

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        store = self.store
        return store.unmeasured().least_budget(shape) if isinstance(store, Segmented) else 0.0


@dataclass(frozen=True, eq=False)
class ReAttentionBound(ScopedBound):
    method: ReAttention

    def reads(self) -> str:
        return self.method.words

    def reading(self, index: int) -> ReAttentionLayer:
        return ReAttentionLayer(index, self)

    def brings(self, tokens: int) -> int:
        """What is read, and keys: a piece that is scored, the next one, and the next layer's first."""
        keys = min(tokens, 2 * select.PIECE) + min(tokens, select.PIECE)
        return (2 * capacity(min(tokens, self.method.scope)) + keys) * self.shape.token_bytes // 2


class ReAttentionLayer(ScopedLayer):
    """Every pass rotates what it reads to places without gaps. All keys are scored, whatever is chosen: where they lie
    elsewhere, those of the next layer are asked for while this one goes on."""

    method: ReAttention
    _peers: Sequence[Any] = ()

    def join(self, peers: list[MemoryLayer]) -> None:
        super().join(peers)
        # one list, or a copy of a cache would go from layer to layer, as deep as there are any
        self._peers = peers if peers[0] is self else peers[0]._peers  # type: ignore[attr-defined]

    def _clear(self) -> None:
        super()._clear()
        self._coming: Ahead | None = None  # of the stored keys the first ones, between the layer before and this one

    def expect(self) -> None:
        """Stored keys are scored soon. Those of the pass that runs are not there yet, and no row may have one of them
        among what is fetched."""
        there = min(self.dense.lengths, default=0)
        if not there or not isinstance(self.dense, MappedTokens):
            return
        self.dense.expect(there)
        k = next(self.dense.tensors())
        if self._coming is None and fetched(k, self.device):
            self._coming = on_its_way(k[:, :, : min(there, select.PIECE)], self.device)

    def stored_keys(self, tokens: int) -> torch.Tensor | Made | Coming:
        keys, coming, self._coming = super().stored_keys(tokens), self._coming, None
        return keys if coming is None else Coming(keys, coming)  # type: ignore[arg-type]

    def read(
        self,
        p: Pass,
        number: torch.Tensor,
        stop: torch.Tensor,
        longest: int,
        asks: torch.Tensor | None = None,
        square: bool = False,
    ) -> torch.Tensor:
        keep = self._chosen(p, longest, stop, asks)
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

    def _chosen(self, p: Pass, longest: int, stop: torch.Tensor, asks: torch.Tensor | None) -> torch.Tensor:
        """Which of the stored tokens a row reads: bool [batch, longest]."""
        m, number, last = self.method, torch.arange(longest, device=stop.device), stop[:, None]
        keep = (number < m.sinks) | (number >= last - m.window) | (last <= m.scope)
        if m.spans and longest > m.scope:
            q = p.rotary.unrotate(p.module, p.q, p.known_positions())
            begin, end = torch.full_like(stop, m.sinks), stop - m.window
            options = dict(top=m.top, spans=m.spans, span=m.span, exact=m.exact)
            keys = self.stored_keys(longest)
            if longest == max(self.rows):  # the last stretch of the pass
                for layer in [layer for layer in self._peers if layer.index > self.index][:1]:
                    layer.expect()
            keep |= select.choose(q, keys, begin, end, asks, **options)  # type: ignore[arg-type]
        return keep & (number < last)


@dataclass(frozen=True, eq=False)
class PagedReAttentionBound(PagedScopedBound):
    method: ReAttention

    def __str__(self) -> str:
        return f"{self.method.name}(reads {self.method.words}, in {self.inner})"

    def layer(self, index: int) -> PagedReAttentionLayer:
        return PagedReAttentionLayer(index, self)


class PagedReAttentionLayer(ReAttentionLayer, PagedScopedLayer):
    """The same over pages."""
