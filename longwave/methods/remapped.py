"""Methods that read every token at other positions than its own, so that no distance is one the model never saw.

Keys lie un-rotated. A method gives one or more *views* of query and key positions, and which pairs each is for; a pass
turns queries and keys for each view and takes one softmax over all. Nothing is dropped: no byte is saved.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from longwave.frame import MemoryLayer, Needs, Pass, Step
from longwave.methods.base import Bound, CacheShape, Method
from longwave.ops.attention.reference import group_heads, query_block
from longwave.plan.profile import Profile
from longwave.store.tokens import capacity

View = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query positions int64 [batch, queries], key positions int64 [keys] or [batch, keys], and the pairs they are for, bool
[batch, queries, keys]."""


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
    def views(self, i: torch.Tensor, j: torch.Tensor) -> Iterator[View]:
        """The views of queries that are tokens i [batch, queries] of their rows, and keys that are tokens j [keys].

        Pairs of several views count once, as the last one has them; those of none, and those with j > i, do not. No
        host reads, since captured steps ask too.
        """

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
        before = torch.tensor(self._before, device=k.device)[:, None]
        count = (
            torch.arange(p.q.shape[2], device=k.device) if p.valid is None else (p.valid.cumsum(-1) - 1).clamp(min=0)
        )
        at = (before + count).expand(p.q.shape[0], -1)
        out, lse = torch.empty_like(p.q), p.q.new_empty(p.q.shape[:3], dtype=torch.float32)
        block = query_block(p.q.shape[0] * p.q.shape[1], k.shape[2])
        for start in range(0, p.q.shape[2], block):
            some = slice(start, start + block)
            out[:, :, some], lse[:, :, some] = self._read(p, some, at[:, some], k, v)
        p.lse = lse
        return out

    def _read(
        self, p: Pass, some: slice, at: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers and log-sum-exp of some of a pass's queries, which are tokens at [batch, queries] of their rows."""
        asked, own = p.q[:, :, some], p.known_positions()[:, some]
        j = torch.arange(k.shape[2], device=k.device)
        views = ((ask, key, pairs & (j <= at[..., None])) for ask, key, pairs in self.method.views(at, j))
        scores = scores_of(p, asked, own, k, views)
        lse = scores.logsumexp(-1)
        out = torch.exp(scores - lse[..., None]) @ v[:, :, None].to(lse.dtype)
        return out.to(asked.dtype).reshape(asked.shape), lse.float().reshape(asked.shape[:3])

    # steps

    def unsteady(self) -> str | None:
        return None

    def arrive_step(self, p: Pass, step: Step) -> None:
        p.k = p.unrotated()

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        k, v = self.dense.tensors()
        return self._read(p, slice(None), step.at[:, None], k, v)[0]
