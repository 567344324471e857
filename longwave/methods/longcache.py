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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from longwave.checks import whole
from longwave.frame import MemoryLayer, Needs, Pass, Step
from longwave.methods.base import Bound, CacheShape, Method
from longwave.ops import mass, select
from longwave.ops.attention.reference import causal_attention, dense_attention, step_attention
from longwave.plan.profile import Profile
from longwave.shape import context_limit
from longwave.store.tokens import capacity


@dataclass(frozen=True)
class ReAttention(Method):
    """Everything is kept; queries choose, without positions, a scope that stays finite (LongCache, ReAttention).

    sinks, window: first and last tokens, always read; the window ends with the tokens that ask. top: tokens that each
        query votes for in each of its heads. spans: of the tokens voted for, how many are read, with what stands around
        them, span tokens in all. chunk: tokens of a prompt that choose together. exact: every token may be voted for;
        False: of 128 that stand side by side only their best, which is less work on a GPU.

    It takes no budget, since all is held; 1 reads all.
    """

    name: ClassVar[str] = "longcache"
    learns: ClassVar[bool] = True
    alone: ClassVar[int] = 16  # tokens of a row that choose one by one, as steps do, where a pass brings no more

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

    @property
    def scope(self) -> int:
        """Tokens that attention reads at most, and positions that it uses."""
        return self.sinks + self.spans * self.span + self.window

    def known(self, model: PreTrainedModel, shape: CacheShape, tokenizer: Any) -> Method:
        limit = context_limit(model)
        if limit is not None and self.scope > limit:
            raise ValueError(
                f"longcache reads {self.scope:,} tokens at once (sinks + spans * span + window), and this model knows "
                f"{limit:,} positions: give fewer spans, or a smaller window"
            )
        return self

    def fits_budget(self) -> bool:
        return False  # whatever it is, all is held

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> ReAttentionBound:
        if budget is not None and budget < 1:
            raise ValueError(
                f"longcache keeps everything, so its budget is 1; got {budget}. What is read of it is a number of "
                "tokens: sinks, window, and spans of span tokens"
            )
        return ReAttentionBound(self, shape, budget)


@dataclass(frozen=True, eq=False)
class ReAttentionBound(Bound):
    method: ReAttention

    @property
    def whole(self) -> bool:
        """Whether all is read: then everything is dense."""
        return self.budget is not None

    @property
    def needs(self) -> Needs:
        return Needs(unrotated=not self.whole)

    @property
    def reads_exactly(self) -> bool:
        return self.whole

    def __str__(self) -> str:
        m = self.method
        reads = "everything" if self.whole else f"{m.scope} tokens: {m.spans} spans of {m.span}, window={m.window}"
        return f"longcache(reads {reads})"

    def layer(self, index: int) -> MemoryLayer:
        return MemoryLayer(index) if self.whole else ReAttentionLayer(index, self)

    def layer_bytes(self, index: int, tokens: int) -> int:
        return capacity(tokens) * self.shape.token_bytes


