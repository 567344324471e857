"""quest: every token is kept; a step reads the chunks whose keys may match its query best.

Source: Quest, arXiv 2406.10774: of each chunk the least and greatest key a channel; a query's score of a chunk is the
most that any key between them could reach, sum over channels of max(q min, q max). Queries of a group read together
what is worth most to any of them. There the first two layers read all: full_layers=2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.methods.selecting import Selecting


@dataclass(frozen=True)
class Quest(Selecting):
    """Everything is kept; steps read the chunks whose key ranges fit the query (Quest)."""

    name: ClassVar[str] = "quest"
    summaries: ClassVar[int] = 2

    full_layers: int = 2

    def summarise(self, k: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        limit = torch.finfo(k.dtype).max
        low = k.masked_fill(~real[..., None], limit).amin(-2)
        high = k.masked_fill(~real[..., None], -limit).amax(-2)
        return torch.stack([low, high], dim=-2)

    def worth(self, q: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        q, summary = q.float(), summary.float()
        low, high = summary.unbind(-2)  # [batch, kv_heads, chunks, head_dim]
        most = q.clamp(max=0) @ low.mT + q.clamp(min=0) @ high.mT
        return most.amax(2)
