"""Across channels: the principal axes of a group of layers. Along time: an orthonormal DCT over a segment."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longwave.ops.spectral.basis import table

TOKENS = 128  # of a whole segment
BANDS = 8  # of frequencies: 0, 1, 2-3, 4-7 ... 64-127 of a whole segment


def principal(moment: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
    """Axes [d, m] and the variance along each [m], both float64, of a second moment [d, d]; largest first."""
    moment = (moment + moment.mT) / 2
    variance, axes = torch.linalg.eigh(moment)
    variance, axes = variance.flip(-1)[:keep].clamp(min=0), axes.flip(-1)[:, :keep]
    sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # solvers differ in it
    return axes * sign, variance


def cosines(tokens: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II [tokens, tokens], frequencies by tokens, of the type and on the device of `like`."""
    return table("dct", tokens, tokens, like.dtype, like.device)


def along(tokens: int, cosine: bool, like: Tensor) -> Tensor:
    """What a segment's tokens are turned to frequencies by: `cosines`, or nothing."""
    return cosines(tokens, like) if cosine else torch.eye(tokens, dtype=like.dtype, device=like.device)


@functools.cache
def bands(tokens: int) -> Tensor:
    """Which band each frequency of a segment of `tokens` tokens is in: int64 [tokens].

    Frequency f of a shorter segment is as fast as f * TOKENS / tokens of a whole one. Integers alone, so that every
    machine finds the same.
    """
    found = [0 if f == 0 else min(BANDS - 1, (f * TOKENS // tokens).bit_length()) for f in range(tokens)]
    return torch.tensor(found, dtype=torch.int64)
