"""infllm: blocks of far tokens lie in host memory, a few of their keys stand for them, and the best blocks are read.

Source: InfLLM, arXiv 2402.04617. A token sees the `window` before it at true distances. What lies further back is seen
at one distance, window - 1: the first tokens, the blocks that those who ask together chose, and what has left the
window but fills no block yet. In one softmax.

    representative of a block   mean of the keys that got most attention while they were in the window
    worth of a block            sum over query heads h of mean over those who ask of q_h . representative of h's KV head

Of our own: a KV head has one representative, chosen by what its query heads looked at together (the published code has
one a query head); no pair is counted twice (there, tokens that leave the window within a stretch are).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from longwave.checks import whole
from longwave.frame import Needs, Pass, Step
from longwave.methods.base import CacheShape
from longwave.methods.blocks import BlockLayer, Blocks
from longwave.methods.remapped import View, scores_of
from longwave.methods.scoped import ScopedBound
from longwave.ops import select
from longwave.ops.attention.parts import Part, band_mass, interval_attention, joined
from longwave.ops.attention.reference import query_block
from longwave.store.resident import Resident
from longwave.store.tokens import capacity


@dataclass(frozen=True)
class InfLLM(Blocks):
    """Everything is kept; far tokens lie in blocks, and the best blocks are read at one distance (InfLLM).

    sinks: first tokens, always read. window: tokens seen at their distance, itself included. block: far tokens that are
        read together. blocks: how many are read. representatives: keys whose mean stands for a block. chunk: tokens of
        a prompt that choose together. host: True or a directory: keys and values lie in host memory, or in mapped
        files there, and on the device the blocks that are read, with `cached` more that were read last.

    It takes no budget, since all is held; 1 reads all.
    """

    name: ClassVar[str] = "infllm"
    uses: ClassVar[str] = "turns tokens to {} positions (window + chunk)"
    fewer: ClassVar[str] = "a smaller window"

    sinks: int = 128
    window: int = 4096
    block: int = 128
    blocks: int = 16
    representatives: int = 4
    chunk: int = 512
    cached: int = 16

    def __post_init__(self) -> None:
        whole("sinks", self.sinks, 0, "tokens")
        whole("block", self.block, 1, "tokens")
        whole("blocks", self.blocks, 0, "blocks")
        if whole("representatives", self.representatives, 1, "keys") > self.block:
            raise ValueError(f"a block of {self.block} keys has no {self.representatives} representatives among them")
        whole("chunk", self.chunk, 1, "tokens")
        whole("window", self.window, self.chunk, "tokens (those that choose together, chunk, lie in it)")
        whole("cached", self.cached, 0, "blocks")
        super().__post_init__()

    @property
    def positions(self) -> int:
        return self.window + self.chunk

    @property
    def plain(self) -> int:
        return self.window

    @property
    def slots(self) -> int:
        """Blocks of a row on the device where the tokens lie in host memory: all that one stretch may touch, and those
        that are cached."""
        near = self.window + self.block + self.chunk
        return -(-self.sinks // self.block) + 2 * self.blocks + near // self.block + 3 + self.cached

    def bound(self, shape: CacheShape, budget: float | None) -> InfLLMBound:
        return InfLLMBound(self, shape, budget)

    def full(self, tokens: int) -> int:
        """Blocks that a row of `tokens` has outside the window of the next one."""
        return max(0, (tokens - self.sinks - self.window) // self.block)

    def worth(self, layer: InfLLMLayer, q: torch.Tensor, asks: torch.Tensor) -> torch.Tensor:
        """What reading each block is worth to those who ask, bool [batch, queries]: float [batch, blocks]. q [batch,
        query_heads, queries, head_dim] turned to the distance at which they see blocks."""
        assert layer.means is not None
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        mean = (q.to(wide) * asks[:, None, :, None]).sum(2) / asks.sum(-1).clamp(min=1)[:, None, None]
        asked = mean.unflatten(1, (layer.means.shape[1], -1)).sum(2)
        return torch.einsum("bhd,bhnd->bn", asked, layer.means.to(wide))


@dataclass(frozen=True, eq=False)
class InfLLMBound(ScopedBound):
    method: InfLLM

    @property
    def needs(self) -> Needs:
        return Needs(unrotated=True, mass=True) if not self.whole else Needs()

    def reads(self) -> str:
        m = self.method
        return f"window={m.window}, {m.blocks} blocks of {m.block}, sinks={m.sinks}"

    def reading(self, index: int) -> InfLLMLayer:
        return InfLLMLayer(index, self)

    def beside(self, tokens: int) -> int:
        shape, m = self.shape, self.method
        held, copied = capacity(tokens), m.slots * m.block * shape.token_bytes if m.host else 0
        return copied + shape.kv_heads * (4 * held + m.full(held) * shape.head_dim * shape.dtype.itemsize)

    def stays(self, index: int, tokens: int) -> int:
        return super().stays(index, tokens) - self.shape.kv_heads * 4 * capacity(tokens)  # the column is no summary

    def brings(self, tokens: int) -> int:
        return min(capacity(tokens), self.method.slots * self.method.block) * self.shape.token_bytes


class InfLLMLayer(BlockLayer):
    """A column of what each key got while it was in the window, and a mean key of each block that has left it."""

    method: InfLLM

    def heads(self) -> int:
        return self.bound.shape.kv_heads

    def _clear(self) -> None:
        super()._clear()
        self.resident: Resident | None = None  # what lies on the device too, where K and V do not

    # blocks

    def settle(self) -> None:
        self.dense.fit()
        self.ahead(self.dense.lengths)

    def _reside(self) -> None:
        if self.method.host and self.dense.k is not None:
            self.resident = Resident(self.dense, self.method.block, self.method.slots, self.device)

    def ahead(self, starts: list[int]) -> None:
        means, ready = self.fit(), [self.method.full(n) for n in starts]
        late = [(a, b) for a, b in zip(self._known, ready, strict=True) if a < b]
        if late:
            first, last = min(a for a, _ in late), max(b for _, b in late)
            there = torch.arange(first, last, device=self.dense.k.device).expand(self.batch_size, -1)  # type: ignore[union-attr]
            means[:, :, first:last] = self._stands_for(there).to(means.device)
        self._known = [max(a, b) for a, b in zip(self._known, ready, strict=True)]

    def _stands_for(self, blocks: torch.Tensor) -> torch.Tensor:
        """Mean keys of row b's blocks [batch, n], of those that got most attention: [batch, kv_heads, n, head_dim]."""
        m, (b, n) = self.method, blocks.shape
        place = m.sinks + blocks[..., None] * m.block + torch.arange(m.block, device=blocks.device)
        place = place.flatten(1).clamp(max=self.dense.columns["mass"].shape[2] - 1)
        rows = torch.arange(b, device=blocks.device)[:, None]
        got = self.dense.columns["mass"][rows, :, place].transpose(1, 2).unflatten(2, (n, m.block))
        # of equals the earlier one, on every device
        best = got.argsort(dim=-1, descending=True, stable=True)[..., : m.representatives]
        k = self.taken(place)[0].unflatten(2, (n, m.block))
        return k.gather(3, best[..., None].expand(*best.shape, k.shape[4])).mean(3)

    def parts(self) -> dict[str, list[torch.Tensor]]:
        parts = super().parts()
        return parts if self.resident is None else {**parts, "read last": self.resident.copies()}

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self._reside()

    def drop_last(self, counts: list[int]) -> None:
        super().drop_last(counts)
        if self.resident is not None:
            self.resident.forget(self.dense.lengths)

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        self._reside()

    # attention

    def attend(self, p: Pass) -> torch.Tensor:
        if self.resident is None:
            self._reside()
        else:
            self.resident.forget(self._before)
        return self.attend_in_stretches(p)  # short rows too: what each key gets is counted there

    def observe(self, p: Pass) -> None:
        """`read` has seen what each key got."""

    def read(
        self,
        p: Pass,
        number: torch.Tensor,
        stop: torch.Tensor,
        longest: int,
        asks: torch.Tensor | None = None,
        square: bool = False,
    ) -> torch.Tensor:
        m = self.method
        asks = torch.ones_like(number, dtype=torch.bool) if asks is None else asks
        index, count = self._places(p, number, stop, longest, asks)
        k, v = self.taken(index) if self.resident is None else self.resident.read(index, count)
        if p.causal and p.mask is None and number.shape[1] > 1:
            return self._read_runs(p, number, asks, k, v)
        rank = torch.arange(index.shape[1], device=index.device)
        begin = (number[:, :1] - m.window).clamp(min=0)
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        got = torch.zeros(k.shape[:3], dtype=wide, device=k.device)
        out = torch.empty_like(p.q)
        if p.sinks is not None:
            p.lse = torch.empty(p.q.shape[:3], dtype=torch.float32, device=k.device)
        step = query_block(p.q.shape[0] * p.q.shape[1], k.shape[2])
        for some in (slice(first, first + step) for first in range(0, number.shape[1], step)):
            i, j = number[:, some, None], index[:, None]
            seen = (rank < count[:, None])[:, None].expand(-1, i.shape[1], -1)
            seen = seen & (j <= i) if p.causal else seen
            near = (i - j < m.window) & seen
            views = _views(i[..., 0], index, begin, m.window, near, seen)
            scores = scores_of(p, p.q[:, :, some], p.known_positions()[:, some], k, views)
            lse = scores.logsumexp(-1, keepdim=True)
            share = torch.exp(scores - lse)
            out[:, :, some] = (share @ v[:, :, None].to(share.dtype)).flatten(1, 2).to(out.dtype)
            counts = near & asks[:, some, None]
            got += share.masked_fill(~counts[:, None, None], 0).sum((2, 3))
            if p.lse is not None:
                p.lse[:, :, some] = lse[..., 0].flatten(1, 2).float()
        column = self.dense.columns["mass"]
        column.scatter_add_(2, index[:, None].expand_as(got).to(column.device), got.to(column.device).float())
        return out

    def _read_runs(
        self, p: Pass, number: torch.Tensor, asks: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """`read` of queries that follow each other, by kernels that hold no scores; the host knows who sees what."""
        out, ends = torch.zeros_like(p.q), list(zip(number[:, 0].tolist(), asks.sum(-1).tolist(), strict=True))
        if p.sinks is not None:
            p.lse = torch.zeros(p.q.shape[:3], dtype=torch.float32, device=k.device)
        own = p.known_positions().expand(len(ends), -1)
        for start, count in set(ends):
            if not count:
                continue
            rows = [row for row, end in enumerate(ends) if end == (start, count)]
            some = slice(None) if len(rows) == len(ends) else torch.tensor(rows, device=k.device)
            found, lse = self._read_run(p, p.q[some, :, :count], own[some, :count], start, k[some], v[some], some)
            out[some, :, :count] = found.to(out.dtype)
            if p.lse is not None:
                p.lse[some, :, :count] = lse.float()
        return out

    def _read_run(
        self,
        p: Pass,
        q: torch.Tensor,
        own: torch.Tensor,
        start: int,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: slice | torch.Tensor,
    ) -> Part:
        """Answers and log-sum-exp of the tokens from `start` on of some rows, q turned to positions `own`, over the
        keys of `_places`. What each key got in the window is added up."""
        m, i = self.method, torch.arange(start, start + q.shape[2])
        ready = max(0, (start - m.sinks - m.window) // m.block)
        # behind blocks all tokens are there: so many lie before them, and are read
        left = (ready - min(m.blocks, ready)) * m.block
        edge, begin = (i - m.window + 1).clamp(min=0), max(0, start - m.window)
        low, high = int(edge[0]), start + q.shape[2]
        near = slice(low - left, high - left)
        asked = p.rotary.shift(p.module, q, own, (i - begin).to(q.device).expand_as(own))
        place = torch.arange(low - begin, high - begin, device=k.device).clamp(min=0)
        keys = p.rotary.rotate(p.module, k[:, :, near], place[None])
        parts = interval_attention(asked, keys, v[:, :, near], p.scaling, edge - low, i + 1 - low)
        if edge[-1] - left > 0:
            far = slice(0, int(edge[-1]) - left)
            distant = p.rotary.shift(p.module, q, own, torch.full_like(own, m.window - 1))
            first = p.rotary.rotate(p.module, k[:, :, far], torch.zeros(1, far.stop, dtype=torch.long, device=k.device))
            parts += interval_attention(
                distant, first, v[:, :, far], p.scaling, torch.zeros_like(edge), (edge - left).clamp(min=0)
            )
        out, lse = joined(parts)
        got = band_mass(asked, keys, p.scaling, edge - low, i + 1 - low, lse)
        column = self.dense.columns["mass"]
        where = rows if isinstance(rows, slice) else rows.to(column.device)
        column[where, :, low:high] += got.to(column.device).float()
        return out, lse

    def _places(
        self, p: Pass, number: torch.Tensor, stop: torch.Tensor, longest: int, asks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the tokens that are read, rising, int64 [batch, n], and how many of a row's count."""
        m = self.method
        ready = ((number[:, 0] - m.sinks - m.window) // m.block).clamp(min=0)[:, None]
        j = torch.arange(longest, device=number.device)
        keep = (j < m.sinks) | (j >= m.sinks + ready * m.block)
        if m.blocks and self.means is not None and self.means.shape[2]:
            far = torch.full_like(number, m.window - 1)
            q = p.rotary.shift(p.module, p.q, p.known_positions(), far)
            every = torch.arange(self.means.shape[2], device=j.device)
            worth = m.worth(self, q, asks).masked_fill(every >= ready, float("-inf"))
            best = worth.argsort(dim=-1, descending=True, stable=True)[:, : m.blocks]  # of equals the earlier one
            chosen = torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True) & (every < ready)
            at = ((j - m.sinks) // m.block).clamp(0, every.shape[0] - 1)
            keep = keep | (chosen[:, at] & (j >= m.sinks) & (j < m.sinks + ready * m.block))
        most = m.sinks + (m.blocks + 1) * m.block + m.window + number.shape[1]
        return select.places(keep & (j < stop[:, None]), min(longest, most))

    # steps

    def release(self) -> None:
        super().release()
        self.ahead(self.dense.lengths)

    def observe_step(self, p: Pass, step: Step) -> None:
        """`read` has."""

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        if self.means is not None and self.means.shape[2]:
            last = (step.seen[:, 0].long() - 1 - self.method.sinks - self.method.window) // self.method.block - 1
            newest = last.clamp(min=0)
            fresh = self._stands_for(newest[:, None])[:, :, 0]
            was = self.means[step.rows, :, newest]
            self.means[step.rows, :, newest] = torch.where((last >= 0)[:, None, None], fresh, was)
        return super().attend_step(p, step)


def _views(
    i: torch.Tensor, j: torch.Tensor, begin: torch.Tensor, window: int, near: torch.Tensor, seen: torch.Tensor
) -> tuple[View, View]:
    """The window at true distances, counted from `begin` [batch, 1] on, and all else at one distance."""
    return (
        (i - begin, (j - begin).clamp(min=0), near),
        (torch.full_like(i, window - 1), torch.zeros_like(j), seen & ~near),
    )
