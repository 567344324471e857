"""knorm: the tokens whose keys are short.

Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430: keys of low norm get
high attention, so the longest key goes. No query is looked at, so a token's worth never changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.methods.evicting import Evicting, Held


@dataclass(frozen=True)
class KNorm(Evicting):
    """Tokens of short keys (L2 norm)."""

    name: ClassVar[str] = "knorm"

    def score(self, held: Held) -> torch.Tensor:
        kind = torch.float64 if held.k.dtype == torch.float64 else torch.float32
        return -torch.linalg.vector_norm(held.k, dim=-1, dtype=kind)
