"""Compressed segments: fixed-size pages of kept values and coefficients.

A segment is made once from dense values and never touched again, so the order in which tokens arrived cannot matter.
"""

from collections.abc import Callable, Iterator

import torch

from longwave.ops.spectral import reference
from longwave.ops.spectral.basis import table
from longwave.store.channels import ChannelSplit
from longwave.store.tokens import writable


class Side:
    """K or V of the middle: per head group, kept [B, heads, M, n] and coef [B, heads, segments, S, c]."""

    def __init__(self, split: ChannelSplit):
        self.split = split
        self.kept: list[torch.Tensor] = []
        self.coef: list[torch.Tensor] = []

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.kept
        yield from self.coef

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.kept = [fn(x) for x in self.kept]
        self.coef = [fn(x) for x in self.coef]


class SegmentStore:
    """The middle of a batch as segments of `segment` tokens; rows may hold different numbers of them."""

    def __init__(self, batch: int, split_k: ChannelSplit, split_v: ChannelSplit, basis: str, states: int, segment: int):
        self.k, self.v = Side(split_k), Side(split_v)
        self.basis, self.states, self.segment = basis, states, segment
        self.counts = [0] * batch

    @property
    def tokens(self) -> list[int]:
        """Middle tokens held, per row."""
        return [count * self.segment for count in self.counts]

    def due(self, row: int, waiting: int) -> int:
        """How many of `waiting` tokens behind the window would be compressed now."""
        return waiting // self.segment * self.segment

    def _table(self, like: torch.Tensor) -> torch.Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return table(self.basis, self.states, self.segment, dtype, like.device)

    def append(self, row: int | None, k: torch.Tensor, v: torch.Tensor) -> None:
        """Compress tokens [b, H, m * segment, D] of one row (b = 1), or of all rows at once (row is None)."""
        basis = self._table(k)
        new = k.shape[2] // self.segment
        for side, x in ((self.k, k), (self.v, v)):
            for i, (kept, comp) in enumerate(side.split.split(x)):
                coef = reference.project(comp, basis).to(x.dtype)
                for held, fresh, unit in ((side.kept, kept, self.segment), (side.coef, coef, 1)):
                    if i == len(held):
                        held.append(fresh.new_zeros(len(self.counts), fresh.shape[1], 0, *fresh.shape[3:]))
                    held[i] = self._extend(held[i], fresh, row, unit)
        if row is None:
            self.counts = [count + new for count in self.counts]
        else:
            self.counts[row] += new

    def _extend(self, held: torch.Tensor, fresh: torch.Tensor, row: int | None, unit: int) -> torch.Tensor:
        if row is None and len(set(self.counts)) == 1:
            return torch.cat([held, fresh], dim=2)
        rows = range(len(self.counts)) if row is None else [row]
        need = max(self.counts[r] * unit + fresh.shape[2] for r in rows)
        if not writable(held):
            held = held.clone()
        if held.shape[2] < need:
            held = torch.cat([held, held.new_zeros(*held.shape[:2], need - held.shape[2], *held.shape[3:])], dim=2)
        for i, r in enumerate(rows):
            start = self.counts[r] * unit
            held[r, :, start : start + fresh.shape[2]] = fresh[i]
        return held

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """q [B, H, R, D] -> unscaled scores [B, H, R, M], M the longest row's middle."""
        basis = self._table(q)
        parts = [
            reference.scores(q_kept, q_comp, kept, coef, basis)
            for (q_kept, q_comp), kept, coef in zip(self.k.split.split(q), self.k.kept, self.k.coef, strict=True)
        ]
        return self.k.split.stack(parts)

    def mix(self, p: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, H, R, M] -> their share of the output [B, H, R, D]."""
        basis = self._table(p)
        parts = [
            reference.mix(p_group, kept, coef, basis)
            for p_group, kept, coef in zip(self.v.split.select(p), self.v.kept, self.v.coef, strict=True)
        ]
        return self.v.split.join(parts)

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The K and V that the store stands for: [B, H, M, D] each."""
        sides = []
        for side in (self.k, self.v):
            basis = self._table(side.coef[0])
            parts = [
                (kept, reference.synthesize(coef, basis).to(kept.dtype))
                for kept, coef in zip(side.kept, side.coef, strict=True)
            ]
            sides.append(side.split.join(parts))
        return sides[0], sides[1]

    def index(self) -> Iterator[torch.Tensor]:
        yield from self.k.split.tensors()
        yield from self.v.split.tensors()

    def parts(self) -> dict[str, list[torch.Tensor]]:
        return {"kept": self.k.kept + self.v.kept, "coefficients": self.k.coef + self.v.coef}

    def move(self, device: torch.device | str) -> None:
        for side in (self.k, self.v):
            side.map(lambda x: x.to(device))
            side.split.move(device)

    def select(self, rows: torch.Tensor) -> None:
        self.counts = [self.counts[row] for row in rows.tolist()]
        longest = max(self.counts)
        for side in (self.k, self.v):
            side.kept = [
                x.index_select(0, rows.to(x.device))[:, :, : longest * self.segment].clone() for x in side.kept
            ]
            side.coef = [x.index_select(0, rows.to(x.device))[:, :, :longest].clone() for x in side.coef]
