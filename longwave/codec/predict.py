"""Predicting K (un-rotated) and V of a token from what the token is: ridge regression on embeddings.

f_t = [e(token t), e(token t - 1), 1], with e a row of the embedding scaled to mean square 1, reduced to its principal
directions where it is wide. W solves (F'F / N + r m I) W = F'X / N in float64, m the mean diagonal of F'F / N; the
constant is not shrunk. r is the one of RIDGES that leaves least on text that made no W: from 9,000 tokens of SmolLM2
1e-3 leaves .82 of K's weighted variance there and .3 leaves .69. Layer 0 is linear in e, up to its normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RIDGES = (1e-3, 1e-2, 0.1, 0.3, 1.0)
WIDTH = 512  # directions to which an embedding more than twice as wide is reduced
ROWS = 8192  # of the vocabulary at once


@torch.no_grad()
def embedding(model: Any, width: int = WIDTH) -> Tensor:
    """float16 [vocabulary, r] on the CPU: rows of mean square 1, in `width` principal directions where they are wide.

    float16 is what a codec keeps; predictors are made of the rounded numbers, so nothing is lost by it.
    """
    module = model.get_input_embeddings()
    device = module.weight.device
    ids = torch.arange(module.weight.shape[0], device=device)
    rows = torch.cat([module(part).float() for part in ids.split(ROWS)])
    rows = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)
    if rows.shape[1] > 2 * width:
        moment = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=device)
        for part in rows.split(ROWS):
            moment += part.double().mT @ part.double()
        axes = torch.linalg.eigh(moment)[1].flip(-1)[:, :width]
        rows = rows @ axes.float()
    return rows.half().cpu()


def features(table: Tensor, ids: Tensor, before: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """f_t of consecutive tokens: ids int64 [n] -> [n, 2r + 1]. before: the token before them, None where unknown."""
    own = table[ids].to(dtype)
    first = torch.zeros_like(own[:1]) if before is None else table[before : before + 1].to(dtype)
    return torch.cat([own, torch.cat([first, own[:-1]]), own.new_ones(len(own), 1)], -1)


@dataclass(frozen=True, eq=False)
class Tokens:
    """f_t of s segments of consecutive tokens, those that repeat once. own [u, r]: embeddings of distinct tokens. now,
    before int64 [s, n]: which is each token's, and which that of the one before it; a first token that follows nothing
    has none there."""

    own: Tensor
    now: Tensor
    before: Tensor

    @classmethod
    def of(cls, table: Tensor, ids: NDArray[np.int64], first: int, dtype: torch.dtype) -> Tokens:
        """Of tokens number `first` on of segments ids [s, tokens]; the one before is known, or there is none."""
        parts = _distinct(np.ascontiguousarray(ids, np.int64).tobytes(), len(ids), first)
        rows, now, before = (torch.from_numpy(x).to(table.device, non_blocking=True) for x in parts)
        return cls(table[rows].to(dtype), now, before)

    def said(self, w: Tensor) -> Said:
        """Every f_t times w [2r + 1, c]."""
        r = self.own.shape[1]
        return Said(torch.addmm(w[-1], self.own, w[:r]), self.own @ w[r:-1], self.now, self.before)

    def times(self, w: Tensor) -> Tensor:
        """[s n, c] of it."""
        return self.said(w).numbers()


@dataclass(frozen=True, eq=False)
class Said:
    """Numbers of tokens by which they are: own [u, c] of each, after [u, c] of what follows each. now, before int64
    [s, n] as `Tokens` has them; None: own [1, c] is said of all."""

    own: Tensor
    after: Tensor | None = None
    now: Tensor | None = None
    before: Tensor | None = None

    def numbers(self) -> Tensor:
        """[s n, c], or [1, c] where that is said of all."""
        if self.now is None or self.before is None or self.after is None:
            return self.own
        made = self.own[self.now]
        made[:, self.now.shape[1] - self.before.shape[1] :] += self.after[self.before]
        return made.flatten(0, 1)


@lru_cache(16)  # every group of layers asks for the same
def _distinct(data: bytes, segments: int, first: int) -> tuple[NDArray[np.int64], ...]:
    """Distinct ids, and which of them are tokens number `first` on, and those before them: int64 [segments, ...]."""
    ids = np.frombuffer(data, np.int64).reshape(segments, -1)
    distinct, at = np.unique(ids, return_inverse=True)
    at = at.reshape(ids.shape).astype(np.int64)
    return distinct, at[:, first:].copy(), at[:, max(first - 1, 0) : -1].copy()


@dataclass
class Moments:
    """Sums over calibration tokens, float64 on one device: F'F [f, f], F'X [f, c] of all channels of a side, and X'X
    by group of layers [c_g, c_g]. They are all that prediction and bases need, whatever the number of tokens."""

    groups: list[slice]
    count: int = 0
    ff: Any = None
    fx: Any = None
    xx: Any = None

    def add(self, f: Tensor, x: Tensor) -> None:
        """f [n, features] and x [n, channels] of n tokens."""
        f, x = f.double(), x.double()
        if self.ff is None:
            self.ff, self.fx = (f.new_zeros(f.shape[1], width) for width in (f.shape[1], x.shape[1]))
            self.xx = [x.new_zeros(g.stop - g.start, g.stop - g.start) for g in self.groups]
        self.count += len(f)
        self.ff.addmm_(f.mT, f)
        self.fx.addmm_(f.mT, x)
        for group, held in zip(self.groups, self.xx, strict=True):
            held.addmm_(x[:, group].mT, x[:, group])

    def mean(self) -> Tensor:
        """Of x: float64 [channels]. The last feature is 1."""
        return self.fx[-1] / self.count

    def predictors(self, ridges: Sequence[float]) -> Iterator[Tensor]:
        """W float64 [features, channels] of each r: around the means, so that the constant is not shrunk, in the
        features' principal axes, which are found once."""
        at, x = self.ff[-1, :-1] / self.count, self.mean()
        size, axes = torch.linalg.eigh(self.ff[:-1, :-1] / self.count - at[:, None] * at)
        level = self.ff.diagonal()[:-1].mean() / self.count
        along = axes.mT @ (self.fx[:-1] / self.count - at[:, None] * x)
        for ridge in ridges:
            w = axes @ (along / (size.clamp(min=0) + max(ridge, 1e-12) * level)[:, None])
            yield torch.cat([w, (x - at @ w)[None]])

    def residual(self, w: Tensor, group: int) -> Tensor:
        """Second moment of x - f w in one group of layers: float64 [c_g, c_g]."""
        cut = self.groups[group]
        w, fx = w[:, cut], self.fx[:, cut]
        cross = w.mT @ fx
        return (self.xx[group] - cross - cross.mT + w.mT @ self.ff @ w) / self.count
