"""What a fit leaves behind, as tensors: all that coding one segment needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longwave.codec.blob import VERSION
from longwave.codec.entropy import Tables
from longwave.codec.find import Places
from longwave.codec.quantise import OCTAVE
from longwave.codec.rotation import Rotation
from longwave.codec.transform import BANDS

LEAST = -20 * OCTAVE  # the size of what is always 0


def sized(x: Tensor) -> Tensor:
    """int16: sizes above 0 as whole numbers of 1 / OCTAVE octaves, so that coder and decoder agree to the bit."""
    return (x.double().clamp(min=2.0 ** (LEAST / OCTAVE)).log2() * OCTAVE).round().to(torch.int16)


@dataclass(frozen=True, eq=False)
class Scales:
    """How large a basis' coefficients are. band int16 [m, BANDS]: mean absolute sizes. spread int16 [m]: root mean
    squares. As `sized` says them."""

    band: Tensor
    spread: Tensor

    @classmethod
    def of(cls, absolute: Tensor, square: Tensor) -> Scales:
        """absolute float [m, BANDS], square float [m]."""
        return cls(sized(absolute), sized(square.sqrt()))

    def coded(self, step: int) -> NDArray[np.int64]:
        """Components whose root mean square is at least a third of a step (log2 3 octaves below it); the others are
        left out whole."""
        return np.flatnonzero(self.spread.numpy().astype(np.int64) >= step - 51)


@dataclass(frozen=True, eq=False)
class Basis:
    """Of a group of layers and a side. axes float16 [g H D, m], orthonormal columns in weighted units. known, blind:
    sizes with prediction from ids and without."""

    axes: Tensor
    known: Scales
    blind: Scales

    @cached_property
    def orthonormal(self) -> Tensor:
        """The axes in float32, orthonormal to it again: one step of Newton's for the polar factor. With float16's
        rounding left in, coding what was decoded would give other numbers at fine steps."""
        axes = self.axes.float()
        return 1.5 * axes - 0.5 * axes @ (axes.mT @ axes)


@dataclass(frozen=True, eq=False)
class Side:
    """K's (turned back) or V's, c = L H D channels, layer by layer.

    weight, mean float32 [c]. predictor float16 [2r + 1, c], or none [0, c], times unit float32 [c]. bases: a group's.
    """

    weight: Tensor
    mean: Tensor
    predictor: Tensor
    unit: Tensor
    bases: tuple[Basis, ...]


@dataclass(frozen=True, eq=False)
class Fitted:
    """layers, kv_heads, head_dim: of the memory layers. groups: layers coded together, as (first, behind the last).
    table float16 [vocabulary, r]: the embedding. frequency uint16 [CONTEXTS, 256]: entropy tables. cosines: whether
    time is transformed."""

    layers: int
    kv_heads: int
    head_dim: int
    groups: tuple[tuple[int, int], ...]
    table: Tensor
    rotation: Rotation
    k: Side
    v: Side
    frequency: Tensor
    places: Places | None
    cosines: bool = True

    @property
    def width(self) -> int:
        """Channels of a layer."""
        return self.kv_heads * self.head_dim

    def columns(self, group: int) -> slice:
        """The channels of a group of layers."""
        first, last = self.groups[group]
        return slice(first * self.width, last * self.width)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them by name, in a fixed order."""
        yield "table", self.table
        yield "frequency", self.frequency
        yield from (
            ("rotation.partner", self.rotation.partner),
            ("rotation.frequency", self.rotation.frequency),
            ("rotation.scale", self.rotation.scale),
        )
        for name, side in (("k", self.k), ("v", self.v)):
            for part in ("weight", "mean", "predictor", "unit"):
                yield f"{name}.{part}", getattr(side, part)
            for number, basis in enumerate(side.bases):
                at = f"{name}.{number}"
                yield f"{at}.axes", basis.axes
                for kind in ("known", "blind"):
                    scales = getattr(basis, kind)
                    yield f"{at}.{kind}.band", scales.band
                    yield f"{at}.{kind}.spread", scales.spread
        if self.places is not None:
            for part in ("axes", "rows", "centre"):
                yield f"places.{part}", getattr(self.places, part)

    @classmethod
    def from_tensors(
        cls, found: dict[str, Tensor], layers: int, kv_heads: int, head_dim: int, groups: tuple[tuple[int, int], ...],
        limit: int, cosines: bool,
    ) -> Fitted:  # fmt: skip
        """The inverse of `tensors`. KeyError and ValueError where they do not make one."""
        sides = []
        for name in "kv":
            bases = []
            for number in range(len(groups)):
                at = f"{name}.{number}"
                scales = [Scales(found[f"{at}.{x}.band"], found[f"{at}.{x}.spread"]) for x in ("known", "blind")]
                bases.append(Basis(found[f"{at}.axes"], *scales))
            weight, mean, predictor, unit = (found[f"{name}.{x}"] for x in ("weight", "mean", "predictor", "unit"))
            sides.append(Side(weight, mean, predictor, unit, tuple(bases)))
        turns = Rotation(*(found[f"rotation.{part}"] for part in ("partner", "frequency", "scale")))
        seen = None
        if "places.rows" in found:
            seen = Places(found["places.axes"], found["places.rows"], found["places.centre"], limit)
        k, v = sides
        made = cls(layers, kv_heads, head_dim, groups, found["table"], turns, k, v, found["frequency"], seen, cosines)
        made.check()
        return made

    def check(self) -> None:
        """ValueError where the parts do not fit each other."""
        ends = [0, *(last for _, last in self.groups)]
        if self.groups != tuple(pairwise(ends)) or ends[-1] != self.layers:
            raise ValueError(f"groups of layers {self.groups} do not make up {self.layers} layers")
        channels = self.layers * self.width
        for name, side in (("k", self.k), ("v", self.v)):
            rows = len(side.predictor)
            if rows not in (0, 2 * self.table.shape[1] + 1):
                raise ValueError(f"{name}'s predictor has {rows} rows for an embedding of {self.table.shape[1]}")
            if any(x.shape[-1] != channels for x in (side.weight, side.mean, side.predictor, side.unit)):
                raise ValueError(f"{name} has not {channels} channels")
            for number, basis in enumerate(side.bases):
                cut, m = self.columns(number), basis.axes.shape[1]
                ok = basis.axes.shape[0] == cut.stop - cut.start
                for scales in (basis.known, basis.blind):
                    ok = ok and tuple(scales.band.shape) == (m, BANDS) and tuple(scales.spread.shape) == (m,)
                if not ok:
                    raise ValueError(f"{name}'s basis of layers {self.groups[number]} does not fit its sizes")
        if tuple(self.rotation.frequency.shape) != (self.layers, self.head_dim):
            raise ValueError(f"the rotation is not of {self.layers} layers of {self.head_dim} channels")
        self.entropy  # noqa: B018  # checks its tables

    @cached_property
    def entropy(self) -> Tables:
        return Tables.of(self.frequency.numpy())

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes: of every number, the shapes and the format."""
        found = hashlib.blake2b(repr((VERSION, self.groups, self.kv_heads, self.cosines)).encode(), digest_size=16)
        for name, x in self.tensors():
            found.update(f"{name} {list(x.shape)} {x.dtype}".encode())
            found.update(x.flatten().view(torch.uint8).numpy().tobytes())
        return found.digest()
