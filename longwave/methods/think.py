"""think: keys of the middle keep the channels that queries ask, head by head; values stay whole.

Source: ThinK, arXiv 2407.21018: a channel is worth |Q[:, c]| |K[:, c]| by the last queries of the prompt and all of its
keys; which ones stay is settled once, in every row, layer and head, and the window stays whole. Queries of a group
speak together. There generated keys stay whole; here they are packed as they leave the window, a segment at a time,
into the same channels, so that the budget holds. Of our own: the sinks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.frame import MemoryLayer, Needs
from longwave.methods.base import CacheShape
from longwave.methods.segmented import Segmented, SegmentedBound, SegmentedLayer
from longwave.plan.profile import Profile
from longwave.store.packed import PackedStore
from longwave.store.tokens import capacity

DEFAULT_RATIO = 0.4


@dataclass(frozen=True)
class ThinK(Segmented):
    """Channels of keys that queries ask, packed; values whole (ThinK).

    ratio: the share of a key's channels that go, from 0 to below 1. None: what the budget demands (0.4 where none is
        given); all values stay, so a budget is above 0.5.
    queries: of the last so many tokens, which choose.
    sinks, window: first and last tokens kept whole.
    """

    name: ClassVar[str] = "think"
    segment: ClassVar[int] = 64  # tokens packed together

    ratio: float | None = None
    queries: int = 32
    sinks: int = 4
    window: int = 64

    def __post_init__(self) -> None:
        if self.ratio is not None:
            number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
            if not number or not 0 <= self.ratio < 1:
                raise ValueError(f"ratio is the share of channels that go, from 0 to below 1; got {self.ratio!r}")
        whole("queries", self.queries, 1, "tokens")
        whole("sinks", self.sinks, 0, "tokens")
        whole("window", self.window, 1, "tokens")

    @property
    def dense_tokens(self) -> tuple[int, int, int]:
        return self.sinks, self.window, self.segment

    def fits_budget(self) -> bool:
        return self.ratio is None

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        """All values, and one channel of each key."""
        return (1 + 1 / shape.head_dim) / 2

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> ThinkBound:
        dim = shape.head_dim
        if self.ratio is not None and budget is not None:
            raise ValueError("give a budget or a ratio, not both: each of them decides how many channels stay")
        if budget is None:
            kept = dim - int((DEFAULT_RATIO if self.ratio is None else self.ratio) * dim + 1e-9)
        else:
            kept = math.floor((2 * budget - 1) * dim + 1e-9)
        if kept < 1:
            raise ValueError(
                f"think keeps all values, half of the bytes: it cannot meet a budget of {budget:g}, its smallest is "
                f"{self.least_budget(shape):.4f} (window and sinks on top). Take kivi, fourier or an evicting method"
            )
        words = f"think({kept} of {dim} key channels, sinks={self.sinks}, window={self.window})"
        return ThinkBound(self, shape, budget, words=words, channels=kept)


@dataclass(frozen=True, eq=False)
class ThinkBound(SegmentedBound):
    """channels: of each key of the middle, how many stay."""

    method: ThinK
    channels: int = 0

    def decisions(self) -> Iterator[bytes]:
        yield str(self.channels).encode()

    @property
    def whole(self) -> bool:
        """Whether all channels stay: then everything is dense."""
        return self.channels == self.shape.head_dim

    @property
    def needs(self) -> Needs:
        return Needs() if self.whole else Needs(queries=self.method.queries)

    def absorbed(self, tokens: int) -> int:
        return 0 if self.whole else super().absorbed(tokens)

    def layer(self, index: int) -> MemoryLayer:
        return MemoryLayer(index) if self.whole else SegmentedLayer(index, self)

    def new_store(self, position: int, batch: int, device: torch.device) -> PackedStore:
        shape, segment = self.shape, self.method.segment
        return PackedStore(batch, shape.kv_heads, self.channels, shape.head_dim, segment, shape.dtype, device)

    def prepare(self, layer: SegmentedLayer, rows: slice) -> None:
        for row in range(layer.batch_size)[rows]:
            if not layer.store.decided[row]:
                layer.store.decide(row, energy(layer, row, self.method.queries))

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        shape, segment = self.shape, self.method.segment
        page = segment * shape.kv_heads * (self.channels + shape.head_dim) * shape.dtype.itemsize
        return [(page, 2 * shape.kv_heads * self.channels)] * len(shape.memory_layers)

    def store_bytes(self, index: int, pages: int) -> int:
        page, names = self._sizes[0]
        segment = self.method.segment
        return capacity(pages * segment) * page // segment + names

    def shared_bytes(self, index: int, tokens: int) -> int:
        return 0  # every row has channels of its own

    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        return self.nbytes(tokens, batch) if self.whole else super().peak_bytes(tokens, batch)


def energy(layer: SegmentedLayer, row: int, queries: int) -> torch.Tensor:
    """What each channel is worth to the last so many queries of a row, over all keys held: float [kv_heads, head_dim].

    The sum over queries and their group of q^2 times that over keys of k^2: squares of the norms, in their order.
    """
    k = layer.dense.view()[0][row, :, : layer.dense.lengths[row]]
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    keys = k.to(wide).square().sum(1)
    if layer.queries is None or layer.queries.q is None:  # written without a pass
        return keys
    last = layer.queries.last(queries, 1)  # others may remember more
    assert last.q is not None
    asked = last.q[row, :, last.width - last.counts[row] :]
    return keys * asked.to(wide).square().sum(1).unflatten(0, (k.shape[0], -1)).sum(1)
