"""fourier: channels that long context does not need are kept as their mean along time, the rest as few bits.

Source: FourierAttention, arXiv 2506.11886, for the split of channels; segments, bits, the plan and the decoding without
rebuilding K and V are ours (docs/fourier.md). The published setting is `fourier-paper`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from longwave import plan as planner
from longwave.checks import whole
from longwave.methods.base import CacheShape, Unmeasured
from longwave.methods.segmented import Segmented, SegmentedBound
from longwave.plan.plan import LayerCodes
from longwave.plan.profile import Profile, Sensitivity

DEFAULT_BUDGET = 0.25
PLANS = ("measured", "uniform", "bits", "safe")
FINE = 64  # the segment of a plan without a measurement that has 4 bits a number: scales of as few tokens as KIVI's
STATES, STATE_BITS = 1, 8  # more coefficients earned nothing at any budget (docs/results.md)


@dataclass(frozen=True)
class Fourier(Segmented):
    """Channels that long context does not need become a few coefficients along time (FourierAttention).

    A plan decides for every head of K and V which channels stay and in how many bits (docs/planner.md).

    plan: None takes "measured" where the model is measured and "safe" otherwise, which says so. "uniform" is measured
        and treats all heads alike; "bits" is measured and compresses no channel.
    segment: tokens compressed together; 64 where more are said, nothing is measured and there are 4 bits a number.
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

    def unmeasured(self) -> Fourier:
        return replace(self, plan=self.plan or "safe")

    def measured_by(self) -> Fourier | None:
        return None if self.plan == "safe" else self

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        measured, kind = self._basis(profile)
        least, floor = ("coarse", self._safe(shape)) if kind == "safe" else (kind, 0.0)
        smallest = planner.menu(measured, least, len(shape.memory_layers), shape.kv_heads, self.page(shape)).spent
        return max(smallest / self._dense_bytes(shape), floor)

    @staticmethod
    def _safe(shape: CacheShape) -> float:
        """The smallest budget without a measurement."""
        return planner.SAFE_BITS / (8 * shape.dtype.itemsize)

    def _flattest(self, shape: CacheShape) -> float:
        """What every plan takes: nothing but the means of every head."""
        page = self.page(shape)
        head = sum(
            planner.code_bytes(x, page) for x in (planner.key_code(None, 0.0, page), planner.value_code(0, page))
        )
        return head * shape.kv_heads * len(shape.memory_layers) / self._dense_bytes(shape)

    def _basis(self, profile: Profile | None) -> tuple[Sensitivity | None, str]:
        """What was measured, and the kind of plan that is made of it."""
        measured = profile.sensitivity if profile is not None and self.plan != "safe" else None
        kind = self.plan or ("measured" if measured is not None else "safe")
        if kind != "safe" and measured is None:
            raise Unmeasured(
                f'plan="{kind}" needs a measurement of the model, and there is none: leave measure=False out, or make '
                "a profile with `longwave calibrate MODEL --text FILE --out PROFILE` and pass profile=PROFILE"
            )
        return measured, kind

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> FourierBound:
        shape.check_pages()
        budget = DEFAULT_BUDGET if budget is None else budget
        measured, kind = self._basis(profile)
        fine = FINE if kind == "safe" and 4 <= budget * 8 * shape.dtype.itemsize < 8 * shape.dtype.itemsize else 0
        if fine and self.segment % fine == 0 and self.segment > fine:
            return replace(self, segment=fine).bind(shape, profile, budget)
        layers, heads, page = len(shape.memory_layers), shape.kv_heads, self.page(shape)
        limit, flattest = budget * self._dense_bytes(shape), self._flattest(shape)
        if kind == "safe" and flattest <= budget < self._safe(shape):
            raise Unmeasured(
                f"a budget of {budget:g} is less than {self.name} can do for a model that was not measured "
                f"({self._safe(shape):.2g}): below that, plans made of another model's costs fall apart. Let it be "
                "measured (leave measure=False out), pass profile=PROFILE of `longwave calibrate`, or give a larger "
                "budget"
            )
        try:
            codes, expected = planner.planned(measured, kind, layers, heads, page, limit)
        except planner.TooSmall as error:
            unmeasured = kind == "safe" and budget >= flattest  # a measured plan may do
            least = error.needed / self._dense_bytes(shape) if kind != "safe" or unmeasured else flattest
            raise (Unmeasured if unmeasured else ValueError)(
                f"a budget of {budget:g} is less than {self.name} can do with these options"
                f"{' for a model that was not measured' if unmeasured else ''}: their smallest plan takes {least:.4f}. "
                "A longer segment takes less"
            ) from None
        straight = torch.arange(shape.head_dim).expand(heads, -1)
        chosen, plan = iter(codes), []
        for position in range(layers):
            k, v = zip(*(next(chosen) for _ in range(heads)), strict=True)
            plan.append(LayerCodes(k, v, straight if measured is None else measured.order(position), straight))
        made, warn = f"{kind} plan for {budget:g}" if budget < 1 else "everything kept", None
        if measured is None and budget < 1:
            made += ", nothing measured"
            if self.plan is None:
                warn = (
                    "this model was not measured, so all heads are treated alike by a plan that is safe rather than "
                    "good: a measured one costs less quality at the same bytes, and takes seconds to make"
                )
        elif measured is not None and budget < 1:
            differing = self._cut_differs(measured.about)
            if differing:
                made = f"{kind} plan for {budget:g}, by costs of other pages ({differing})"
                warn = (
                    f"the profile's costs are of other pages than these ({differing}), so the plan is a guess: measure "
                    "again with `longwave calibrate -o segment=...`, or leave the option out"
                )
            elif expected is not None:
                made += f", expected {expected}"
        words = f"fourier({made}, segment={self.segment}, sinks={self.sinks}, window={self.window})"
        digest = "" if measured is None or profile is None else profile.digest
        return FourierBound(self, shape, budget, digest, plan=tuple(plan), words=words, warn=warn, expected=expected)

    def _cut_differs(self, about: dict[str, Any]) -> str:
        """In what the pages that were measured differ from these, or ""."""
        here = {"segment": self.segment, "states": STATES}
        return ", ".join(
            f"{name} {about[name]}, not {value}" for name, value in here.items() if about.get(name, value) != value
        )

    def _dense_bytes(self, shape: CacheShape) -> int:
        """A segment of all layers, dense."""
        return len(shape.memory_layers) * self.segment * shape.token_bytes


@dataclass(frozen=True, eq=False)
class FourierBound(SegmentedBound):
    """expected: what the plan was measured to cost, None where nothing was measured."""

    expected: planner.Expected | None = None
