"""Which stored tokens a layer reads: votes for the best keys, spans around what won. Formulas: reference.py."""

import importlib
from typing import Any

import torch

from longwave.ops.attention.reference import query_block
from longwave.ops.kernels import choice, wants_triton
from longwave.ops.pieces import Coming, Made, pieces
from longwave.ops.select import reference
from longwave.ops.select.reference import TILE, greatest, places, told

__all__ = ["TILE", "choose", "claims", "greatest", "places", "told"]

PIECE = 1 << 16  # tokens, whole tiles


def choose(
    q: torch.Tensor,
    k: torch.Tensor | Made | Coming,
    begin: torch.Tensor,
    end: torch.Tensor,
    asks: torch.Tensor | None = None,
    *,
    top: int,
    spans: int,
    span: int,
    exact: bool = True,
) -> torch.Tensor:
    """Which tokens the queries of a row read together, in all heads: bool [B, L], of those begin[b] to end[b] - 1.

    q [B, Hq, Q, D] and k [B, H, L, D], both before rotation and of one floating dtype; query head h belongs to KV head
    h // (Hq / H). begin, end: int64 [B]. asks, bool [B, Q]: which queries are there; None for all. Each of them votes
    in each of its heads for `top` tokens; the `spans` tokens of most votes stand, each with those around it, `span` in
    all. exact=False lets a tile of `TILE` tokens offer its best one alone. k may lie on another device than all else:
    then it is brought, or made, `PIECE` tokens at a time. Nothing is read back. ValueError where shapes or dtypes do
    not go together.
    """
    if (
        len(k.shape) != 4
        or (k.shape[0], k.shape[3], k.dtype) != (q.shape[0], q.shape[3], q.dtype)
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"q [B, Hq, Q, D] and k [B, H, L, D] share B, D and dtype, and H divides Hq; "
            f"got {list(q.shape)} in {q.dtype} and {list(k.shape)} in {k.dtype}"
        )
    here = isinstance(k, torch.Tensor) and k.device == q.device
    _, index = (_answers(q, k, top).best if here else _in_pieces)(q, k, begin, end, top, exact)  # type: ignore[arg-type]
    if asks is not None:
        index = index.masked_fill(~asks[:, None, :, None], -1)
    return reference.around(index, k.shape[2], begin, end, spans, span)


def claims(
    q: torch.Tensor,
    k: torch.Tensor | Made | Coming,
    begin: torch.Tensor,
    end: torch.Tensor,
    asks: torch.Tensor | None = None,
    *,
    scaling: float,
    span: int,
) -> torch.Tensor:
    """How much a row's queries want spans of `span` tokens side by side, from token 0 on: the squares of the shares of
    attention that these get, before rotation and among the tokens begin[b] to end[b] - 1 alone, summed over heads and
    queries, float32 [B, ceil(L / span)].

    Arguments as those of `choose`; scaling: of the scores. Plain torch: a question's queries are few.
    """
    size = max(1, reference.COLUMNS // span) * span
    step = query_block(q.shape[0] * q.shape[1], -(-k.shape[2] // span))  # what is held grows with spans and queries
    made = [
        reference.claims(
            q[:, :, at : at + step],
            pieces(k, size, q.device),
            begin,
            end,
            None if asks is None else asks[:, at : at + step],
            scaling,
            span,
        )
        for at in range(0, q.shape[2], step)
    ]
    return torch.stack(made).sum(0)


def _in_pieces(
    q: torch.Tensor, k: torch.Tensor | Made | Coming, begin: torch.Tensor, end: torch.Tensor, top: int, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`best` of reference.py, over keys that are brought to the device a piece at a time."""
    value = torch.full((*q.shape[:3], top), -reference.INF, device=q.device)
    index = torch.full(value.shape, -1, dtype=torch.long, device=q.device)
    for start, part in pieces(k, PIECE, q.device):
        score, number = _answers(q, part, top).best(q, part, begin - start, end - start, top, exact)
        number = number.where(number < 0, number + start)
        value, index = reference.first(torch.cat([value, score], -1), torch.cat([index, number], -1), top)
    return value, index


def _answers(q: torch.Tensor, k: torch.Tensor, top: int) -> Any:
    """The module that answers. RuntimeError if LONGWAVE_KERNELS asks for Triton and Triton cannot."""
    if not wants_triton(q.device):
        return reference
    try:
        module = importlib.import_module("longwave.ops.select.triton")
    except ImportError:
        if choice() == "triton":
            raise
        return reference
    why = module.fits(q, k, top)
    if why is not None and choice() == "triton":
        raise RuntimeError(f"LONGWAVE_KERNELS=triton, but its kernel cannot choose among these tokens: {why}")
    return reference if why is not None else module
