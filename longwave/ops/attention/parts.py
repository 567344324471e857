"""Attention over some of the keys, with the log-sum-exp by which several such parts become one softmax.

Shapes: B batch, Hq query heads, H key/value heads, G = Hq / H, Q queries, L keys, D head_dim. What divides a part, lse,
is float32 [B, Hq, Q], float64 for such q, and -inf, or next to it, where a query sees nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, pairwise

import torch
from torch.backends import cuda

from longwave.ops.attention.reference import group_heads, query_block

BLOCK = 512  # queries that are asked at once
UNSEEN = -3e4  # added to a score that does not count: finite, so that who sees nothing averages, and weighs nothing
ALIGNED = 16  # columns a row of what is added takes a multiple of, as the kernels on CUDA want it

Part = tuple[torch.Tensor, torch.Tensor]
"""Answers [B, Hq, Q, D] and their lse."""


def part_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, bias: torch.Tensor | None = None
) -> Part:
    """Softmax attention of q [B, H, Q, D] over k, v [B, H, L, D] with what it is divided by: [B, H, Q, D] and lse.

    bias [1, 1, Q, L], in q's dtype, is added to the scores: see `bias_of`. By the device's own kernel where there is
    one, which never holds all scores.
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scaling)
        return out, lse
    if q.is_cuda and q.dtype != torch.float64:
        wide = None if bias is None else bias.expand(*q.shape[:2], -1, -1)
        asked = cuda.SDPAParams(q, k, v, wide, 0.0, False, False)
        if cuda.can_use_flash_attention(asked):
            return aten._scaled_dot_product_flash_attention(q, k, v, scale=scaling)[:2]
        if cuda.can_use_efficient_attention(asked):
            out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, wide, True, scale=scaling)[:2]
            return out, lse[..., : q.shape[2]]  # it comes in multiples of a tile
    return part_reference(q, k, v, scaling, bias)


def part_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, bias: torch.Tensor | None = None
) -> Part:
    """`part_attention` in plain torch."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(kind) @ k.to(kind).mT * scaling
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(-1)
    return (torch.exp(scores - lse[..., None]) @ v.to(kind)).to(q.dtype), lse


def bias_of(seen: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """What hides the pairs that are not seen, bool [Q, L], of so many heads side by side: [1, 1, groups * Q, L]."""
    queries, columns = seen.shape
    room = seen.new_zeros(queries, -(-columns // ALIGNED) * ALIGNED, dtype=dtype)
    room[:, :columns].masked_fill_(~seen, UNSEEN)
    return room.repeat(groups, 1)[None, None, :, :columns]


def joined(parts: Iterable[Part]) -> Part:
    """One softmax over the keys of all parts, which have none in common: answers in lse's dtype. Who sees nothing gets
    zeros."""
    found = list(parts)
    lse = found[0][1] if len(found) == 1 else torch.stack([one for _, one in found]).logsumexp(0)
    base = lse.masked_fill(lse == float("-inf"), 0)
    out: torch.Tensor | None = None
    for answer, own in found:
        share = answer.to(lse.dtype) * torch.exp(own - base)[..., None]
        out = share if out is None else out.add_(share)
    assert out is not None
    return out, lse


def interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, first: torch.Tensor, last: torch.Tensor
) -> list[Part]:
    """Attention in which query i sees the keys first[i] to last[i] - 1: q [B, Hq, Q, D], k, v [B, H, L, D].

    first, last: int64 [Q] on the host, both rising. What a whole block of queries sees and what lies at its edges are
    parts of their own: so a long prefix or a broad band needs no mask, and keys that a block is far from are not met.
    """
    made: dict[bool, Part] = {}
    masks: dict[object, torch.Tensor] = {}  # along a band all blocks have the same
    firsts, lasts = first.tolist(), last.tolist()
    for start, stop in _blocks(first, last):
        some, a, b = slice(start, stop), firsts[start:stop], lasts[start:stop]
        low, begin, end, high = a[0], a[-1], b[0], b[-1]  # from begin to end all of them see
        if low >= high:
            continue
        x = group_heads(q[:, :, some], k.shape[1])
        whole = end - begin >= BLOCK or (begin, end) == (low, high)
        if whole:
            inside = slice(begin, end)
            _put(made, False, q, some, part_attention(x, k[:, :, inside], v[:, :, inside], scaling))
        edges = [(low, begin), (end, high)] if whole else [(low, high)]
        edges = [(at, to) for at, to in edges if at < to]
        if edges:
            name = tuple(x - low for x in (*chain.from_iterable(edges), *a, *b))
            if name not in masks:
                columns = [number for edge in edges for number in range(*edge)]
                j, one, other = (torch.tensor(x, device=q.device) for x in (columns, a, b))
                seen = (j >= one[:, None]) & (j < other[:, None])
                masks[name] = bias_of(seen, q.shape[1] // k.shape[1], q.dtype)
            part = part_attention(x, _taken(k, edges), _taken(v, edges), scaling, masks[name])
            _put(made, True, q, some, part)
    return list(made.values())


def band_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    first: torch.Tensor,
    last: torch.Tensor,
    lse: torch.Tensor,
) -> torch.Tensor:
    """What each key gets of the queries that see it, all of a KV head's together: [B, H, L] in lse's dtype.

    q, k, first and last as in `interval_attention`, lse [B, Hq, Q] of all that the queries see.
    """
    total = torch.zeros(k.shape[:3], dtype=lse.dtype, device=k.device)
    step = min(BLOCK, query_block(q.shape[0] * q.shape[1], k.shape[2]))
    keys = k.to(lse.dtype).flatten(0, 1).mT
    for some in (slice(start, start + step) for start in range(0, q.shape[2], step)):
        low, high = int(first[some][0]), int(last[some][-1])
        if low >= high:
            continue
        x = group_heads(q[:, :, some], k.shape[1]).flatten(0, 1).to(lse.dtype)
        x = torch.cat([x * scaling, -group_heads(lse[:, :, some, None], k.shape[1]).flatten(0, 1)], -1)
        y = torch.cat([keys[:, :, low:high], keys.new_ones(len(keys), 1, high - low)], 1)
        share = (x @ y).exp_().unflatten(1, (-1, last[some].shape[0]))  # the product has subtracted lse
        j, a, b = torch.arange(low, high, device=k.device), first[some].to(k.device), last[some].to(k.device)
        share.masked_fill_((j < a[:, None]) | (j >= b[:, None]), 0)
        total[:, :, low:high] += share.sum((1, 2)).unflatten(0, k.shape[:2])
    return total


def _blocks(first: torch.Tensor, last: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Queries to ask at once: cut where one sees otherwise than the one before it, and where they are many."""
    jumps = ((first.diff() > 1) | (last.diff() > 1)).nonzero()[:, 0] + 1
    for start, stop in pairwise([0, *jumps.tolist(), len(first)]):
        for at in range(start, stop, BLOCK):
            yield at, min(at + BLOCK, stop)


def _taken(x: torch.Tensor, ends: list[tuple[int, int]]) -> torch.Tensor:
    """Some tokens of x [B, H, L, D], not copied where they stand together."""
    parts = [x[:, :, at:to] for at, to in ends]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _put(made: dict[bool, Part], name: bool, q: torch.Tensor, some: slice, part: Part) -> None:
    """Put what some of the queries q read where all of them have room."""
    if name not in made:
        made[name] = torch.zeros_like(q), part[1].new_full(q.shape[:3], float("-inf"))
    for room, new in zip(made[name], part, strict=True):
        room[:, :, some] = new.unflatten(2, (-1, some.stop - some.start)).flatten(1, 2)
