"""`best` of reference.py in Triton: a program has some query rows of a KV head, goes over the tokens, and keeps the
best of them in registers. Scores never leave the chip.

Row r of a KV head is query r // G of its query head r % G. Where there are too few rows to fill a GPU the tokens are
split into parts, whose best are put together in torch. The least of what is kept gives way, of equals the last.
"""

import torch
import triton
import triton.language as tl

from longwave.ops.kernels import on_device
from longwave.ops.select.reference import TILE, first
from longwave.ops.triton_vectors import vectors

INF = tl.constexpr(float("inf"))
PROGRAMS = 256  # with fewer, tokens are split into parts,
PART = 2048  # of no fewer than this, and of whole tiles


@triton.jit
def _best_kernel(
    q_ptr, k_ptr, begin_ptr, end_ptr, value_ptr, index_ptr, part, Q, L,
    q_b, q_h, q_q, q_d, k_b, k_h, k_t, k_d, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    begin, end = tl.load(begin_ptr + b), tl.minimum(tl.load(end_ptr + b), L)
    own = tl.program_id(2) * part
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i, head = r // G, h * G + r % G
    held = i < Q
    q = vectors(q_ptr + b * q_b, head * q_h + i * q_q, held, q_d, D, BD)
    slot = tl.arange(0, BK)
    value = tl.where((slot < K)[None, :], -INF, INF) + tl.zeros([BR, BK], tl.float32)
    index = (-1 - slot)[None, :] + tl.zeros([BR, BK], tl.int32)
    for start in range(tl.maximum(begin // BC * BC, own), tl.minimum(end, own + part), BC):
        c = start + tl.arange(0, BC)
        inside = (c >= begin) & (c < end)
        k = vectors(k_ptr + b * k_b + h * k_h, c.to(tl.int64) * k_t, inside, k_d, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where(inside[None, :], s, -INF)
        if tl.max((tl.max(s, 1) > tl.min(value, 1)).to(tl.int32), 0) > 0:
            for _ in tl.static_range(ROUNDS):
                most, least = tl.max(s, 1), tl.min(value, 1)
                at = tl.min(tl.where(s == most[:, None], c[None, :], L), 1)
                last = tl.max(tl.where(value == least[:, None], index, -BK - 1), 1)
                put = (most > least)[:, None] & (value == least[:, None]) & (index == last[:, None])
                value = tl.where(put, most[:, None], value)
                index = tl.where(put, at[:, None], index)
                s = tl.where(c[None, :] == at[:, None], -INF, s)
    to = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * G + r % G
    to = (to * Q + i)[:, None] * K + slot[None, :]
    some = held[:, None] & (slot < K)[None, :]
    tl.store(value_ptr + to, value, mask=some)
    tl.store(index_ptr + to, tl.maximum(index, -1), mask=some)


def fits(q: torch.Tensor, k: torch.Tensor, top: int) -> str | None:
    """Why the kernel cannot answer for q [B, Hq, Q, D] and k [B, H, L, D], or None if it can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or k.dtype != q.dtype:
        return f"q and k must both be float16, bfloat16 or float32, not {q.dtype} and {k.dtype}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        return "the GPU has too little shared memory: compute capability 8.0 or newer is needed"
    if q.shape[3] * q.dtype.itemsize > 512:
        return f"a vector of a head must have at most 512 bytes, not {q.shape[3] * q.dtype.itemsize}"
    if top > 16:
        return f"a query votes for at most 16 tokens, not {top}"
    if k.shape[0] * k.shape[1] > 65535:
        return f"rows of the batch times KV heads must be at most 65535, not {k.shape[0] * k.shape[1]}"
    if max(q.shape[1] // k.shape[1] * q.shape[2], k.shape[2]) >= 2**31 - 256:
        return "queries times group, and stored tokens, must fit int32"
    return None


def best(
    q: torch.Tensor, k: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, top: int, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in reference.py, of what `fits`."""
    size = 32 if q.dtype == torch.float32 else 64  # no tensor cores
    rows = triton.cdiv(q.shape[1] // k.shape[1] * q.shape[2], size)
    parts = max(1, min(PROGRAMS // max(1, rows * k.shape[0] * k.shape[1]), k.shape[2] // PART))
    part = triton.cdiv(triton.cdiv(k.shape[2], parts), TILE) * TILE
    value = torch.full((parts, *q.shape[:3], top), -float("inf"), dtype=torch.float32, device=q.device)
    index = torch.full(value.shape, -1, dtype=torch.int32, device=q.device)
    if index.numel() and k.numel():
        with on_device(q.device):
            _best_kernel[rows, k.shape[0] * k.shape[1], parts](
                q, k, begin.to(torch.int32), end.to(torch.int32), value, index, part, q.shape[2], k.shape[2],
                *q.stride(), *k.stride(), H=k.shape[1], G=q.shape[1] // k.shape[1], D=q.shape[3],
                BD=max(16, triton.next_power_of_2(q.shape[3])), BR=size, BC=TILE, K=top,
                BK=max(2, triton.next_power_of_2(top)), ROUNDS=top if exact else 1, num_warps=8,
                num_stages=2 if q.shape[3] * q.dtype.itemsize <= 256 else 1,
            )  # fmt: skip
    value, index = (x.movedim(0, -2).flatten(-2) for x in (value, index))
    order = index.argsort(-1)  # slots are in no order, and of equals the earlier one comes first
    value, index = first(value.gather(-1, order), index.gather(-1, order), top)
    return value, index.long()
