"""reference.py in Triton: a program has one segment of one head, reads it once, and writes what it becomes."""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from longwave.ops.merge.reference import EVEN, MOST
from longwave.ops.triton_vectors import INTERPRETED, vectors

INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_EVEN, _MOST = tl.constexpr(EVEN), tl.constexpr(MOST)
ROWS = 32  # queries of a block


@triton.jit
def _queries(q_ptr, lse_ptr, start, b, h, q_b, q_h, q_p, q_d, P, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
             BR: tl.constexpr, H: tl.constexpr):  # fmt: skip
    """Queries [BR, BD] of a KV head from row `start` on, and their lse [BR]: infinite where there is none."""
    r = start + tl.arange(0, BR)
    head, i, held = h * G + r // P, r % P, r < G * P
    x = vectors(q_ptr + b * q_b, head * q_h + i * q_p, held, q_d, D, BD)
    lse = tl.load(lse_ptr + (b * H * G + head) * P + i, mask=held, other=INF)
    return x, tl.where(lse == -INF, INF, lse)


@triton.jit
def _merge_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, heads_ptr, bias_ptr, scaling, many, P,
    q_b, q_h, q_p, q_d, k_b, k_h, k_t, v_b, v_h, v_t, M: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    b, h = (tl.program_id(1) // M).to(tl.int64), tl.load(heads_ptr + tl.program_id(1) % M).to(tl.int64)
    t, d = tl.arange(0, T), tl.arange(0, BD)
    inside = (t >= 0)[:, None] & (d < D)[None, :]
    k_at = k_ptr + b * k_b + h * k_h + (n * T + t)[:, None] * k_t + d[None, :]
    v_at = v_ptr + b * v_b + h * v_h + (n * T + t)[:, None] * v_t + d[None, :]
    k = tl.load(k_at, mask=inside, other=0.0)
    if INTERPRETED:
        k = k.to(tl.float32)
    got = tl.zeros([T], tl.float32)
    for start in range(0, G * P, BR):
        q, lse = _queries(q_ptr, lse_ptr, start, b, h, q_b, q_h, q_p, q_d, P, G, D, BD, BR, H)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scaling
        got += tl.sum(tl.exp(scores - lse[None, :]), 1)
    total = tl.sum(got, 0)
    weight = got + _EVEN * tl.maximum(total / T, TINY)
    weight = weight / tl.sum(weight, 0)
    key = tl.sum(k.to(tl.float32) * weight[:, None], 0)
    most, kept = tl.full([1], -INF, tl.float32), tl.zeros([1], tl.float32)
    for start in range(0, G * P, BR):
        q, lse = _queries(q_ptr, lse_ptr, start, b, h, q_b, q_h, q_p, q_d, P, G, D, BD, BR, H)
        score = tl.sum(q.to(tl.float32) * key[None, :], 1) * scaling - lse
        new = tl.maximum(most, tl.max(score, 0))
        base = tl.where(new == -INF, 0.0, new)  # no query yet
        kept = kept * tl.exp(most - base) + tl.sum(tl.exp(score - base), 0)
        most = new
    raised = tl.log(tl.maximum(total, TINY)) - (most + tl.log(tl.where(kept == 0, 1.0, kept)) + many)
    raised = tl.where(most == -INF, 0.0, tl.minimum(tl.maximum(raised, -_MOST), _MOST))
    tl.store(bias_ptr + (b * H + h) * tl.num_programs(0) + n + tl.arange(0, 1), raised)
    tl.store(k_at, (key[None, :] + tl.zeros([T, BD], tl.float32)).to(k_ptr.dtype.element_ty), mask=inside)
    v = tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
    value = tl.sum(v * weight[:, None], 0)
    tl.store(v_at, (value[None, :] + tl.zeros([T, BD], tl.float32)).to(v_ptr.dtype.element_ty), mask=inside)


def fits(q: torch.Tensor, k: torch.Tensor, segment: int) -> str | None:
    """Why the kernel cannot merge segments of k [B, H, N * segment, D], or None if it can."""
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype:
        return f"q and k must both be float16 or bfloat16, not {q.dtype} and {k.dtype}"
    if segment & (segment - 1) or not 16 <= segment <= 256 or segment * k.shape[3] > 1 << 15:
        return f"a segment must be a power of two from 16 on, of 32768 numbers at most, not {segment} x {k.shape[3]}"
    if k.shape[0] * k.shape[1] > 65535:
        return f"rows of the batch times KV heads must be at most 65535, not {k.shape[0] * k.shape[1]}"
    return None


@functools.lru_cache(maxsize=256)
def _numbers(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 on the device, put there once: a copy would wait for the device at every prompt and layer."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


def merge_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
    segment: int,
    heads: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in __init__.py, of what `fits`."""
    batch, kv_heads, tokens, dim = k.shape
    k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    bias = torch.zeros(batch, kv_heads, tokens // segment, dtype=torch.float32, device=k.device)
    if not bias.numel() or not heads:
        return k, v, bias
    numbers = _numbers(tuple(heads), k.device)
    _merge_kernel[(tokens // segment, batch * len(heads))](
        q, k, v, lse.float().contiguous(), numbers, bias, scaling, math.log(segment), q.shape[2],
        *q.stride(), *k.stride()[:3], *v.stride()[:3], M=len(heads), H=kv_heads, G=q.shape[1] // kv_heads,
        T=segment, D=dim, BD=max(16, triton.next_power_of_2(dim)), BR=ROWS, num_warps=8, num_stages=1,
    )  # fmt: skip
    return k, v, bias