class ReAttentionLayer(MemoryLayer):
    """All tokens dense, their keys un-rotated; every pass rotates what it reads to places without gaps."""

    def __init__(self, index: int, bound: ReAttentionBound):
        super().__init__(index, bound.needs)
        self.bound, self.method = bound, bound.method

    def refuse(self, p: Pass) -> None:
        if p.causal and p.mask is None:
            return
        new = [p.q.shape[2]] * self.batch_size if p.valid is None else p.valid.sum(-1).tolist()
        longest = max(row + more for row, more in zip(self.rows, new, strict=True))
        if longest > self.method.scope:
            what = "a 4D attention mask" if p.causal else "is_causal=False"
            raise NotImplementedError(
                f"{what} goes over tokens that are not read: of {longest:,} longcache reads {self.method.scope:,}. "
                "Pass a 2D mask and leave is_causal out"
            )

    def arrive(self, p: Pass) -> None:
        p.k = p.unrotated()

    def _adopt(self, source: MemoryLayer) -> None:
        if max(source.rows) > self.method.scope:
            raise ValueError(
                f"longcache reads a prompt of more than {self.method.scope:,} tokens otherwise than a dense cache "
                "does, so it cannot take over what that has read: let the model read the prompt into it"
            )
        super()._adopt(source)

    # attention

    def attend(self, p: Pass) -> torch.Tensor:
        before = torch.tensor(self._before, device=p.q.device)[:, None]
        if max(self.dense.lengths) > self.method.scope:
            return self._attend_in_stretches(p, before)
        real = torch.ones_like(p.q[:, 0, :, 0], dtype=torch.long) if p.valid is None else p.valid.long()
        place = before + (real.cumsum(-1) - 1).clamp(min=0)
        turned = replace(p, q=p.rotary.shift(p.module, p.q, p.known_positions(), place))
        with self._turned(p):
            out = super().attend(turned)
            if p.sinks is not None:
                p.lse = super().lse(turned)
        return out

    @contextmanager
    def _turned(self, p: Pass) -> Iterator[None]:
        """In here the stored keys are rotated to their places in the row."""
        stored = self.dense.k
        assert stored is not None
        self.dense.k = _at_places(p, stored)
        try:
            yield
        finally:
            self.dense.k = stored

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """How a row reads the tokens from start to stop that a pass brings: those that fit the scope at once, then
        borders at multiples of the chunk, wherever passes end."""
        step = 1 if stop - start <= self.method.alone else self.method.chunk
        border = self.method.scope // step * step
        while start < stop:
            border = max(border, (start // step + 1) * step)
            yield start, min(border, stop)
            start = border

    def _attend_in_stretches(self, p: Pass, before: torch.Tensor) -> torch.Tensor:
        """`attend`, by stretches of each row; the first ones of all rows together, then the second ones."""
        device, tokens = p.q.device, p.q.shape[2]
        rows = [list(self.stretches(*ends)) for ends in zip(self._before, self.dense.lengths, strict=True)]
        order = torch.arange(tokens, device=device).expand(p.q.shape[0], -1)  # columns of a row's real tokens
        if p.valid is not None:
            order = torch.argsort((~p.valid).byte(), dim=-1, stable=True)
        out = torch.zeros_like(p.q)
        if p.sinks is not None:
            wide = torch.float64 if p.q.dtype == torch.float64 else torch.float32
            p.lse = torch.zeros(p.q.shape[:3], dtype=wide, device=device)
        for turn in range(max(map(len, rows))):
            ends = [row[turn] if turn < len(row) else (0, 0) for row in rows]
            start, stop = torch.tensor(ends, device=device).T
            rank = torch.arange(max(b - a for a, b in ends), device=device)
            asks = rank < (stop - start)[:, None]
            column = order.gather(1, (start[:, None] - before + rank).clamp(0, tokens - 1))
            there = column[:, None, :, None].expand(*p.q.shape[:2], -1, p.q.shape[3])
            part = replace(p, q=p.q.gather(2, there), positions=p.known_positions().gather(1, column))
            square = len(set(ends)) == 1 and not ends[0][0]
            answer = self._read(part, start[:, None] + rank, stop, max(b for _, b in ends), asks, square)
            row, number = asks.nonzero(as_tuple=True)
            out[row, :, column[row, number]] = answer[row, :, number]
            if p.lse is not None and part.lse is not None:
                p.lse[row, :, column[row, number]] = part.lse[row, :, number]
        return out

    def _read(
        self,
        p: Pass,
        number: torch.Tensor,
        stop: torch.Tensor,
        longest: int,
        asks: torch.Tensor | None = None,
        square: bool = False,
    ) -> torch.Tensor:
        """Answers to queries that choose together: p.q of row b's tokens number[b], int64 [batch, queries], of which
        the first stop[b] <= longest are seen. asks: which are there. square: all tokens of all rows ask.

        No shape depends on what the device knows.
        """
        k, v = (x[:, :, :longest] for x in self.dense.tensors())
        keep = self._chosen(p, k, stop, asks)
        index, count = select.places(keep, min(longest, self.method.scope))
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        k, v = (x[rows, :, index].transpose(1, 2) for x in (k, v))  # on a CPU half of what `gather` takes
        k = _at_places(p, k)
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
        m, number, last = self.method, torch.arange(k.shape[2], device=k.device), stop[:, None]
        keep = (number < m.sinks) | (number >= last - m.window) | (last <= m.scope)
        if m.spans and k.shape[2] > m.scope:
            q = p.rotary.unrotate(p.module, p.q, p.known_positions())
            begin, end = torch.full_like(stop, m.sinks), stop - m.window
            keep |= select.choose(q, k, begin, end, asks, top=m.top, spans=m.spans, span=m.span, exact=m.exact)
        return keep & (number < last)

    # steps

    def unsteady(self) -> str | None:
        return None

    def arrive_step(self, p: Pass, step: Step) -> None:
        self.arrive(p)

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        assert self.dense.k is not None
        stop = step.seen[:, 0].long()
        return self._read(p, stop[:, None] - 1, stop, self.dense.k.shape[2])


def _at_places(p: Pass, k: torch.Tensor) -> torch.Tensor:
    """Keys [batch, kv_heads, n, head_dim] rotated to 0, 1, 2 ..."""
    return p.rotary.rotate(p.module, k, torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1))
