"""Merging the tokens of a segment into one: weighted means of K and V, and a bias of the score.

With keys k_t and values v_t of a segment's T tokens, and probe queries q_i of later tokens whose softmax over all keys
gives p_it = exp(s q_i . k_t - lse_i), s the scaling:

    w_t = sum_i p_it + 1e-3 of its mean over the segment, divided by its sum
    K'  = sum_t w_t k_t,  V' = sum_t w_t v_t
    b   = log(sum_it p_it / sum_i T exp(s q_i . K' - lse_i)), within 8 of 0

so that T tokens with key K', value V' and scores raised by b get the attention that the segment had, and answer with
what it was paid for. The weights are those of WeightedKV's merge, arXiv 2503.01330, by segment.
"""

import math
from collections.abc import Sequence

import torch

from longwave.ops import mass
from longwave.ops.attention.reference import group_heads

BLOCK = 1 << 22  # numbers that are widened at once
EVEN = 1e-3  # of the mean weight is added to all
MOST = 8.0  # of a bias


def merge(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, scaling: float, segment: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(K' [B, H, N, D], V' [B, H, N, D], b [B, H, N]), float32 or float64, of k and v [B, H, N * segment, D].

    q [B, Hq, P, D]: rotated probe queries, of the same dtype; all of them see all of k. lse [B, Hq, P]: log of what
    their softmax divides by, over every key of the context.
    """
    got = mass.mass(q, k, scaling, None, lse).unflatten(2, (-1, segment))  # [B, H, N, T]
    total = got.sum(-1)
    weight = got + EVEN * got.mean(-1, keepdim=True).clamp(min=torch.finfo(got.dtype).tiny)
    weight = weight / weight.sum(-1, keepdim=True)
    keys, values = (_means(x.unflatten(2, (-1, segment)), weight) for x in (k, v))
    grouped = group_heads(q.to(weight.dtype), k.shape[1])
    missed = lse.to(weight.dtype).masked_fill(lse == -torch.inf, torch.inf)  # a query that is not there
    score = scaling * grouped @ keys.mT - group_heads(missed[..., None], k.shape[1])  # [B, H, G P, N]
    kept = torch.logsumexp(score, 2) + math.log(segment)
    bias = total.clamp(min=torch.finfo(total.dtype).tiny).log() - kept
    return keys, values, bias.where(kept > -torch.inf, torch.zeros_like(bias)).clamp(-MOST, MOST)


def merge_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
    segment: int,
    heads: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in __init__.py."""
    own = torch.tensor(heads, dtype=torch.long, device=k.device)
    q, lse = (x.unflatten(1, (k.shape[1], -1))[:, own].flatten(1, 2) for x in (q, lse))
    keys, values, raised = merge(q, k[:, own], v[:, own], lse, scaling, segment)
    k, v = k.clone(), v.clone()
    for x, means in ((k, keys), (v, values)):
        x[:, own] = means.to(x.dtype).repeat_interleave(segment, 2)
    bias = raised.new_zeros(*k.shape[:2], raised.shape[2])
    bias[:, own] = raised
    return k, v, bias


def _means(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] of x [B, H, N, T, D] by weights [B, H, N, T] of a wider type, some segments at a time."""
    step = max(1, BLOCK // max(1, x[:, :, :1].numel()))
    parts = zip(x.split(step, 2), weight.split(step, 2), strict=True)
    return torch.cat([(w[..., None, :] @ some.to(w.dtype))[..., 0, :] for some, w in parts], 2)
