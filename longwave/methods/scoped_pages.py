"""Methods that keep every token and read some, over pages: what leaves the window becomes a page of another method.

Keys become pages as they were before rotation, so what is chosen can be turned to any place. Keys are scored as pages
give them back, a piece of the text at a time; of what is chosen alone the pages are opened for K and V.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from longwave.frame import Needs, Pass
from longwave.methods.base import CacheShape, Unmeasured
from longwave.methods.evicting_pages import PagedBound
from longwave.methods.scoped import Scoped, ScopedLayer
from longwave.methods.segmented import Segmented, SegmentedBound, SegmentedLayer
from longwave.ops.pieces import Coming, Made


def bind_pages(method: Scoped, store: Segmented, shape: CacheShape, budget: float | None) -> SegmentedBound:
    """The pages of a method with sinks and a window. ValueError for a budget or a store that cannot be."""
    own = {name: getattr(method, name) for name in ("sinks", "window")}
    store = replace(store, **own).unmeasured()
    try:
        inner = store.bind(shape, None, budget)
    except Unmeasured:
        raise ValueError(
            f"{method.name} keeps keys as they were before rotation, which no profile has measured, and without one "
            f"{store.name} takes at least {store.least_budget(shape):.3f} of the bytes; budget is {budget}"
        ) from None
    if inner.needs != Needs():
        raise ValueError(
            f"{store.name} watches what is asked of keys as they are turned, and {method.name} keeps them un-turned: "
            'store="kivi" or "fourier"'
        )
    return inner


@dataclass(frozen=True, eq=False)
class PagedScopedBound(PagedBound):
    """Every token of the middle is in a page."""

    method: Scoped

    @property
    def needs(self) -> Needs:
        return Needs(unrotated=True)

    @property
    def reads_exactly(self) -> bool:
        return False

    def reach(self, limit: int) -> int | None:
        return None


class PagedScopedLayer(ScopedLayer, SegmentedLayer):
    """Sinks, window and open segment dense, all un-rotated; a row's tokens are counted through them and its pages."""

    bound: Any

    def __init__(self, index: int, bound: PagedScopedBound):
        SegmentedLayer.__init__(self, index, bound)
        self.method = bound.method

    def _middle(self, row: int) -> tuple[int, int]:
        """Tokens of a row before its pages, and in them."""
        middle = self.store.tokens[row] if self.store is not None else 0
        return (self.sinks if middle else self.dense.lengths[row]), middle

    def stored_keys(self, tokens: int) -> torch.Tensor | Made | Coming:
        if self.store is None:
            return super().stored_keys(tokens)
        shape = self.bound.shape
        return Made((self.batch_size, shape.kv_heads, tokens, shape.head_dim), self.dtype, self._keys)

    def _keys(self, start: int, stop: int) -> torch.Tensor:
        dense = next(self.dense.tensors())
        out = dense.new_zeros(*dense.shape[:2], stop - start, dense.shape[3])
        for row, held in enumerate(self.rows):
            first, middle = self._middle(row)
            end = min(stop, held)
            for a, b, back in ((0, first, 0), (first, first + middle, None), (first + middle, held, middle)):
                low, high = max(a, start), min(b, end)
                if low < high:
                    found = (
                        self.store.keys(row, low - first, high - first)
                        if back is None
                        else dense[row, :, low - back : high - back]
                    )
                    out[row, :, low - start : high - start] = found
        return out

    def taken(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.store is None:
            return super().taken(index)
        behind = index.clone()
        inside = torch.zeros_like(index, dtype=torch.bool)
        for row in range(self.batch_size):
            first, middle = self._middle(row)
            inside[row] = (index[row] >= first) & (index[row] < first + middle)
            behind[row] -= (index[row] >= first + middle).long() * middle
        k, v = super().taken(behind.masked_fill(inside, 0))
        for row in range(self.batch_size):
            own = inside[row]
            if own.any():
                k[row, :, own], v[row, :, own] = self.store.taken(row, index[row, own] - self._middle(row)[0])
        return k, v

    def whole(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return super().whole(device) if self.store is None else self.materialize()

    def log_sum_exp(self, p: Pass) -> torch.Tensor | None:
        return None  # in `attend` what lies in pages is dense for the while

    def unsteady(self) -> str | None:
        return "the host finds what it reads in pages"
