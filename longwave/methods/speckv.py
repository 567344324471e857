"""speckv: the tokens that a draft model's continuation looks at, asked before it is taken back.

Source: SpecKV, arXiv 2506.08373: a draft writes n tokens after the prompt, the target reads both, and the queries of
the prompt's last 32 tokens and of the n drafted ones vote: each key is worth the most that one query of its group's
heads gives it, by the softmax over all that the query sees, and max-pooled over 7 tokens. The drafted tokens go again.
The draft is no option of the method: it decides nothing but what is asked, and `longwave.look_ahead` is given it
(prefill/ahead.py). Later the vote is snapkv's, of the tokens that came: every 64 steps, and after every later pass.
There the pass over the prompt is sparse by the same scores; here it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.frame import Needs, Pass
from longwave.frame.observe import Queries
from longwave.methods.evicting_layer import EvictingLayer
from longwave.methods.held import Held
from longwave.methods.snapkv import SnapKV
from longwave.ops.mass import peak


class SpecKVLayer(EvictingLayer):
    """Chooses among a prompt's tokens by what the drafted ones behind it ask as well."""

    ahead = 0  # of the running pass's tokens the last so many are taken back after it

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Asked before any layer of another kind takes the pass."""
        if not any(self.rows) and not self.ahead:
            self._refuse_unasked()
        return super().get_mask_sizes(query_length)

    def refuse(self, p: Pass) -> None:
        if p.phase == "prompt" and not self.ahead:  # a 4D mask is not asked for
            self._refuse_unasked()

    def take(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: list[int],
        scaling: float,
        columns: Mapping[str, torch.Tensor],
        queries: Queries | None,
    ) -> None:
        self._refuse_unasked()
        super().take(k, v, rows, scaling, columns, queries)

    def _refuse_unasked(self) -> None:
        if self.bound.method.ahead and not self.bound.whole:
            raise ValueError(self.bound.method.beforehand())

    def patience(self) -> int:
        return 0 if self.ahead else super().patience()

    def undecided(self) -> int:
        return self.ahead or super().undecided()

    def survivors(self, held: Held, keep: torch.Tensor) -> torch.Tensor:
        own = replace(held, lengths=held.lengths - self.ahead, ahead=self.ahead)
        slots = torch.arange(held.k.shape[2], device=held.k.device)
        ahead = (slots >= own.lengths[:, None]) & (slots < held.lengths[:, None])
        return super().survivors(own, keep - self.ahead) | ahead[:, None]


@dataclass(frozen=True)
class SpecKV(SnapKV):
    """Tokens that a draft model's continuation of the prompt attends to (SpecKV).

    window: the prompt's last tokens, that vote, and stay. ahead: tokens that a draft writes, which vote as well; 0: no
    draft is asked for. kernel, pool: as snapkv.
    """

    name: ClassVar[str] = "speckv"
    layers: ClassVar[type[EvictingLayer]] = SpecKVLayer

    window: int = 32
    kernel: int = 7
    pool: str = "max"
    ahead: int = 16

    def __post_init__(self) -> None:
        whole("ahead", self.ahead, 0, "tokens")
        super().__post_init__()
        if self.store is not None:
            raise ValueError(
                "speckv takes back tokens that a draft wrote, and pages are never opened again: leave store out, or "
                "use snapkv with it"
            )

    def beforehand(self) -> str | None:
        if not self.ahead:
            return None
        return (
            "speckv chooses by what a draft model writes after the prompt: longwave.look_ahead(model, cache, ids, "
            "draft) and then model.generate(ids, ...), or longwave.generate(..., draft=draft). ahead=0 goes without a "
            "draft"
        )

    def needs(self) -> Needs:
        return super().needs() | Needs(queries=self.window + self.ahead)

    def votes(self, q: torch.Tensor, k: torch.Tensor, scaling: float, visible: torch.Tensor) -> torch.Tensor:
        return peak(q, k, scaling, visible)
