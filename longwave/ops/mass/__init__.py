"""Attention mass: how much attention every stored token got from the queries of a pass, in all or at most from one."""

import importlib
from typing import Any

import torch

from longwave.ops.kernels import choice, wants_triton
from longwave.ops.mass import reference
from longwave.ops.mass.reference import add_step

__all__ = ["add_step", "log_sum_exp", "mass", "peak"]


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, scaling: float, visible: torch.Tensor | None) -> torch.Tensor:
    """log(sum(exp(scaling * q.k))) over the stored tokens a query sees: float32 [B, Hq, Q], float64 of float64 inputs.

    q [B, Hq, Q, D] and k [B, H, L, D] of one floating dtype; query head h belongs to KV head h // (Hq / H). visible,
    int [B, Q], lets query i of row b see columns 0 .. visible[b, i] - 1; None lets all see all. One that sees nothing
    has -inf. ValueError where the shapes or dtypes do not go together.
    """
    _check(q, k, visible, None)
    return _answers(q, k).log_sum_exp(q, k, scaling, visible)


def mass(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    visible: torch.Tensor | None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Column sums of the softmax, over a KV head's query heads and all queries: [B, H, L] in `log_sum_exp`'s dtype.

    q, k and visible as there. lse [B, Hq, Q] replaces its answer, where the softmax also covers tokens that lie
    elsewhere. Queries that see nothing, or whose lse is -inf, add nothing: so padding is hidden. ValueError as there.
    """
    _check(q, k, visible, lse)
    return _answers(q, k).mass(q, k, scaling, visible, lse)


def peak(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    visible: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """The most that a single query gives each stored token, over a KV head's query heads and all queries: as `mass`.

    weight [B, Q] is what a query's attention counts; None counts all alike. lse as in `mass`. In plain torch on every
    device. ValueError as there.
    """
    _check(q, k, visible, lse)
    if weight is not None and weight.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"weight is [B, Q] = {[q.shape[0], q.shape[2]]}, got {list(weight.shape)}")
    return reference.peak(q, k, scaling, visible, weight, lse)


def _answers(q: torch.Tensor, k: torch.Tensor) -> Any:
    """The module that answers. RuntimeError if LONGWAVE_KERNELS asks for Triton and Triton cannot."""
    if not wants_triton(q.device):
        return reference
    try:
        module = importlib.import_module("longwave.ops.mass.triton")
    except ImportError:
        if choice() == "triton":
            raise
        return reference
    why = module.fits(q, k)
    if why is not None and choice() == "triton":
        raise RuntimeError(f"LONGWAVE_KERNELS=triton, but its kernel cannot sum this attention: {why}")
    return reference if why is not None else module


def _check(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None, lse: torch.Tensor | None) -> None:
    b, hq, queries, dim = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[3], k.dtype) != (b, dim, q.dtype) or hq % max(k.shape[1], 1):
        raise ValueError(
            f"q [B, Hq, Q, D] and k [B, H, L, D] share B, D and dtype, and H divides Hq; "
            f"got {list(q.shape)} in {q.dtype} and {list(k.shape)} in {k.dtype}"
        )
    if visible is not None and visible.shape != (b, queries):
        raise ValueError(f"visible is [B, Q] = {[b, queries]}, got {list(visible.shape)}")
    if lse is not None and lse.shape != (b, hq, queries):
        raise ValueError(f"lse is [B, Hq, Q] = {[b, hq, queries]}, got {list(lse.shape)}")
