"""palu: of the middle only coordinates on the first axes of K before rotation and of V are kept.

Source: Palu, arXiv 2407.21118. KV heads are taken `heads` at a time. Keys are rebuilt, and rotated where they stood,
when attention asks; values never are: attention mixes their coordinates, and the answer is turned back by their axes,
which is what folding these into the output projection does, without another weight. Axes are measured once a model, on
text that ships (plan/axes.py). There ranks follow Fisher information, a matrix at a time; here a rank is given to the
axis that carries most of what its layer's K, or V, has in all, until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from longwave.checks import whole
from longwave.frame import MemoryLayer, Needs, Pass, Step
from longwave.methods.base import CacheShape, Unmeasured
from longwave.methods.held import Rotation
from longwave.methods.segmented import Segmented, SegmentedBound, SegmentedLayer
from longwave.plan.axes import Axes, axes_for
from longwave.plan.profile import Profile
from longwave.store.latents import LatentStore
from longwave.store.tokens import capacity

DEFAULT_BUDGET = 0.5
POSITION = 4  # bytes a token


@dataclass(frozen=True)
class Palu(Segmented):
    """Low rank: coordinates of K and V on the axes that carry most (Palu).

    sinks, window: first and last tokens, dense. heads: KV heads that share axes, a divisor of the model's number of
    them; None: four, or as many as divide it. axes: measured with `longwave.plan.axes.fit`; None: kept from before, or
    measured now.
    """

    name: ClassVar[str] = "palu"
    learns: ClassVar[bool] = True
    segment: ClassVar[int] = 64  # tokens that join at once
    takes_others: ClassVar[bool] = False

    sinks: int = 4
    window: int = 64
    heads: int | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        whole("sinks", self.sinks, 0, "tokens")
        whole("window", self.window, 1, "tokens")
        if self.heads is not None:
            whole("heads", self.heads, 1, "KV heads")
        if not (self.axes is None or isinstance(self.axes, Axes)):
            raise ValueError(f"axes are what longwave.plan.axes.fit gives, got {self.axes!r}")

    @property
    def dense_tokens(self) -> tuple[int, int, int]:
        return self.sinks, self.window, self.segment

    def together(self, shape: CacheShape) -> int:
        """KV heads that share axes."""
        if self.heads is None:
            return next(n for n in (4, 3, 2, 1) if shape.kv_heads % n == 0)
        if shape.kv_heads % self.heads:
            raise ValueError(f"heads divides the model's {shape.kv_heads} KV heads, and {self.heads} does not")
        return self.heads

    def known(self, model: PreTrainedModel, shape: CacheShape, tokenizer: Any) -> Palu:
        return self if self.axes else replace(self, axes=axes_for(model, shape, self.together(shape), tokenizer))

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        least = 2 * (shape.kv_heads // self.together(shape)) * shape.dtype.itemsize + POSITION
        return least / shape.token_bytes

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> SegmentedBound:
        shape.check_pages()
        fraction = DEFAULT_BUDGET if budget is None else budget
        layers, heads = len(shape.memory_layers), self.together(shape)
        groups, width = shape.kv_heads // heads, heads * shape.head_dim
        if fraction >= 1:
            return PaluBound(self, shape, budget, words="palu(all of the rank)")
        if fraction < self.least_budget(shape):
            raise ValueError(
                f"a budget of {fraction:g} leaves no axis for every K and V: give {self.least_budget(shape):.3f} or "
                "more"
            )
        if self.axes is None:
            raise Unmeasured("the axes of this model's K and V are not known: longwave.cache measures them")
        if self.axes.k.shape != (layers, groups, width, width):
            raise ValueError(f"axes are {list(self.axes.k.shape)}, and this model's {[layers, groups, width, width]}")
        numbers = (fraction * shape.token_bytes - POSITION) * layers / shape.dtype.itemsize
        ranks = shared(self.axes.powers, int(numbers / groups + 1e-9))
        mean = [sum(side) / layers for side in zip(*ranks, strict=True)]
        words = f"palu(ranks {mean[0]:.1f} and {mean[1]:.1f} of {width}, sinks={self.sinks}, window={self.window})"
        return PaluBound(self, shape, budget, words=words, ranks=ranks)


def shared(powers: torch.Tensor, total: int) -> tuple[tuple[int, int], ...]:
    """Ranks of K and V of every layer, `total` in all and each at least 1, of powers [2, layers, groups, width]: those
    that carry most of their own layer and side, in the mean of groups."""
    part = powers.double() / powers.double().sum(-1, keepdim=True).clamp(min=1e-30)
    part = part.mean(2).cummin(-1).values  # [2, layers, width]: in their order
    part[..., 0] = 2.0  # the first comes first
    order = part.flatten().argsort(descending=True, stable=True)[:total]
    given = torch.zeros_like(part).flatten().index_fill(0, order, 1.0).view_as(part).sum(-1).long()
    return tuple((k, v) for k, v in given.T.tolist())


@dataclass(frozen=True, eq=False)
class PaluBound(SegmentedBound):
    """ranks: of K and V of every memory layer; none where all tokens stay as they are."""

    method: Palu
    ranks: tuple[tuple[int, int], ...] = ()

    def decisions(self) -> Iterator[bytes]:
        yield repr(self.ranks).encode()
        if self.method.axes is not None:
            yield self.method.axes.digest.encode()

    @property
    def needs(self) -> Needs:
        return Needs(positions=True, unrotated=True) if self.ranks else Needs()

    def absorbed(self, tokens: int) -> int:
        return super().absorbed(tokens) if self.ranks else 0

    def new_store(self, position: int, batch: int, device: torch.device) -> LatentStore:
        axes, shape = self.method.axes, self.shape
        assert axes is not None
        k, v = (
            x[position, :, :rank].to(device, shape.dtype, copy=True)
            for x, rank in zip((axes.k, axes.v), self.ranks[position], strict=True)
        )
        return LatentStore(batch, k, v, shape.head_dim, self.method.segment)

    def layer(self, index: int) -> MemoryLayer:
        return PaluLayer(index, self) if self.ranks else MemoryLayer(index)

    def page_fraction(self) -> float:
        rank = sum(map(sum, self.ranks)) * (self.shape.kv_heads // self.method.together(self.shape))
        token = rank * self.shape.dtype.itemsize / len(self.ranks) + POSITION if self.ranks else self.shape.token_bytes
        return token / self.shape.token_bytes

    def shared_bytes(self, index: int, tokens: int) -> int:
        """The axes."""
        if not self.absorbed(tokens):
            return 0
        rank = sum(self.ranks[self.shape.memory_layers.index(index)])
        return rank * self.shape.kv_heads * self.shape.head_dim * self.shape.dtype.itemsize

    def _bytes(self, index: int, dense: int, middle: int) -> int:
        shape = self.shape
        columns = shape.kv_heads * sum(dtype.itemsize for dtype in self.needs.columns().values())
        total = capacity(dense) * (shape.token_bytes + columns)
        if middle:
            groups = shape.kv_heads // self.method.together(shape)
            rank = sum(self.ranks[shape.memory_layers.index(index)])
            total += middle * (rank * groups * shape.dtype.itemsize + POSITION)
            total += rank * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
        return total


class PaluLayer(SegmentedLayer):
    """Sinks, window and open segment dense, the middle as latents."""

    store: LatentStore | None

    @property
    def _rotation(self) -> Rotation:
        rotary = self.progress.rotary
        return Rotation(rotary, rotary.module_of(self.index))

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """In here the store can rotate what it rebuilds."""
        if self.store is None:
            yield
            return
        self.store.rotation = self._rotation
        try:
            yield
        finally:
            self.store.rotation = None

    def _probes(self) -> tuple[torch.Tensor, ...]:
        return (self.dense.column("position"),)

    def joined(self, k: torch.Tensor, v: torch.Tensor, *beside: torch.Tensor) -> tuple[torch.Tensor, ...]:
        positions = beside[0][:, 0, self.sinks : self.sinks + k.shape[2]].long()
        return self._rotation.off(k, positions), v, positions

    def attend(self, p: Pass) -> torch.Tensor:
        with self._lent():
            return super().attend(p)

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        with self._lent():
            return super().attend_step(p, step)

    def lse(self, p: Pass) -> torch.Tensor:
        with self._lent():
            return super().lse(p)

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        with self._lent():
            return super().materialize()

    def span(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        with self._lent():
            return super().span(row, start, stop)
