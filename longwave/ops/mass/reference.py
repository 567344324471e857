"""Attention mass in plain torch: exact in float64, and never more scores at once than `query_block` allows.

Shapes: B batch, Hq query heads, H key/value heads, G = Hq / H, Q queries, L stored tokens, D head_dim. Scores of
16-bit inputs are float32, those of others have their dtype. Nothing here has a gradient.
"""

from collections.abc import Iterator

import torch

from longwave.ops.attention.reference import _product, group_heads, query_block, visible_mask

INF = float("inf")


@torch.no_grad()
def log_sum_exp(q: torch.Tensor, k: torch.Tensor, scaling: float, visible: torch.Tensor | None) -> torch.Tensor:
    """As in __init__.py."""
    out = torch.full(q.shape[:3], -INF, dtype=_wide(q.dtype), device=q.device)
    for at, some, held, seen in _blocks(q, k, visible):
        out[:, :, at] = torch.logsumexp(_scores(some, held, scaling, seen), -1).flatten(1, 2)
    return out


@torch.no_grad()
def mass(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    visible: torch.Tensor | None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """As in __init__.py."""
    total = torch.zeros(k.shape[:3], dtype=_wide(q.dtype), device=q.device)
    for at, some, held, seen in _blocks(q, k, visible):
        sums = _column_sums(_scores(some, held, scaling, seen), None if lse is None else lse[:, :, at])
        total[:, :, : sums.shape[2]] += sums
    return total


@torch.no_grad()
def peak(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    visible: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """As in __init__.py."""
    most = torch.zeros(k.shape[:3], dtype=_wide(q.dtype), device=q.device)
    for at, some, held, seen in _blocks(q, k, visible):
        got = _shares(_scores(some, held, scaling, seen), None if lse is None else lse[:, :, at])
        if weight is not None:
            got *= weight[:, None, None, at, None]
        most[:, :, : got.shape[4]] = torch.maximum(most[:, :, : got.shape[4]], got.amax((2, 3)))
    return most


@torch.no_grad()
def add_step(
    total: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    seen: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """Add what one query a row, q [B, Hq, 1, D], gives the first seen[b, 0] tokens of k [B, H, L, D].

    total float32 [B, H, L] changes in place; seen, int [B, 1], lies on the device. What lies behind it in k adds
    nothing, NaN neither. lse [B, Hq, 1] as in `mass`. Nothing is read back and no shape depends on `seen`: fit for a
    captured step.
    """
    total += _column_sums(_scores(q, k, scaling, seen), lse)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(
    q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Queries to take at a time: their place, they, the tokens that at least one of them sees, and their `visible`."""
    b, hq, queries, _ = q.shape
    step = query_block(b * hq, k.shape[2])
    if not k.is_cuda:  # a CPU multiplies no 16-bit numbers: convert once, not once a block
        q, k = q.to(_wide(q.dtype)), k.to(_wide(k.dtype))
    for start in range(0, queries, step):
        at = slice(start, start + step)
        seen = None if visible is None else visible[:, at]
        top = k.shape[2] if seen is None else int(seen.max())
        yield at, q[:, :, at], k[:, :, :top], seen


def _scores(q: torch.Tensor, k: torch.Tensor, scaling: float, visible: torch.Tensor | None) -> torch.Tensor:
    """scaling * q.k as [B, H, G, Q, L], -inf where a query does not see."""
    x, y = group_heads(q, k.shape[1]).flatten(0, 1), k.flatten(0, 1).mT
    scores = x @ y if q.dtype in (torch.float32, torch.float64) else _product(x, y)
    scores = scores.unflatten(0, k.shape[:2]).unflatten(2, (-1, q.shape[2])).mul_(scaling)
    if visible is not None:
        scores.masked_fill_(~visible_mask(visible, k.shape[2])[:, :, None], -INF)
    return scores


def _column_sums(scores: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
    """Sums [B, H, L] of `_shares`."""
    return _shares(scores, lse).sum((2, 3))


def _shares(scores: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
    """exp(scores - lse), in the scores' memory and shape; lse [B, Hq, Q], or None for their own."""
    lse = torch.logsumexp(scores, -1) if lse is None else lse.unflatten(1, scores.shape[1:3])
    lse = lse.masked_fill(lse == -INF, INF)  # saw nothing: exp(-inf - inf) is 0, exp(-inf + inf) is NaN
    return scores.sub_(lse[..., None]).exp_()
