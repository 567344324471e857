"""What a masked-diffusion model expects of a text: an upper bound of its perplexity, over random masks.

The prompts are those of `perplexity` with mode=strided: of windows of `length` tokens the last `scored` count, the same
ones at every length. `masks` passes a window each mask some of them, one to all as often, and the nats of a
masked token are what `longwave.diffusion.loss_bound` takes the mean of. Masks are drawn by the run's seed and the
window's number, so lengths differ in their context alone. A bound is no loss: it bears another name, and does not stand
beside a causal model's perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from longwave.checks import whole
from longwave.evals.task import LossTask, Sample, Setting
from longwave.evals.tasks.perplexity import Perplexity


@dataclass(frozen=True)
class PerplexityBound(LossTask):
    """Upper bound of a masked-diffusion model's perplexity of a text, over random masks."""

    name: ClassVar[str] = "perplexity-bound"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "length"
    unit: ClassVar[str] = "perplexity, upper bound"
    metric: ClassVar[str] = "bound"
    nats: ClassVar[str] = "bound"

    lengths: Any = (1024, 2048, 4096)  # tokens read in all
    scored: int = 64  # tokens
    windows: int = 4  # of every text
    masks: int = 8  # passes a window
    text: str = "pg19"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", self._windows().lengths)
        whole("masks", self.masks, 1, "passes a window")

    def _windows(self) -> Perplexity:
        return Perplexity(lengths=self.lengths, scored=self.scored, windows=self.windows, text=self.text)

    def samples(self, setting: Setting) -> list[Sample]:
        made = self._windows().samples(setting)
        return [replace(x, meta={**x.meta, "seed": setting.seed + x.meta["window"]}) for x in made]

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return math.exp(sum(row["score"] * row["scored"] for row in rows) / sum(row["scored"] for row in rows))
