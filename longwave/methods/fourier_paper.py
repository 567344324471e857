"""fourier-paper: the published setting of FourierAttention, arXiv 2506.11886.

One period over the whole middle, complex DFT, mean and maximum-deviation correction, and a share of channels that is
compressed by layer. What the released code does otherwise: docs/fourier.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from longwave.checks import whole
from longwave.frame import MemoryLayer
from longwave.methods.base import CacheShape, Unmeasured
from longwave.methods.segmented import Segmented, SegmentedBound, SegmentedLayer
from longwave.plan.profile import Profile
from longwave.store.channels import ChannelSplit
from longwave.store.period import FLUSH, PeriodStore
from longwave.store.tokens import capacity

Table = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def paper_share(position: int, layers: int) -> tuple[float, float]:
    """Share of (K, V) channels that the paper compresses in a layer: most in the first four, least in the last eight.

    Its two models have 28 and 32 layers; with fewer than 16 the two bands shrink in proportion.
    """
    first, last = (4, 8) if layers >= 16 else (layers // 8, layers // 4)
    if position < first:
        return 0.90, 0.95
    if position >= layers - last:
        return 0.50, 0.70
    return 0.80, 0.80


@dataclass(frozen=True)
class FourierPaper(Segmented):
    """The published setting of FourierAttention: one period over the whole middle.

    keep: share of channels kept as values, 0 to 1, or a pair (K, V); None is the paper's schedule by layer. Channels
        are ranked over a layer.
    states: coefficients a compressed channel keeps, cosines and sines: an even number.
    sinks, window: first and last tokens kept dense.
    stretch: whether each smooth channel is stretched to its true largest deviation.
    reserve: tokens that the period leaves free for growth before it is fitted again.
    """

    name: ClassVar[str] = "fourier-paper"
    uses_profile: ClassVar[bool] = True

    keep: float | tuple[float, float] | None = None
    states: int = 1024
    sinks: int = 4
    window: int = 1020
    stretch: bool = True
    reserve: int = 512

    def __post_init__(self) -> None:
        for share in self.keep if isinstance(self.keep, tuple) else () if self.keep is None else (self.keep,):
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(
                    f"keep is a share of channels from 0 to 1, or a pair (K, V) of them; got {self.keep!r}"
                )
        if isinstance(self.keep, tuple) and len(self.keep) != 2:
            raise ValueError(f"keep as a tuple is (K, V), got {self.keep!r}")
        if whole("states", self.states, 2, "coefficients") % 2:
            raise ValueError(f"one period stores cosine and sine rows, so states must be even; got {self.states}")
        whole("sinks", self.sinks, 0, "tokens")
        whole("window", self.window, 1, "tokens")
        whole("reserve", self.reserve, 1, "tokens")
        if not isinstance(self.stretch, bool):
            raise ValueError(f"stretch is True or False, got {self.stretch!r}")

    @property
    def dense_tokens(self) -> tuple[int, int, int]:
        return self.sinks, self.window, 0

    def fits_budget(self) -> bool:
        return False

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> PaperBound:
        if budget is not None:
            raise ValueError(f"{self.name} keeps what the paper keeps and takes no budget: use fourier, or keep")
        layers = len(shape.memory_layers)
        tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        for position in range(layers):
            if self.keep is None:
                shares = tuple(1 - share for share in paper_share(position, layers))
            else:
                shares = self.keep if isinstance(self.keep, tuple) else (self.keep, self.keep)
            k, v = (
                self._select(shape, profile, position, side, share) for side, share in zip("kv", shares, strict=True)
            )
            tables.append((k, v))
        every = [table for pair in tables for table in pair]
        share = float(sum(table.sum() for table in every)) / sum(table.numel() for table in every)
        words = f"fourier-paper(keep={share:.3f}, states={self.states}, sinks={self.sinks}, window={self.window})"
        digest = "" if profile is None else profile.digest
        return PaperBound(self, shape, budget, digest, words=words, tables=tuple(tables))

    def smoothed(self, shape: CacheShape) -> PaperBound:
        """Every channel compressed: what `calibrate` measures the channels' errors with."""
        return replace(self, keep=0.0).bind(shape, None, None)

    def _select(
        self, shape: CacheShape, profile: Profile | None, position: int, side: str, share: float
    ) -> torch.Tensor:
        """Kept channels of one layer's K or V: bool [kv_heads, head_dim], those with the largest error first."""
        heads, dim = shape.kv_heads, shape.head_dim
        every = heads * dim
        count = int(share * every + 1e-9)
        if self.keep is None:  # the paper rounds the compressed count down instead
            count = every - int((1 - share) * every + 1e-9)
        if count in (0, every):
            return torch.full((heads, dim), count > 0)
        if profile is None:
            raise Unmeasured(
                "which channels to keep is not known for this model: measure it with "
                "`longwave calibrate MODEL --method fourier-paper --text FILE --out PROFILE` and pass profile=PROFILE"
            )
        best = profile.error(side, position).flatten().argsort(descending=True, stable=True)[:count]
        kept = torch.zeros(every, dtype=torch.bool)
        kept[best] = True
        return kept.view(heads, dim)


@dataclass(frozen=True, eq=False)
class PaperBound(SegmentedBound):
    """tables: per memory layer, the channels of K and V kept as values: bool [kv_heads, head_dim] each."""

    method: FourierPaper
    tables: Table = ()

    def decisions(self) -> Iterator[bytes]:
        for pair in self.tables:
            for table in pair:
                yield table.numpy().tobytes()

    @property
    def kept(self) -> Table:
        return self.tables

    def new_store(self, position: int, batch: int, device: torch.device) -> Any:
        splits = [ChannelSplit(table) for table in self.tables[position]]
        for split in splits:
            split.move(device)
        return PeriodStore(batch, splits[0], splits[1], self.method.states, self.method.reserve, self.method.stretch)

    def absorbed(self, tokens: int) -> int:
        waiting = max(0, tokens - self.method.sinks - self.method.window)
        return waiting if waiting > self.method.states else 0

    def layer(self, index: int) -> MemoryLayer:
        return SegmentedLayer(index, self)

    def shared_bytes(self, index: int, tokens: int) -> int:
        return self._index_bytes if self.absorbed(tokens) else 0

    @property
    def _index_bytes(self) -> int:
        """Which channel is where, there and back."""
        return 2 * self.shape.kv_heads * (2 * self.shape.head_dim + 1) * 8

    def _bytes(self, index: int, dense: int, middle: int) -> int:
        shape = self.shape
        total = capacity(dense) * shape.token_bytes
        if not middle:
            return total
        total += self._index_bytes
        floats = 8 if shape.dtype == torch.float64 else 4
        for table in self.tables[shape.memory_layers.index(index)]:
            kept, comp = int(table.sum()), int((~table).sum())
            total += (middle * kept + self.method.states * comp) * shape.dtype.itemsize + 4 * comp * floats
        return total

    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        shape, first = self.shape, self.method.sinks + self.method.window
        if batch > 1:
            dense = min(tokens, first + max(self.method.states, FLUSH))
            layers = sum(self._bytes(i, dense, self.absorbed(tokens)) for i in shape.memory_layers)
            return batch * (layers + shape.sliding_bytes(tokens))
        # up to FLUSH tokens wait, and the threshold itself is the most that stays dense
        threshold = min(tokens, first + self.method.states)
        waiting = FLUSH * shape.token_bytes * len(shape.memory_layers)
        return max(self.nbytes(n, batch) for n in (threshold, tokens)) + batch * waiting
