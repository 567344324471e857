"""sparse_dllm: the tokens that the mean query of a diffusion model's block looks at, the same in all heads of a layer.

Source: Sparse-dLLM, arXiv 2508.02558: the queries of a block are averaged, their products with the keys of all other
tokens are averaged over heads and max-pooled over 3 tokens, and a layer keeps the best for all of its heads. No softmax
is taken, and distance is that of the mean query's rotation. There the choice waits for a block's second pass
(`delay=1` of longwave.diffusion); here the block's queries are those of the window, so `window` is its length. With a
causal model the last tokens ask, and the choice is made again every 64 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import max_pool1d

from longwave.checks import whole
from longwave.frame import Needs
from longwave.methods.evicting import Evicting, Held


@dataclass(frozen=True)
class SparseDLLM(Evicting):
    """Tokens that the window's mean query looks at, one set for all heads of a layer (Sparse-dLLM).

    window: the tokens that ask, and stay: a block of a diffusion model. kernel: tokens that share a score, odd.
    """

    name: ClassVar[str] = "sparse_dllm"
    every: ClassVar[int] = 64

    sinks: int = 0
    window: int = 32
    kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if whole("kernel", self.kernel, 1, "tokens") % 2 == 0:
            raise ValueError(f"kernel is an odd number of tokens, got {self.kernel}")

    def needs(self) -> Needs:
        return super().needs() | Needs(queries=self.window)

    def score(self, held: Held) -> torch.Tensor:
        assert held.queries is not None
        assert held.queries.q is not None
        q, heads = held.queries.q, held.k.shape[1]
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        counts = torch.tensor(held.queries.counts, device=q.device)
        known = torch.arange(q.shape[2], device=q.device) >= q.shape[2] - counts[:, None]
        mean = (q.to(kind) * known[:, None, :, None]).sum(2) / counts.clamp(min=1)[:, None, None]
        grouped = mean.unflatten(1, (heads, -1)).mean(2)  # of query heads, a group at a time
        found = (grouped[:, :, None].to(kind) @ held.k.to(kind).mT)[:, :, 0].mean(1, keepdim=True)
        pooled = max_pool1d(self._asked(found, held), self.kernel, 1, self.kernel // 2)
        return pooled.expand(-1, heads, -1)

    def _asked(self, found: torch.Tensor, held: Held) -> torch.Tensor:
        """Scores [batch, 1, n] of what may go; the window's own do not reach into it by the pooling."""
        slots = torch.arange(found.shape[-1], device=found.device)
        own = slots >= (held.lengths - self.window)[:, None]
        return found.masked_fill(own[:, None], torch.finfo(found.dtype).min)
