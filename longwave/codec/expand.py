"""K or V of some layers from what was coded of their tokens: the reference, and who answers instead of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longwave.codec.predict import Said
from longwave.codec.rotation import Rotation
from longwave.ops.kernels import choice, wants_triton


@dataclass(frozen=True, eq=False)
class Turn:
    """How keys [L, n, H, D] are turned: rotation of these layers, positions int64 [n]."""

    rotation: Rotation
    positions: Tensor


def expand(c: Tensor, axes: Tensor, said: Said, turn: Turn | None, out: Tensor) -> None:
    """Write c [n, m] along axes [L H D, m], and what is said of the tokens, turned where they are keys, into `out`
    [L, n, H, D], of any type and strides, on the same device."""
    if c.dtype == torch.float32 and wants_triton(c.device):
        try:
            from longwave.codec import expand_triton
        except ImportError:
            if choice() == "triton":
                raise
        else:
            return expand_triton.expand(c, axes, said, turn, out)
    y = torch.addmm(said.numbers(), c, axes.mT)
    y = y.view(out.shape[1], out.shape[0], *out.shape[2:]).transpose(0, 1)
    out.copy_(y if turn is None else turn.rotation.rotate(y, turn.positions))
