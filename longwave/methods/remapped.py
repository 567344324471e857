"""Methods that read every token at other positions than its own, so that no distance is one the model never saw.

Keys lie un-rotated. A method *looks* in one or more ways: at which positions queries and keys meet, and which keys of a
row a query meets so, always some that stand side by side. A pass turns queries and keys once for each look and joins
what they read into one softmax. Nothing is dropped: no byte is saved.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from longwave.frame import MemoryLayer, Needs, Pass, Step
from longwave.methods.base import Bound, CacheShape, Method
from longwave.ops.attention.parts import Part, interval_attention, joined
from longwave.ops.attention.reference import group_heads
from longwave.plan.profile import Profile
from longwave.store.tokens import capacity

View = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query positions int64 [batch, queries], key positions int64 [keys] or [batch, keys], and the pairs they are for, bool
[batch, queries, keys]."""


@dataclass(frozen=True)
class Look:
    """Keys that queries meet at other positions than their own.

    ask: the queries' positions. first, last: of each query, which keys: first, first + 1 ... last - 1; both rise with
    the query. All int64 and of one shape. place: positions of keys that are tokens j.
    """

    ask: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    place: Callable[[torch.Tensor], torch.Tensor] = lambda j: j


def scores_of(p: Pass, q: torch.Tensor, own: torch.Tensor, k: torch.Tensor, views: Iterable[View]) -> torch.Tensor:
    """Scores [batch, kv_heads, group, queries, keys], float32 or float64, of queries that the model turned at their own
    positions [batch, queries], over un-rotated keys; -inf for pairs of no view. Of several the last one counts."""
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    b, heads, n, _ = k.shape
    scores = torch.full((b, heads, q.shape[1] // heads, q.shape[2], n), float("-inf"), device=k.device, dtype=wide)
    for ask, key, pairs in views:
        turned = p.rotary.shift(p.module, q, own, ask).to(wide)
        keys = p.rotary.rotate(p.module, k, key if key.ndim == 2 else key[None]).to(wide)
        found = (group_heads(turned, heads) @ keys.mT).unflatten(2, scores.shape[2:4]) * p.scaling
        scores = torch.where(pairs[:, None, None], found, scores)
    return scores


@dataclass(frozen=True)
class Remapped(Method):
    """What all methods that read tokens at other positions share: the only budget that they can meet is 1."""

    @abstractmethod
    def looks(self, i: torch.Tensor) -> Iterator[Look]:
        """How queries that are tokens i of their rows, int64 of any shape, read: every pair is one look's at most.

        No host reads, since captured steps ask too.
        """

    def views(self, i: torch.Tensor, j: torch.Tensor) -> Iterator[View]:
        """The same of queries that are tokens i [batch, queries] and keys that are tokens j [keys], pair by pair."""
        for look in self.looks(i):
            yield look.ask, look.place(j), (j >= look.first[..., None]) & (j < look.last[..., None])

    @abstractmethod
    def exact(self) -> int:
        """Tokens up to which it attends as the model does."""

    @abstractmethod
    def reach(self, limit: int) -> int | None:
        """Tokens up to which no distance is one that a model of `limit` trained tokens never saw; None for any
        number."""

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        return 1.0

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> RemappedBound:
        if budget is not None and budget < 1:
            raise ValueError(f"{self.name} keeps everything, so its budget is 1; got {budget}. Use streaming for less")
        return RemappedBound(self, shape, budget)


class RemappedBound(Bound):
    method: Remapped

    @property
    def needs(self) -> Needs:
        return Needs(unrotated=True)

    @property
    def reads_exactly(self) -> bool:
        return False

    def reach(self, limit: int) -> int | None:
        return self.method.reach(limit)

    def __str__(self) -> str:
        return f"{self.method.name}(exact up to {self.method.exact():,} tokens)"

    def layer(self, index: int) -> MemoryLayer:
        return RemappedLayer(index, self)

    def layer_bytes(self, index: int, tokens: int) -> int:
        return capacity(tokens) * self.shape.token_bytes


class RemappedLayer(MemoryLayer):
    """Dense tokens, keys un-rotated; a token's number in its row is its position."""

    slots = True  # keys do not lie as the model turned them

    renumbers = True

    def __init__(self, index: int, bound: RemappedBound):
        super().__init__(index, bound.needs)
        self.bound, self.method = bound, bound.method

    def refuse(self, p: Pass) -> None:
        if p.mask is not None or not p.causal:
            raise NotImplementedError(
                f"{self.method.name} says for every query what it sees of earlier tokens: pass a 2D mask, and a model "
                "whose attention is causal"
            )

    def take(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{self.method.name} reads a prompt at positions of its own, so what another cache has read cannot become "
            "its: give it the tokens"
        )

    def arrive(self, p: Pass) -> None:
        p.k = p.unrotated()

    def attend(self, p: Pass) -> torch.Tensor:
        k, v = self.dense.view()
        out, own = torch.zeros_like(p.q), p.known_positions()
        wide = torch.float64 if p.q.dtype == torch.float64 else torch.float32
        p.lse = torch.zeros(p.q.shape[:3], dtype=wide, device=p.q.device)
        if p.valid is None and len(set(self._before)) == 1:
            out, p.lse = self._read(p, p.q, own, self._before[0], k, v)
            return out.to(p.q.dtype)
        for row, before in enumerate(self._before):
            one = slice(row, row + 1)
            real = slice(None) if p.valid is None else p.valid[row]
            if (q := p.q[one, :, real]).shape[2]:
                found, lse = self._read(p, q, own[one, real], before, k[one], v[one])
                out[row, :, real], p.lse[row, :, real] = found[0].to(out.dtype), lse[0]
        return out

    def _read(self, p: Pass, q: torch.Tensor, own: torch.Tensor, before: int, k: torch.Tensor, v: torch.Tensor) -> Part:
        """Answers and log-sum-exp of queries that the model turned at positions `own`, the tokens from `before` on of
        their rows."""
        parts = []
        for look in self.method.looks(torch.arange(before, before + q.shape[2])):
            low, high = int(look.first[0]), int(look.last[-1])
            if low >= high:
                continue
            turned = p.rotary.shift(p.module, q, own, look.ask.to(q.device)[None])
            place = look.place(torch.arange(low, high, device=q.device))
            keys = p.rotary.rotate(p.module, k[:, :, low:high], place[None])
            parts += interval_attention(turned, keys, v[:, :, low:high], p.scaling, look.first - low, look.last - low)
        return joined(parts)

    # steps

    def unsteady(self) -> str | None:
        return None

    def arrive_step(self, p: Pass, step: Step) -> None:
        p.k = p.unrotated()

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        k, v = self.dense.tensors()
        j = torch.arange(k.shape[2], device=k.device)
        views = self.method.views(step.at[:, None], j)
        scores = scores_of(p, p.q, p.known_positions(), k, views)
        p.lse = scores.logsumexp(-1).flatten(1, 2)
        out = torch.softmax(scores, -1) @ v[:, :, None].to(scores.dtype)
        return out.to(p.q.dtype).reshape(p.q.shape)
