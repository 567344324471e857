"""A test's own method: every head stored as it is told, in ways that no plan asks for, so that the store is covered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from longwave.methods.base import CacheShape
from longwave.methods.kivi import bit_pair
from longwave.methods.segmented import Segmented, SegmentedBound
from longwave.ops.codes import BITS
from longwave.ops.spectral.layout import OWN, Code
from longwave.plan.plan import LayerCodes
from longwave.plan.profile import Profile


@dataclass(frozen=True)
class Explicit(Segmented):
    """Some channels kept as values, the others as `states` coefficients a segment.

    keep: share of channels kept, 0 to 1, or a pair (K, V). keep_bits: bits of kept channels, or a pair. coef_bits: of a
    coefficient, 16 or 8. None: the model's own type. quota: "head" keeps the same number of channels in every head,
    "layer" takes the best of the layer.
    """

    name: ClassVar[str] = "explicit"
    uses_profile: ClassVar[bool] = True

    keep: float | tuple[float, float] = 1.0
    keep_bits: int | tuple[int, int] | None = None
    states: int = 1
    coef_bits: int | None = None
    segment: int = 128
    sinks: int = 4
    window: int = 256
    basis: str = "dct"
    quota: str = "head"

    @property
    def dense_tokens(self) -> tuple[int, int, int]:
        return self.sinks, self.window, self.segment

    def fits_budget(self) -> bool:
        return False

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> SegmentedBound:
        assert budget is None
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep, self.keep)
        plan = tuple(
            self._codes(*(self._kept(shape, profile, position, *pair) for pair in zip("kv", shares, strict=True)))
            for position in range(len(shape.memory_layers))
        )
        digest = "" if profile is None else profile.digest
        return SegmentedBound(self, shape, budget, digest, plan=plan, basis=self.basis, words=f"explicit({self.keep})")

    def smoothed(self, shape: CacheShape) -> SegmentedBound:
        return replace(self, keep=0.0, keep_bits=None, coef_bits=None).bind(shape, None, None)

    def _kept(self, shape: CacheShape, profile: Profile | None, position: int, side: str, share: float) -> torch.Tensor:
        """Kept channels of one layer's K or V: bool [kv_heads, head_dim], those with the largest error first."""
        heads, dim = shape.kv_heads, shape.head_dim
        whole = dim if self.quota == "head" else heads * dim
        count = int(share * whole + 1e-9)
        if count in (0, whole):
            return torch.full((heads, dim), count > 0)
        assert profile is not None
        error = profile.error(side, position)
        if self.quota == "layer":
            error = error.reshape(1, -1)
        best = error.argsort(dim=-1, descending=True, stable=True)[:, :count]
        return torch.zeros_like(error, dtype=torch.bool).scatter_(1, best, True).reshape(heads, dim)

    def _codes(self, kept_k: torch.Tensor, kept_v: torch.Tensor) -> LayerCodes:
        bits = (OWN, OWN) if self.keep_bits is None else bit_pair(self.keep_bits, (16, *BITS))
        sides: list[Any] = []
        for table, b, axis in zip((kept_k, kept_v), bits, ("time", "token"), strict=True):
            codes = []
            for kept in table.sum(-1).tolist():
                whole = kept == table.shape[1]
                residual = whole and axis == "token" and b in BITS
                states = 0 if whole and not residual else self.states
                runs = ((b, kept),) if kept else ()
                codes.append(Code(runs, states, axis, residual, state_bits=self.coef_bits or OWN, zero=axis == "time"))
            sides.append((tuple(codes), torch.argsort((~table).int(), dim=-1, stable=True)))
        (k, order_k), (v, order_v) = sides
        return LayerCodes(k, v, order_k, order_v)
