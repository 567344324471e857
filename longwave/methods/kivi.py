"""kivi: every channel of the middle in few bits; K in groups along time per channel, V per token.

Source: KIVI, arXiv 2402.02750: asymmetric round-to-nearest over each group's whole range, on rotated keys, a dense
window of recent tokens. Of our own: the sinks, and that K and V leave the window together, a segment at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.methods.base import CacheShape
from longwave.methods.segmented import Segmented, SegmentedBound
from longwave.ops.codes import BITS
from longwave.ops.spectral.layout import OWN, Code
from longwave.plan.plan import LayerCodes
from longwave.plan.profile import Profile


def bit_pair(value: object, allowed: tuple[int, ...]) -> tuple[int, int]:
    """`value` as bits of (K, V): a number, or a pair."""
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(b, int) and not isinstance(b, bool) and b in allowed for b in pair):
        raise ValueError(
            f"bits are {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}, or a pair (K, V) of them; got {value!r}"
        )
    return pair[0], pair[1]


@dataclass(frozen=True)
class Kivi(Segmented):
    """Plain quantisation of the middle (KIVI), the baseline to beat.

    bits: 8, 4, 3 or 2, or a pair (K, V). None: the most that the budget allows (4 where none is given).
    group: numbers that share a scale and a zero of 16 bits each: tokens of a K channel, and channels of a V token
        (at most a head). Also the tokens quantised together.
    sinks, window: first and last tokens kept dense.
    """

    name: ClassVar[str] = "kivi"

    bits: int | tuple[int, int] | None = None
    group: int = 64
    sinks: int = 4
    window: int = 256

    def __post_init__(self) -> None:
        if self.bits is not None:
            bit_pair(self.bits, BITS[:-1])
        whole("group", self.group, 8, "tokens")
        if self.group % 8:
            raise ValueError(f"codes are packed by eights, so group is a multiple of 8; got {self.group}")
        whole("sinks", self.sinks, 0, "tokens")
        whole("window", self.window, 1, "tokens")

    @property
    def dense_tokens(self) -> tuple[int, int, int]:
        return self.sinks, self.window, self.group

    def fits_budget(self) -> bool:
        return self.bits is None

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        return self._bound(shape, None, (2, 2)).page_fraction()

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> SegmentedBound:
        if self.bits is not None:
            if budget is not None:
                raise ValueError("give a budget or bits, not both: each of them decides how many bits are kept")
            return self._bound(shape, None, bit_pair(self.bits, BITS))
        if budget is None:
            return self._bound(shape, None, (4, 4))
        # from all to least, K's bits before V's: keys are what 2 bits lose most on
        for pair in ((OWN, OWN), (8, 8), (8, 4), (4, 4), (4, 3), (3, 3), (3, 2), (2, 2)):
            bound = self._bound(shape, budget, pair)
            if bound.page_fraction() <= budget:
                return bound
        raise ValueError(
            f"a budget of {budget:g} is less than kivi can do: 2 bits and their scales take "
            f"{self.least_budget(shape):.3f} of this model's cache. Use fourier, or a larger group"
        )

    def _bound(self, shape: CacheShape, budget: float | None, bits: tuple[int, int]) -> SegmentedBound:
        shape.check_pages()
        heads, dim = shape.kv_heads, shape.head_dim
        order = torch.arange(dim).expand(heads, -1).contiguous()
        keys = Code(((bits[0], dim),), states=0, axis="time", fit=False)
        values = Code(
            ((bits[1], dim),), states=0, axis="token", fit=False, group=self.group if dim % self.group == 0 else 0
        )
        layer = LayerCodes((keys,) * heads, (values,) * heads, order, order)
        k, v = (b or "all" for b in bits)
        words = f"kivi(K {k} V {v} bits, group={self.group}, sinks={self.sinks}, window={self.window})"
        return SegmentedBound(self, shape, budget, plan=(layer,) * len(shape.memory_layers), words=words)
