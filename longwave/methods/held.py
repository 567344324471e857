"""What a layer holds when it has to choose, and the choice by worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from longwave.frame import MemoryLayer
from longwave.frame.observe import Queries


@dataclass(frozen=True, eq=False)
class Held:
    """What a layer holds when it has to choose.

    k, v [batch, kv_heads, n, head_dim], rotated; row b fills its first lengths[b] (int64 [batch], on their device).
    columns: "position" and what the method `needs`, [batch, kv_heads, n] each. queries: of the last tokens, where
    needed.
    scaling: of the scores.
    """

    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor
    columns: dict[str, torch.Tensor]
    queries: Queries | None
    scaling: float


def held_by(layer: MemoryLayer, lengths: torch.Tensor | None = None) -> Held:
    """What a layer holds; lengths: as the device counts, over reserved storage."""
    if lengths is None:
        k, v = layer.dense.view()
        columns = {name: layer.dense.column(name) for name in layer.dense.columns}
        lengths = torch.tensor(layer.dense.lengths, device=k.device)
    else:
        k, v = layer.dense.tensors()
        columns = dict(layer.dense.columns)
    return Held(k, v, lengths, columns, layer.queries, layer.scaling)


def evictable(method: Any, held: Held, lengths: torch.Tensor) -> torch.Tensor:
    """Which tokens may go: bool [batch, 1, n]."""
    slots = torch.arange(held.k.shape[2], device=held.k.device)
    return ((slots >= method.sinks) & (slots < (lengths - method.window)[:, None]))[:, None]


def survivors(method: Any, held: Held, keep: torch.Tensor) -> torch.Tensor:
    """Indices, rising, of the keep[b] tokens that each head of row b keeps: int64 [batch, kv_heads, most of keep].

    Sinks and window stay, then the best by score, the earlier one of equals.
    """
    slots = torch.arange(held.k.shape[2], device=held.k.device)
    score = method.score(held).float()
    score = score.masked_fill(~evictable(method, held, held.lengths), float("inf"))
    score = score.masked_fill((slots >= held.lengths[:, None])[:, None], float("-inf"))
    return best(score, keep)


def best(score: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Indices, rising, of the keep[b] highest of score [batch, heads, n]: int64 [batch, heads, most of keep]."""
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    rank = torch.arange(score.shape[-1], device=score.device)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(
        -1, order, (rank < keep[:, None])[:, None].expand_as(score)
    )
    return torch.argsort((~chosen).byte(), dim=-1, stable=True)[..., : int(keep.max())]
