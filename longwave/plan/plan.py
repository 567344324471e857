"""`Plan`: a code for every head of K and V, layer by layer, and the pages that follow."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longwave.ops.spectral.layout import Code, Layout


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """How one layer is stored: a code for each head of K and V, and its channels by falling importance [H, D]."""

    k: tuple[Code, ...]
    v: tuple[Code, ...]
    order_k: torch.Tensor
    order_v: torch.Tensor

    def layout(self, segment: int, dtype: torch.dtype) -> Layout:
        return Layout(self.k, self.v, self.order_k, self.order_v, segment, dtype)

    def sizes(self, segment: int, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of a page of `layout`, and of its index."""
        return _sizes(self.k, self.v, self.order_k.shape[-1], segment, dtype)

    @property
    def states(self) -> int:
        """The longest table any head needs."""
        return max(1, *(code.states for code in (*self.k, *self.v)))

    def contents(self) -> Iterator[bytes]:
        """What is decided here, for a digest."""
        yield repr((self.k, self.v)).encode()
        for order in (self.order_k, self.order_v):
            yield order.to(torch.int64).cpu().contiguous().numpy().tobytes()


@functools.lru_cache(maxsize=4096)
def _sizes(k: tuple[Code, ...], v: tuple[Code, ...], dim: int, segment: int, dtype: torch.dtype) -> tuple[int, int]:
    """A size budget asks dozens of times, for layers that are mostly alike."""
    order = torch.arange(dim).expand(max(len(k), len(v)), -1)
    made = Layout(k, v, order[: len(k)], order[: len(v)], segment, dtype)
    return made.page_bytes, made.index_bytes


Plan = tuple[LayerCodes, ...]
"""A `LayerCodes` for each memory layer."""
