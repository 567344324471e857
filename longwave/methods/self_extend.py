"""self_extend: near tokens at their distance, far ones by groups that share a position.

Source: Self-Extend, arXiv 2401.01325: from a distance of `window` on, query and key positions are divided by `group`,
rounded down, and the query's moved by window - window / group, so that distances go on where the near ones end. A
model of P trained tokens reads (P - window) group + window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.methods.remapped import Look, Remapped


@dataclass(frozen=True)
class SelfExtend(Remapped):
    """Every token, far ones at positions that a group shares (Self-Extend).

    group: tokens that share a position. window: tokens at their own distance, a multiple of group.
    """

    name: ClassVar[str] = "self_extend"

    group: int = 8
    window: int = 1024

    def __post_init__(self) -> None:
        whole("group", self.group, 1, "tokens")
        whole("window", self.window, 1, "tokens")
        if self.window % self.group:
            raise ValueError(
                f"window is a multiple of group ({self.group}), so that no distance is skipped; got {self.window}"
            )

    def exact(self) -> int:
        return self.window

    def reach(self, limit: int) -> int | None:
        return max(limit, (limit - self.window) * self.group + self.window)

    def looks(self, i: torch.Tensor) -> Iterator[Look]:
        edge = (i - self.window + 1).clamp(min=0)
        yield Look(i, edge, i + 1)
        grouped = i // self.group + self.window - self.window // self.group
        yield Look(grouped, torch.zeros_like(i), edge, place=lambda j: j // self.group)
