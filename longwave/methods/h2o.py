"""h2o: the tokens that got most attention so far (heavy hitters), and the most recent ones.

Source: H2O, arXiv 2306.14048: attention summed over all queries that saw a token, not averaged, by head; after every
step the token with the least of it goes. Grouped heads are summed, and sums are never lost: they travel with the token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.frame import Needs
from longwave.methods.evicting import Evicting, Held


@dataclass(frozen=True)
class H2O(Evicting):
    """Tokens that got most attention so far (H2O), one evicted at every step."""

    name: ClassVar[str] = "h2o"
    observes: ClassVar[Needs] = Needs(mass=True)

    def score(self, held: Held) -> torch.Tensor:
        return held.columns["mass"]
