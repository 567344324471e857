"""Ordinary attention over dense K and V whose rows may differ in length.

Shapes: B batch, Hq query heads, H key/value heads, Q queries, L stored tokens, D head_dim.
"""

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

MASK_ELEMENTS = 1 << 25  # scores, or mask entries, held at once


def query_block(rows: int, columns: int) -> int:
    """Queries to take at a time so that `rows` x queries x `columns` stays within MASK_ELEMENTS."""
    return max(1, MASK_ELEMENTS // max(1, rows * columns))


def group_heads(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, Hq, Q, D] -> [B, H, G * Q, D]: query head h belongs to key/value head h // G."""
    b, hq, queries, d = q.shape
    return q.reshape(b, kv_heads, hq // kv_heads * queries, d)


def visible_mask(visible: torch.Tensor, columns: int) -> torch.Tensor:
    """visible [B, Q] counts the stored tokens a query may see -> bool [B, 1, Q, columns]."""
    return (torch.arange(columns, device=visible.device) < visible[..., None])[:, None]


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    visible: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention: q [B, Hq, Q, D], k and v [B, H, L, D] -> [B, Hq, Q, D].

    `visible` [B, Q] lets query i of row b see columns 0 .. visible[b, i] - 1; None lets it see all.
    `mask` (bool or additive, [B or 1, Hq or 1, Q, L]) is a caller's own mask and replaces `visible`.
    """
    b, hq, queries, d = q.shape
    groups = hq // k.shape[1]
    if not k.shape[2]:  # all that came is padding
        return torch.zeros_like(q)
    if visible is None and mask is None:
        if queries == 1 and q.dtype in (torch.float32, torch.float64):
            # one row a head: two products beat the fused kernel on a CPU and need no copy of K and V
            p = torch.softmax(group_heads(q, k.shape[1]) * scaling @ k.mT, dim=-1)
            return (p @ v).reshape(b, hq, 1, d)
        return sdpa(q, k, v, scale=scaling, enable_gqa=groups > 1)
    if mask is None and queries == 1 and q.dtype in (torch.float32, torch.float64):
        assert visible is not None
        scores = group_heads(q, k.shape[1]) * scaling @ k.mT  # [B, H, G, L], and no copy of K and V
        hidden = ~visible_mask(visible, k.shape[2])
        p = torch.softmax(scores.masked_fill(hidden, torch.finfo(q.dtype).min), dim=-1)
        return (p @ v).reshape(b, hq, 1, d)
    if groups > 1:  # masked GQA falls back to a slow kernel on a GPU
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if mask is not None:
        return sdpa(q, k, v, attn_mask=mask, scale=scaling)
    assert visible is not None
    out = torch.empty_like(q)
    step = query_block(b, k.shape[2])
    for start in range(0, queries, step):
        seen = visible[:, start : start + step]
        allowed = visible_mask(seen, k.shape[2])
        allowed[..., 0] |= seen[:, None] == 0  # a padding query sees nothing: let it see something, not NaN
        out[:, :, start : start + step] = sdpa(q[:, :, start : start + step], k, v, attn_mask=allowed, scale=scaling)
    return out


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """A whole prompt at once: as many queries as tokens, each sees itself and what came before."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type == "cuda" and q.dtype in (torch.float32, torch.float64):
        # no fused kernel groups heads in these types, and the fallback holds all scores at once
        k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
    return sdpa(q, k, v, scale=scaling, is_causal=True, enable_gqa=groups > 1)


def last_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, causal: bool = True
) -> torch.Tensor:
    """Attention of the last tokens over all: q [B, Hq, Q, D] are the queries of the last Q of k, v [B, H, L, D].

    causal: query i sees the first L - Q + 1 + i; else all. One kernel without a mask where Q = L, where not causal, and
    on CUDA where flash attention takes these; blocks of masks elsewhere.
    """
    groups, queries, length = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if not causal or queries == 1:
        return dense_attention(q, k, v, scaling, None)
    if queries == length:
        return causal_attention(q, k, v, scaling)
    if q.is_cuda and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, groups > 1)):
        return sdpa(q, k, v, attn_mask=causal_lower_right(queries, length), scale=scaling, enable_gqa=groups > 1)
    visible = torch.arange(length - queries + 1, length + 1, device=q.device)[None]
    return dense_attention(q, k, v, scaling, visible)


