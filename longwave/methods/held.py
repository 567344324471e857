"""What a layer holds when it has to choose, and the choice by worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from longwave.frame import MemoryLayer
from longwave.frame.observe import Queries


@dataclass(frozen=True)
class Rotation:
    """A layer's own rotation: x [batch, heads, n, head_dim] at positions int [batch, n], on and off."""

    rotary: Any
    module: Any

    def on(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.rotary.rotate(self.module, x, positions)

    def off(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.rotary.unrotate(self.module, x, positions)


@dataclass(frozen=True, eq=False)
class Held:
    """What a layer holds when it has to choose.

    k, v [batch, kv_heads, n, head_dim], rotated (in slots: not); row b fills its first lengths[b] (int64 [batch], on
    their device).
    columns: "position" and what the method `needs`, [batch, kv_heads, n] each. queries: of the last tokens, where
    needed.
    scaling: of the scores. layer: number of the memory layer. turn int64 [batch]: where a method that `takes_turns`
    stands. room int64 [batch]: how many of the tokens that may go will stay, as steps have it. rotation: the layer's
    own, for methods that need what is `unrotated`. rotary, index: what `Queries.later` takes. ahead: tokens behind each
    row's end, k's next ones, that ask as well and are taken back (speckv).
    """

    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor
    columns: dict[str, torch.Tensor]
    queries: Queries | None
    scaling: float
    layer: int = 0
    turn: torch.Tensor | None = None
    room: torch.Tensor | None = None
    rotation: Rotation | None = None
    rotary: Any = None
    index: int = 0
    ahead: int = 0

    def mean_mass(self) -> torch.Tensor:
        """Attention that each token got, over the number of queries that have seen it: as columns["mass"]."""
        return self.columns["mass"] / self.age()

    def age(self) -> torch.Tensor:
        """How many queries have seen each token, its own included: int64 [batch, kv_heads, n], at least 1.

        It follows from positions, which count a row's tokens wherever nobody jumps.
        """
        position = self.columns["position"].long()
        last = (self.lengths - 1).clamp(min=0)[:, None, None].expand(-1, position.shape[1], 1)
        return (position.gather(2, last) - position + 1).clamp(min=1)


def held_by(source: MemoryLayer, lengths: torch.Tensor | None = None, **about: Any) -> Held:
    """What a layer holds; lengths: as the device counts, over reserved storage. about: further fields."""
    if lengths is None:
        k, v = source.dense.view()
        columns = {name: source.dense.column(name) for name in source.dense.columns}
        lengths = torch.tensor(source.dense.lengths, device=k.device)
    else:
        k, v = source.dense.tensors()
        columns = dict(source.dense.columns)
    rotary = source.progress.rotary
    if source.needs.unrotated and rotary is not None:
        about["rotation"] = Rotation(rotary, rotary.module_of(source.index))
    about |= {"rotary": rotary, "index": source.index}
    return Held(k, v, lengths, columns, source.queries, source.scaling, **about)


def evictable(method: Any, held: Held, lengths: torch.Tensor) -> torch.Tensor:
    """Which tokens may go: bool [batch, 1, n]."""
    slots = torch.arange(held.k.shape[2], device=held.k.device)
    return ((slots >= method.sinks) & (slots < (lengths - method.window)[:, None]))[:, None]


def survivors(method: Any, held: Held, keep: torch.Tensor) -> torch.Tensor:
    """Which tokens stay: bool [batch, kv_heads, n], keep[b] of them in each head of row b.

    Sinks and window do, and of the others those that the method chooses.
    """
    slots = torch.arange(held.k.shape[2], device=held.k.device)
    real, free = (slots < held.lengths[:, None])[:, None], evictable(method, held, held.lengths)
    always = real & ~free
    return always | method.choose(held, free, (keep - always.sum((1, 2))).clamp(min=0))


def top(score: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Which are the keep[b] highest of score [batch, heads, n], the earlier one of equals: bool, as score."""
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    rank = torch.arange(score.shape[-1], device=score.device)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter(-1, order, (rank < keep[:, None])[:, None].expand_as(score))


def rising(chosen: torch.Tensor, most: int) -> torch.Tensor:
    """Indices, rising, of the chosen [batch, heads, n], then others: int64 [batch, heads, most]."""
    return torch.argsort((~chosen).byte(), dim=-1, stable=True)[..., :most]


def best(score: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Indices, rising, of the keep[b] highest of score [batch, heads, n]: int64 [batch, heads, most of keep]."""
    return rising(top(score, keep), int(keep.max()))
