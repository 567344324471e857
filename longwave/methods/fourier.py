"""fourier: channels that long context does not need are kept as their mean along time, the rest as few bits.

Source: FourierAttention, arXiv 2506.11886, for the split of channels; segments, bits, the plan and the decoding without
rebuilding K and V are ours (docs/fourier.md). The published setting is `fourier-paper`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from longwave import plan as planner
from longwave.checks import whole
from longwave.methods.base import CacheShape
from longwave.methods.segmented import Segmented, SegmentedBound
from longwave.ops.spectral.layout import Code
from longwave.plan.plan import LayerCodes
from longwave.plan.profile import Profile

DEFAULT_BUDGET = 0.25
PLANS = ("measured", "uniform", "bits")
STATES, STATE_BITS = 1, 8  # more coefficients earned nothing at any budget (docs/results.md)


@dataclass(frozen=True)
class Fourier(Segmented):
    """Channels that long context does not need become a few coefficients along time (FourierAttention).

    A plan decides for every head of K and V which channels stay and in how many bits (docs/planner.md).

    plan: None takes "measured" where the profile holds a measurement and "uniform" otherwise, which says so.
        "uniform" treats all heads alike; "bits" is measured, and compresses no channel.
    segment: tokens compressed together.
    sinks, window: first and last tokens kept dense.
    """

    name: ClassVar[str] = "fourier"
    uses_profile: ClassVar[bool] = True

    plan: str | None = None
    segment: int = 128
    sinks: int = 4
    window: int = 256

    def __post_init__(self) -> None:
        if self.plan not in (None, *PLANS):
            raise ValueError(f"plan is {', '.join(PLANS[:-1])} or {PLANS[-1]}, got {self.plan!r}")
        whole("sinks", self.sinks, 0, "tokens")
        whole("window", self.window, 1, "tokens")
        if whole("segment", self.segment, 8, "tokens") % 8:
            raise ValueError(f"codes are packed by eights: segment is a multiple of 8, got {self.segment}")

    @property
    def dense_tokens(self) -> tuple[int, int, int]:
        return self.sinks, self.window, self.segment

    def page(self, shape: CacheShape) -> planner.Shape:
        """How pages are cut."""
        return planner.Shape(self.segment, shape.head_dim, STATES, STATE_BITS, shape.dtype)

    def least_budget(self, shape: CacheShape) -> float:
        page = self.page(shape)
        if self.plan == "bits":  # at most: which of K's options compress nothing depends on the profile
            pair = planner.key_code(None, 8 + 32 / page.segment, page), planner.value_code(1, page)
        else:
            pair = planner.key_code(None, 0.0, page), planner.value_code(0, page)
        head = sum(planner.code_bytes(code, page) for code in pair)
        return head * shape.kv_heads * len(shape.memory_layers) / self._dense_bytes(shape)

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> SegmentedBound:
        budget = DEFAULT_BUDGET if budget is None else budget
        measured = profile.sensitivity if profile is not None else None
        kind = self.plan or ("measured" if measured is not None else "uniform")
        if kind != "uniform" and measured is None:
            raise ValueError(
                f'plan="{kind}" needs a profile with a measurement, and there is none for this model: make one with '
                "`longwave calibrate MODEL --text FILE --out PROFILE` and pass profile=PROFILE"
            )
        layers, heads, page = len(shape.memory_layers), shape.kv_heads, self.page(shape)
        try:
            chosen = iter(planner.planned(measured, kind, layers, heads, page, budget * self._dense_bytes(shape)))
        except planner.TooSmall as error:
            raise ValueError(
                f"a budget of {budget:g} is less than {self.name} can do with these options: their smallest plan takes "
                f"{error.needed / self._dense_bytes(shape):.4f}. A longer segment takes less"
            ) from None
        straight = torch.arange(shape.head_dim).expand(heads, -1)
        codes = []
        for position in range(layers):
            k, v = zip(*(next(chosen) for _ in range(heads)), strict=True)
            codes.append(LayerCodes(k, v, straight if measured is None else measured.order(position), straight))
        made, warn = f"{kind} plan for {budget:g}", None
        if measured is None and budget < 1:
            made += ", nothing measured"
            if self.plan is None:
                warn = (
                    'no measurement of this model: all heads are treated alike (plan="uniform"). '
                    "`longwave calibrate` makes a profile that costs less quality at the same bytes"
                )
        elif measured is not None and budget < 1:
            differing = self._cut_differs(measured.about)
            if differing:
                made = f"{kind} plan for {budget:g}, by costs of other pages ({differing})"
                warn = (
                    f"the profile's costs are of other pages than these ({differing}), so the plan is a guess: measure "
                    "again with `longwave calibrate -o segment=...`, or leave the option out"
                )
        words = f"fourier({made}, segment={self.segment}, sinks={self.sinks}, window={self.window})"
        return SegmentedBound(
            self,
            shape,
            budget,
            "" if profile is None else profile.digest,
            plan=tuple(codes),
            words=words,
            warn=warn,
        )

    def _cut_differs(self, about: dict[str, Any]) -> str:
        """In what the pages that were measured differ from these, or ""."""
        here = {"segment": self.segment, "states": STATES}
        return ", ".join(
            f"{name} {about[name]}, not {value}" for name, value in here.items() if about.get(name, value) != value
        )

    def _dense_bytes(self, shape: CacheShape) -> int:
        """A segment of all layers, dense."""
        return len(shape.memory_layers) * self.segment * shape.token_bytes

    def smoothed(self, shape: CacheShape) -> SegmentedBound:
        """Every channel compressed, in the model's own type: what `calibrate` measures the channels' errors with."""
        code = Code(states=STATES)
        order = torch.arange(shape.head_dim).expand(shape.kv_heads, -1)
        layer = LayerCodes((code,) * shape.kv_heads, (code,) * shape.kv_heads, order, order)
        return SegmentedBound(self, shape, plan=(layer,) * len(shape.memory_layers), words="fourier(nothing kept)")
