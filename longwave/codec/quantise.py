"""Numbers to whole multiples of a step and back.

q = sign(c) floor(|c| / d + 0.4): a dead zone somewhat wider than the step, since small numbers are the likely ones.
Steps are d = 2^(j / 32), j a whole number, so that coder and decoder mean the same on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUND = 0.4
OCTAVE = 32  # steps j an octave
LARGEST = 2**24  # of |q|: beyond it a float32 no longer counts


def step_of(j: int) -> float:
    """The step that j stands for, in weighted units."""
    return 2.0 ** (j / OCTAVE)


def quantise(c: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """float [s, ...] -> int32 alike, and bool [s]: whether all are right, none more than LARGEST steps or no number."""
    size = (c.abs() / step).add_(ROUND).floor_()
    right = (size <= LARGEST).flatten(1).all(1)
    return size.copysign_(c).to(torch.int32), right


def restore(q: Tensor, step: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """int32 [...] -> float [...]."""
    return q.to(dtype) * step
