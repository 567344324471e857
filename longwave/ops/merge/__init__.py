"""Merging the tokens of a segment into one: the formulas are in reference.py."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from longwave.ops.kernels import choice, on_device, wants_triton
from longwave.ops.merge import reference
from longwave.ops.merge.reference import EVEN, MOST, merge

__all__ = ["EVEN", "MOST", "merge", "merge_heads"]


def merge_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
    segment: int,
    heads: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V [B, H, N * segment, D] with the tokens of `heads` as what `merge` makes of them, in k's dtype, and their
    bias [B, H, N] in float32, or float64 for such k; 0 for other heads. q, k, v and lse as there; k and v stay.
    """
    module = _triton(q, k, segment)
    if module is None:
        return reference.merge_heads(q, k, v, lse, scaling, segment, heads)
    with on_device(k.device):
        return module.merge_heads(q, k, v, lse, scaling, segment, heads)


def _triton(q: torch.Tensor, k: torch.Tensor, segment: int) -> Any:
    """The module that answers, None where the reference does. RuntimeError if LONGWAVE_KERNELS asks for what cannot."""
    if not wants_triton(k.device):
        return None
    try:
        module = importlib.import_module("longwave.ops.merge.triton")
    except ImportError:
        if choice() == "triton":
            raise
        return None
    why = module.fits(q, k, segment)
    if why is not None and choice() == "triton":
        raise RuntimeError(f"LONGWAVE_KERNELS=triton, but its kernel cannot merge these segments: {why}")
    return None if why else module