def step_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, seen: torch.Tensor
) -> torch.Tensor:
    """One query a row over storage of which row b sees the first seen[b, 0] tokens: q [B, Hq, 1, D] -> same shape.

    k, v [B, H, L, D], seen [B, 1] on their device. Nothing is read back and no shape depends on `seen`.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        return dense_attention(q, k, v, scaling, seen)
    # sdpa with a mask copies K and V for grouped heads, or gives a whole row to one program
    x = group_heads(q, k.shape[1]).flatten(0, 1)
    scores = _product(x, k.flatten(0, 1).mT).unflatten(0, k.shape[:2]) * scaling
    scores.masked_fill_(~visible_mask(seen, k.shape[2]), float("-inf"))
    p = torch.exp(scores - scores.amax(-1, keepdim=True))  # not divided yet: float16 would lose small shares
    out = _product(p.to(v.dtype).flatten(0, 1), v.flatten(0, 1)).unflatten(0, k.shape[:2])
    return (out / p.sum(-1, keepdim=True)).to(q.dtype).reshape(q.shape)


def ragged_step_attention(
    q: torch.Tensor,
    far_k: torch.Tensor,
    far_v: torch.Tensor,
    ends: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    seen: torch.Tensor,
) -> torch.Tensor:
    """One query a row over heads that hold different numbers of tokens: q [B, Hq, 1, D] -> same shape.

    far_k, far_v [B, F, D]: head h of row b has those from ends[b, h - 1] to ends[b, h], int [B, H]. k, v [B, H, L, D]:
    of these row b sees the first seen[b, 0] in every head. Every query meets all F keys, which are read once; those of
    other heads do not count. Nothing is read back and no shape depends on `ends` or `seen`.
    """
    heads, times = k.shape[1], torch.bmm if q.dtype in (torch.float32, torch.float64) else _product
    x = group_heads(q, heads)
    near = times(x.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, k.shape[:2]) * scaling
    far = times(x.flatten(1, 2), far_k.mT).unflatten(1, x.shape[1:3]) * scaling
    owner = (torch.arange(far_k.shape[1], device=q.device) >= ends[..., None]).sum(1)  # [B, F]; H behind the last end
    own = owner[:, None] == torch.arange(heads, device=q.device)[:, None]
    lowest = torch.finfo(near.dtype).min  # a row that sees nothing averages, not NaN
    near = near.masked_fill(~visible_mask(seen, k.shape[2]), lowest)
    far = far.masked_fill(~own[:, :, None], lowest)
    most = torch.maximum(near.amax(-1, keepdim=True), far.amax(-1, keepdim=True))
    near, far = torch.exp(near - most), torch.exp(far - most)  # not divided yet, as above
    out = times(near.to(v.dtype).flatten(0, 1), v.flatten(0, 1)).unflatten(0, k.shape[:2])
    out = out + times(far.to(v.dtype).flatten(1, 2), far_v).unflatten(1, x.shape[1:3])
    return (out / (near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True))).to(q.dtype).reshape(q.shape)


def subset_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, seen: torch.Tensor
) -> torch.Tensor:
    """One query a row over tokens chosen for each KV head: q [B, Hq, 1, D], k and v [B, H, L, D], seen bool [B, H, L]
    -> [B, Hq, 1, D]. In float32, or float64 for such q."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = group_heads(q, k.shape[1]).to(kind) * scaling @ k.to(kind).mT
    p = torch.softmax(scores.masked_fill(~seen[:, :, None], torch.finfo(kind).min), dim=-1)
    return (p @ v.to(kind)).to(q.dtype).reshape(q.shape)


def subset_log_sum_exp(q: torch.Tensor, k: torch.Tensor, scaling: float, seen: torch.Tensor) -> torch.Tensor:
    """log of what `subset_attention` divides by: [B, Hq, 1], in float32, or float64 for such q."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = group_heads(q, k.shape[1]).to(kind) * scaling @ k.to(kind).mT
    return scores.masked_fill(~seen[:, :, None], float("-inf")).logsumexp(-1).reshape(q.shape[:3])


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [N, R, C] @ b [N, C, S] of 16-bit numbers in float32, without copies of them where the device can."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
