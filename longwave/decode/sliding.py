"""Sliding layers in steps: transformers' own storage of them moves with every token, a ring of columns does not."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.cache_utils import DynamicSlidingWindowLayer

from longwave.frame.standin import StandIn


class SlidingStep(StandIn):
    """What the model sees of a sliding layer during a step: the new token takes the column of the one that leaves.

    keys, values [batch, kv_heads, window, head_dim] and real bool [batch, window] stay where they are; at int64 [1] is
    the column that comes next, the oldest once the window is full. Rotated keys have no order to keep.
    """

    is_sliding = True

    def __init__(self, layer: DynamicSlidingWindowLayer, rows: list[int], columns: int):
        """layer: filled, of `columns` columns of which the last rows[b] of row b are real tokens."""
        super().__init__()
        self.layer, self.window = layer, int(layer.sliding_window)
        k, v = layer.keys, layer.values
        assert k is not None
        assert v is not None
        self._held = held = k.shape[2]
        self.keys, self.values = (x.new_zeros(*x.shape[:2], self.window, x.shape[3]) for x in (k, v))
        self.keys[:, :, :held], self.values[:, :, :held] = k, v
        first = torch.tensor(rows, device=k.device)[:, None] * -1 + columns  # the first real column of each row
        place = torch.arange(self.window, device=k.device) + (columns - held)
        self.real = (place >= first) & (place < columns)
        self.at = torch.full((1,), held % self.window, device=k.device)
        layer.keys, layer.values = self.keys, self.values  # what is held is what the cache reports

    @property
    def states(self) -> list[torch.Tensor]:
        """All that a step changes."""
        return [self.keys, self.values, self.real, self.at]  # type: ignore[list-item]

    def forward(
        self,
        q: torch.Tensor,
        scaling: float,
        mask: object,
        module: Any = None,
        positions: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [batch, query_heads, 1, head_dim] -> same shape. The window is the layer's own, whatever the mask says."""
        assert sinks is None  # `supports` has seen to it
        k, v = self.take()
        held_k, held_v = self.keys, self.values
        assert held_k is not None
        assert held_v is not None
        held_k.index_copy_(2, self.at, k)
        held_v.index_copy_(2, self.at, v)
        self.real.index_fill_(1, self.at, True)
        self.at.add_(1).remainder_(self.window)
        grouped = q.reshape(q.shape[0], held_k.shape[1], -1, q.shape[3])  # a group's heads as so many queries
        return sdpa(grouped, held_k, held_v, self.real[:, None, None], scale=scaling).reshape(q.shape)

    def release(self, steps: int) -> None:
        """Hand transformers' layer what it would hold after `steps` tokens."""
        keep = min(self._held + steps, self.window - 1)
        order = (self.at + torch.arange(-keep, 0, device=self.at.device)) % self.window
        assert self.keys is not None
        assert self.values is not None
        self.layer.keys, self.layer.values = self.keys[:, :, order], self.values[:, :, order]
        self.layer.cumulative_length += steps

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # what a row sees is kept here

    def get_max_length(self) -> int:
        return self.window


def why_not(layer: Any, kind: str | None) -> str | None:
    """Why a layer of transformers' own cannot be stepped, or None if it can. kind: what the config calls it."""
    name = type(layer).__name__
    if type(layer) is not DynamicSlidingWindowLayer or kind != "sliding_attention":
        what = f"{kind} in {name}" if kind else name
        return f"keeps its past in transformers' own way ({what}), whose storage moves"
    return "records its past for assisted decoding" if layer.record_past else None
