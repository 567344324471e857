"""A segment that is about to be coded, once all is checked that can be without looking at its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Given:
    """k, v [layers, n, kv_heads, head_dim]. ids int64 [n], None where they are not known. start: the first's position.
    raw: first tokens that stay as they are. most: bytes that it may take."""

    k: Tensor
    v: Tensor
    ids: NDArray[np.int64] | None
    start: int
    raw: int
    most: int = 0

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

    @property
    def kind(self) -> tuple[int, int, bool, torch.dtype, torch.device]:
        """Segments that are alike in it are coded side by side."""
        return self.tokens, self.raw, self.ids is not None, self.k.dtype, self.k.device
