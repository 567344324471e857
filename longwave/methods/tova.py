"""tova: the tokens that the newest query attends to, the same ones in every head of a layer.

Source: TOVA, arXiv 2401.06104: after every step the token with the least of the last query's attention goes, averaged
over all query heads; nothing is remembered from step to step. There no token is protected: sinks=0, window=0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.frame import Needs
from longwave.frame.observe import votes_of
from longwave.methods.evicting import Evicting, Held


@dataclass(frozen=True)
class Tova(Evicting):
    """Tokens that the newest query attends to, in the mean of all heads (TOVA)."""

    name: ClassVar[str] = "tova"
    observes: ClassVar[Needs] = Needs(votes=(1,))
    least_window: ClassVar[int] = 0

    def score(self, held: Held) -> torch.Tensor:
        votes = held.columns[votes_of(1)]
        return votes.mean(1, keepdim=True).expand_as(votes)
