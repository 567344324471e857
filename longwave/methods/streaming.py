"""streaming: the first tokens and the last ones, nothing between.

Source: StreamingLLM, arXiv 2309.17453. There keys are rotated by their place in the cache (positions="slots"); with
"true" positions they stay where they were, which cannot outlive the trained length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.methods.evicting import Evicting, Held


@dataclass(frozen=True)
class Streaming(Evicting):
    """Sinks and the most recent tokens (StreamingLLM)."""

    name: ClassVar[str] = "streaming"

    def score(self, held: Held) -> torch.Tensor:
        batch, heads, n, _ = held.k.shape
        return torch.arange(n, dtype=torch.float32, device=held.k.device).expand(batch, heads, n)
