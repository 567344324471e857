"""snapkv: the tokens that the last queries look at, and their neighbours.

Source: SnapKV, arXiv 2404.14469: the queries of the window vote by their softmax over all keys, votes are pooled along
time, and every head keeps its best. There a prompt is cut once and what is generated stays; here the vote is taken
again every 64 tokens, so that the budget holds while decoding, too. Grouped heads vote together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from longwave.checks import whole
from longwave.frame import Needs
from longwave.methods.evicting import Evicting, Held
from longwave.ops.mass import mass


@dataclass(frozen=True)
class SnapKV(Evicting):
    """Tokens that the window's queries attend to, pooled along time (SnapKV).

    window: the tokens that vote, and stay. kernel: tokens that share a vote, odd. pool: "avg" or "max".
    """

    name: ClassVar[str] = "snapkv"
    every: ClassVar[int] = 64

    sinks: int = 0
    kernel: int = 5
    pool: str = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if whole("kernel", self.kernel, 1, "tokens") % 2 == 0:
            raise ValueError(f"kernel is an odd number of tokens, got {self.kernel}")
        if self.pool not in ("avg", "max"):
            raise ValueError(f'pool is "avg" or "max", got {self.pool!r}')

    def needs(self) -> Needs:
        return super().needs() | Needs(queries=self.window)

    def votes(self, q: torch.Tensor, k: torch.Tensor, scaling: float, visible: torch.Tensor) -> torch.Tensor:
        """What the queries give each token: as `ops.mass`."""
        return mass(q, k, scaling, visible)

    def score(self, held: Held) -> torch.Tensor:
        assert held.queries is not None
        assert held.queries.q is not None
        q = held.queries.q
        # the newest query sees all tokens, the one before it all but the last ...
        seen = held.lengths[:, None] + held.ahead
        age = torch.arange(q.shape[2] - 1, -1, -1, device=q.device)
        known = age < torch.tensor(held.queries.counts, device=q.device)[:, None]
        votes = self.votes(q, held.k, held.scaling, (seen - age).clamp(min=0) * known)
        slots = torch.arange(votes.shape[-1], device=q.device)
        votes = votes.masked_fill((slots >= (held.lengths - self.window)[:, None])[:, None], 0)
        if self.pool == "avg":
            return avg_pool1d(votes, self.kernel, 1, self.kernel // 2)
        return max_pool1d(votes, self.kernel, 1, self.kernel // 2)
