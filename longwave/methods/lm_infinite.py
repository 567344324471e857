"""lm_infinite: a local window at true distances, and the first tokens at a distance that stops growing.

Source: LM-Infinite, arXiv 2308.16137: token i attends to j where i - j is below `window`, and to the first `sinks`
tokens from any distance, which counts as `window` at most. There the window is the trained length, and between the two
nothing is seen; the middle's five best keys that it may add for retrieval are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.methods.remapped import Look, Remapped


@dataclass(frozen=True)
class LMInfinite(Remapped):
    """A window, and first tokens whose distance has a ceiling (LM-Infinite).

    sinks: first tokens that every token sees. window: tokens seen at their distance, itself included; below the trained
        length.
    """

    name: ClassVar[str] = "lm_infinite"

    sinks: int = 10
    window: int = 2048

    def __post_init__(self) -> None:
        whole("sinks", self.sinks, 0, "tokens")
        whole("window", self.window, 1, "tokens")

    def exact(self) -> int:
        return self.window

    def reach(self, limit: int) -> int | None:
        return None if self.window < limit else limit

    def looks(self, i: torch.Tensor) -> Iterator[Look]:
        edge = (i - self.window + 1).clamp(min=0)
        yield Look(i, edge, i + 1)
        yield Look(
            torch.full_like(i, self.window), torch.zeros_like(i), edge.clamp(max=self.sinks), place=torch.zeros_like
        )
