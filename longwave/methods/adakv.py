"""adakv: snapkv whose heads share a layer's budget by their scores.

Source: Ada-KV, arXiv 2407.11550, over SnapKV's scores: the best tokens of all heads of a layer together stay, so that
a head that looks at few tokens leaves its room to one that looks at many; `safeguard` of an even share is every head's
own. Memory is really freed: heads hold different numbers of tokens, one behind the other (store/ragged.py), and the
layer in all what snapkv holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.methods.held import top
from longwave.methods.ragged import Judged, RaggedBound, best_of_all
from longwave.methods.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """Tokens that the window's queries attend to, where a layer's heads share its budget by their scores (Ada-KV).

    tokens: how many a head keeps in the mean of a layer. safeguard: what no head gives away, of an even share of what
    may go: 1 is snapkv.
    """

    name: ClassVar[str] = "adakv"

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.safeguard, (int, float)) and not isinstance(self.safeguard, bool)
        if not number or not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard is a part of a head's even share, from 0 to 1; got {self.safeguard!r}")
        if self.store is not None:
            raise ValueError(
                "adakv keeps another number of tokens in every head, and pages take as many of all: leave store out, "
                "or use snapkv with it"
            )

    @property
    def bound(self) -> type[RaggedBound]:
        return RaggedBound

    def share_out(self, heads: list[Judged], keep: torch.Tensor) -> list[torch.Tensor]:
        """Which of the free tokens stay in each head: bool [batch, n] each, keep[b] of them in all."""
        even = torch.floor(keep.double() / len(heads) * self.safeguard).long()
        worth = []
        for head in heads:
            score = head.score.masked_fill(~head.free, float("-inf"))
            own = top(score[:, None], even)[:, 0] & head.free
            worth.append(score.masked_fill(own, float("inf")))
        return best_of_all(worth, heads, keep)
