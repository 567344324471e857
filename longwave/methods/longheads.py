"""longheads: every head reads chunks of its own choice, so that all of them together read far.

Source: LongHeads, arXiv 2402.10685. Far tokens lie in chunks. A query reads, in each of its heads, the first chunk, its
own, the one before, and of the others those whose feature it likes best, `chunks` in all, at places without gaps.

    u   mean over a chunk's queries of what they read of the chunk, each sees all of it, at places 0 .. chunk - 1
    f   what u, as a query, reads of the chunk's keys, which are its values too
    worth of a chunk to a query   q . f, q before rotation; both of the same query head

Of our own: a query reads itself in prompts too (the published code leaves it out there), and heads that share keys
still choose alone. All of this begins once a row has more tokens than `chunks` chunks have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.frame import Needs, Pass
from longwave.methods.base import CacheShape
from longwave.methods.blocks import BlockLayer, Blocks
from longwave.methods.held import rising
from longwave.methods.scoped import ScopedBound
from longwave.ops.attention.reference import dense_attention, query_block
from longwave.store.tokens import capacity


@dataclass(frozen=True)
class LongHeads(Blocks):
    """Everything is kept; each head reads the chunks that it likes best, at places without gaps (LongHeads).

    chunk: tokens that are read together. chunks: how many a head reads, the first, the last one and its own among them.

    It takes no budget, since all is held; 1 reads all.
    """

    name: ClassVar[str] = "longheads"
    uses: ClassVar[str] = "reads {} tokens at once (chunks * chunk)"
    fewer: ClassVar[str] = "fewer chunks"

    chunk: int = 256
    chunks: int = 16

    def __post_init__(self) -> None:
        whole("chunk", self.chunk, 1, "tokens")
        whole("chunks", self.chunks, 3, "chunks (the first, the last, and a query's own)")
        super().__post_init__()

    @property
    def positions(self) -> int:
        return self.chunks * self.chunk

    @property
    def plain(self) -> int:
        return self.chunks * self.chunk

    @property
    def takes(self) -> int:
        return 2 * self.chunk  # whose queries a dense cache remembers

    def full(self, tokens: int) -> int:
        return tokens // self.chunk

    def bound(self, shape: CacheShape, budget: float | None) -> LongHeadsBound:
        return LongHeadsBound(self, shape, budget)


@dataclass(frozen=True, eq=False)
class LongHeadsBound(ScopedBound):
    method: LongHeads

    @property
    def needs(self) -> Needs:
        # a chunk is described once its last query is there, and again after a crop of no more than a chunk
        return Needs() if self.whole else Needs(unrotated=True, queries=2 * self.method.chunk)

    def reads(self) -> str:
        return f"{self.method.positions} tokens a head: {self.method.chunks} chunks of {self.method.chunk}"

    def reading(self, index: int) -> LongHeadsLayer:
        return LongHeadsLayer(index, self)

    def beside(self, tokens: int) -> int:
        shape = self.shape
        features = shape.query_heads * shape.head_dim * shape.dtype.itemsize * self.method.full(capacity(tokens))
        return features + self.needs.nbytes(shape.query_heads, shape.head_dim, shape.dtype.itemsize)


class LongHeadsLayer(BlockLayer):
    """A feature of each complete chunk and query head."""

    method: LongHeads

    def heads(self) -> int:
        return self.bound.shape.query_heads

    # features

    def can_drop(self, counts: list[int]) -> None:
        super().can_drop(counts)
        assert self.queries is not None
        for row, (count, held) in enumerate(zip(counts, self.dense.lengths, strict=True)):
            left, known = held - count, self._known[row] if self._known else 0
            described = min(known, self.method.full(left)) * self.method.chunk
            if self.queries.counts[row] - count < left - described:
                raise ValueError(
                    f"cannot remove the last {count} tokens: a chunk of row {row} that loses some of them would be "
                    f"described anew, and only the last {2 * self.method.chunk} queries are remembered for that. "
                    "Keep a copy.deepcopy of the cache to go back to"
                )

    def settle(self) -> None:
        self.dense.fit()
        self._describe(None)

    def ripe(self) -> bool:
        return any(self.method.full(n) > known for n, known in zip(self.dense.lengths, self._known, strict=True))

    def _describe(self, p: Pass | None) -> None:
        """Make features of the chunks that are complete now: of the queries that are remembered, and of a pass's."""
        features, w = self.fit(), self.method.chunk
        rotary = self.progress.rotary
        module = rotary.module_of(self.index) if p is None else p.module
        k, v = self.dense.tensors()
        for row, (known, length) in enumerate(zip(self._known, self.dense.lengths, strict=True)):
            new = self.method.full(length) - known
            if new <= 0:
                continue
            q, at = (x[..., : new * w, :] for x in self._asked(row, length - known * w, p))
            q = rotary.unrotate(module, q, at[..., 0]).unflatten(2, (new, w))[0].transpose(0, 1)
            own = slice(known * w, (known + new) * w)
            keys, values = (x[row, :, own].to(q.device).unflatten(1, (new, w)).transpose(0, 1) for x in (k, v))
            place = torch.arange(w, device=q.device)[None]
            q, keys = (rotary.rotate(module, x, place) for x in (q, keys))
            mean = dense_attention(q, keys, values, self.scaling, None).mean(2, keepdim=True)
            found = dense_attention(mean, keys, keys, self.scaling, None)  # [new, query_heads, 1, head_dim]
            features[row, :, known : known + new] = found[:, :, 0].transpose(0, 1)
            self._known[row] = known + new

    def _asked(self, row: int, last: int, p: Pass | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a row the last queries, those of a pass that is not observed yet included: [1, query_heads, last,
        head_dim], and their positions [1, last, 1]."""
        found = []
        came = 0
        if p is not None:
            real = slice(None) if p.valid is None else p.valid[row]
            q, at = p.q[row][:, real], p.known_positions()[row][real]
            came = q.shape[1]
            found.append((q[:, -last:], at[-last:]))
        if came < last:
            queries = self.queries
            assert queries is not None
            assert queries.q is not None
            assert queries.positions is not None
            old = slice(queries.width - (last - came), None)
            found.insert(0, (queries.q[row, :, old], queries.positions[row, old]))
        q, at = (torch.cat(parts, -1 if parts[0].ndim == 1 else 1) for parts in zip(*found, strict=True))
        return q[None], at[None, :, None]

    # attention

    def attend(self, p: Pass) -> torch.Tensor:
        self._describe(p)
        return super().attend(p)

    def read(
        self,
        p: Pass,
        number: torch.Tensor,
        stop: torch.Tensor,
        longest: int,
        asks: torch.Tensor | None = None,
        square: bool = False,
    ) -> torch.Tensor:
        w, every = self.method.chunk, -(-longest // self.method.chunk)
        out = torch.empty_like(p.q)
        if p.sinks is not None:
            p.lse = torch.empty(p.q.shape[:3], dtype=torch.float32, device=p.q.device)
        step = query_block(p.q.shape[0] * p.q.shape[1], every * (w + 2 * p.q.shape[3]))
        for some in (slice(first, first + step) for first in range(0, number.shape[1], step)):
            out[:, :, some], lse = self._some(p, some, number[:, some], stop, every)
            if p.lse is not None:
                p.lse[:, :, some] = lse.float()
        return out

    def _chosen(self, q: torch.Tensor, number: torch.Tensor, every: int, causal: bool) -> torch.Tensor:
        """Which of `every` chunks each query reads: q [batch, query_heads, queries, head_dim] before rotation -> bool
        [batch, query_heads, queries, every]."""
        assert self.means is not None
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        known = self.means[:, :, :every].to(wide)
        worth = torch.nn.functional.pad(q.to(wide) @ known.mT, (0, every - known.shape[2]))
        chunk, own = torch.arange(every, device=q.device), (number // self.method.chunk)[..., None]
        always = (chunk == 0) | (chunk == own) | (chunk == own - 1)
        there = chunk <= own if causal else torch.ones_like(always)
        worth = worth.masked_fill(always[:, None], float("inf")).masked_fill(~there[:, None], float("-inf"))
        # of equals the earlier one, on every device
        order = worth.argsort(dim=-1, descending=True, stable=True)[..., : self.method.chunks]
        return torch.zeros_like(worth, dtype=torch.bool).scatter(-1, order, True) & there[:, None]

    def _some(
        self, p: Pass, some: slice, number: torch.Tensor, stop: torch.Tensor, every: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers and log-sum-exp of some queries. Of each KV head the chunks that any of them reads are taken, and
        turned to places 0 .. chunk - 1: a chunk of rank r is met by the query turned r chunks further back."""
        m, w = self.method, self.method.chunk
        k, v = self.dense.tensors()
        (_, heads, n, d), queries = k.shape, number.shape[1]
        q, at = p.q[:, :, some], p.known_positions()[:, some]
        chosen = self._chosen(p.rotary.unrotate(p.module, q, at), number, every, p.causal)
        rank = (chosen.cumsum(-1) - 1).clamp(min=0)
        grouped = chosen.unflatten(1, (heads, -1))
        taken = rising(grouped.any(3).any(2), min(every, m.chunks * queries * grouped.shape[2]))  # [b, heads, taken]
        token = taken[..., None] * w + torch.arange(w, device=q.device)
        flat = token.flatten(2).clamp(max=n - 1)[..., None].expand(-1, -1, -1, d).to(k.device)
        keys, values = (x.gather(2, flat).to(q.device) for x in (k, v))
        place = torch.arange(w, device=q.device).repeat(taken.shape[2])[None]
        keys = p.rotary.rotate(p.module, keys, place).unflatten(2, (-1, w))

        back = torch.arange(m.chunks, device=q.device) * w
        last = torch.minimum(number // w, number.new_full((), m.chunks - 1)) * w + number % w
        ask = last[..., None] - back  # [b, queries, ranks]
        ask = ask.clamp(min=0) if p.causal else ask
        turned = p.rotary.shift(
            p.module,
            q.repeat_interleave(m.chunks, 2),
            at.repeat_interleave(m.chunks, 1),
            ask.flatten(1),
        ).unflatten(2, (queries, m.chunks))
        of = taken[:, :, None, None].expand(-1, -1, grouped.shape[2], queries, -1)
        reads = grouped.gather(-1, of)  # [b, heads, group, queries, taken]
        which = rank.unflatten(1, (heads, -1)).gather(-1, of).clamp(max=m.chunks - 1)
        turned = turned.unflatten(1, (heads, -1)).gather(4, which[..., None].expand(*which.shape, d))

        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        x = turned.flatten(2, 3).transpose(2, 3).to(wide)  # [b, heads, taken, group * queries, d]
        scores = (x @ keys.to(wide).mT).transpose(2, 3).unflatten(2, reads.shape[2:4]) * p.scaling
        seen = token[:, :, None] < stop[:, None, None, None, None]
        if p.causal:
            seen = seen & (token[:, :, None] <= number[:, None, :, None, None])
        scores = scores.masked_fill(~(reads[..., None] & seen[:, :, None]), float("-inf")).flatten(-2)
        lse = scores.logsumexp(-1, keepdim=True)
        out = torch.exp(scores - lse) @ values[:, :, None].to(wide)
        return out.to(q.dtype).reshape(q.shape), lse.reshape(q.shape[:3])
