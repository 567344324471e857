"""reference.py in Triton: two passes over the scores, which never leave the chip.

    `_rows_kernel`     a program has some query rows of a KV head, goes over the tokens, and writes their log-sum-exp;
                       over a part of the tokens where there are too few rows to fill a GPU
    `_columns_kernel`  a program has some tokens, goes over the query rows, and writes their sums

Row r of a KV head is query r // G of its query head r % G, so that rows side by side see about the same tokens, and
what none of them sees is skipped. Every sum has one order: no atomics.
"""

import torch
import triton
import triton.language as tl

from longwave.ops.kernels import on_device
from longwave.ops.triton_vectors import vectors

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
PROGRAMS = 256  # with fewer, tokens are split into parts,
PART = 512  # of no fewer than this


@triton.jit
def _rows_kernel(
    q_ptr, k_ptr, visible_ptr, lse_ptr, part, factor, Q, L,
    q_b, q_h, q_q, q_d, k_b, k_h, k_t, k_d,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    begin = tl.program_id(2) * part
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i, head = r // G, h * G + r % G
    held = i < Q
    visible = tl.minimum(tl.load(visible_ptr + b * Q + i, mask=held, other=0), L)
    q = vectors(q_ptr + b * q_b, head * q_h + i * q_q, held, q_d, D, BD)
    most, total = tl.full([BR], -INF, tl.float32), tl.zeros([BR], tl.float32)
    for start in range(begin, tl.minimum(tl.max(visible, 0), begin + part), BC):
        c = start + tl.arange(0, BC)
        k = vectors(k_ptr + b * k_b + h * k_h, c.to(tl.int64) * k_t, c < L, k_d, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        s = tl.where(c[None, :] < visible[:, None], s, -INF)
        new = tl.maximum(most, tl.max(s, 1))
        base = tl.where(new == -INF, 0.0, new)  # nothing seen yet
        total = total * tl.exp2(most - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        most = new
    out = (most + tl.log2(tl.where(total == 0, 1.0, total))) * LN2
    to = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * G + (tl.program_id(1) * G + r % G).to(tl.int64)
    tl.store(lse_ptr + to * Q + i, out, mask=held)


@triton.jit
def _columns_kernel(
    q_ptr, k_ptr, visible_ptr, lse_ptr, first_ptr, mass_ptr, factor, Q, L,
    q_b, q_h, q_q, q_d, k_b, k_h, k_t, k_d,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    k = vectors(k_ptr + b * k_b + h * k_h, c.to(tl.int64) * k_t, c < L, k_d, D, BD)
    sums = tl.zeros([BC, BR], tl.float32)
    first = tl.load(first_ptr + b * tl.num_programs(0) + tl.program_id(0))
    for start in range(first * G, Q * G, BR):
        r = start + tl.arange(0, BR)
        i, head = (r // G).to(tl.int64), h * G + r % G
        held = i < Q
        visible = tl.load(visible_ptr + b * Q + i, mask=held, other=0)
        q = vectors(q_ptr + b * q_b, head * q_h + i * q_q, held, q_d, D, BD)
        lse = tl.load(lse_ptr + (b * H * G + head) * Q + i, mask=held, other=INF)
        lse = tl.where(lse == -INF, INF, lse * LOG2E)  # as in reference.py
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * factor - lse[None, :]
        sums += tl.exp2(tl.where(c[:, None] < visible[None, :], s, -INF))
    tl.store(mass_ptr + tl.program_id(1).to(tl.int64) * L + c, tl.sum(sums, 1), mask=c < L)


def fits(q: torch.Tensor, k: torch.Tensor) -> str | None:
    """Why the kernels cannot answer for q [B, Hq, Q, D] and k [B, H, L, D], or None if they can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or k.dtype != q.dtype:
        return f"q and k must both be float16, bfloat16 or float32, not {q.dtype} and {k.dtype}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        return "the GPU has too little shared memory: compute capability 8.0 or newer is needed"
    if q.shape[3] > 256:
        return f"head_dim must be at most 256, not {q.shape[3]}"
    if k.shape[0] * k.shape[1] > 65535:
        return f"rows of the batch times KV heads must be at most 65535, not {k.shape[0] * k.shape[1]}"
    if max(q.shape[1] // k.shape[1] * q.shape[2], k.shape[2]) >= 2**31 - 256:
        return "queries times group, and stored tokens, must fit int32"
    return None


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, scaling: float, visible: torch.Tensor | None) -> torch.Tensor:
    """As in __init__.py, of what `fits`."""
    own, other, options = _blocks(q)
    rows = triton.cdiv(q.shape[1] // k.shape[1] * q.shape[2], own)
    parts = max(1, min(PROGRAMS // max(1, rows * k.shape[0] * k.shape[1]), k.shape[2] // PART))
    out = torch.full((parts, *q.shape[:3]), -float("inf"), dtype=torch.float32, device=q.device)
    if out.numel() and k.numel():
        part = triton.cdiv(triton.cdiv(k.shape[2], parts), other) * other
        counts = _counts(q, k, visible)
        _launch(_rows_kernel, (rows, parts), q, k, scaling, counts, out, part, BR=own, BC=other, **options)
    return out[0] if parts == 1 else torch.logsumexp(out, 0)


def mass(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    visible: torch.Tensor | None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """As in __init__.py, of what `fits`."""
    out = torch.zeros(k.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() and q.numel():
        lse = log_sum_exp(q, k, scaling, visible) if lse is None else lse.float().contiguous()
        own, other, options = _blocks(q)
        counts = _counts(q, k, visible)
        columns = torch.arange(0, k.shape[2], own, dtype=torch.int32, device=q.device).repeat(q.shape[0], 1)
        # for each block of columns the first query whose count, or one before, goes beyond the block's first column
        first = torch.searchsorted(counts.cummax(1).values, columns, right=True, out_int32=True)
        _launch(
            _columns_kernel, (columns.shape[1], 1), q, k, scaling, counts, lse, first, out, BR=other, BC=own, **options
        )
    return out


def _counts(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """visible int32 [B, Q], in any case."""
    if visible is None:
        return torch.full((q.shape[0], q.shape[2]), k.shape[2], dtype=torch.int32, device=q.device)
    return visible.to(torch.int32).contiguous()


def _blocks(q: torch.Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows or columns of a program, how many of the others it takes at a time, and how it is launched.

    No more than 96 KiB of shared memory at 256 channels, and no registers spilled.
    """
    if q.dtype == torch.float32:  # no tensor cores
        return 32, 32, dict(num_warps=4, num_stages=2)
    if q.shape[3] > 128:
        return 128, 32, dict(num_warps=8, num_stages=2)
    return 128, 64, dict(num_warps=8, num_stages=3)


def _launch(kernel, programs, q, k, scaling, *rest, **options):
    with on_device(q.device):
        kernel[programs[0], k.shape[0] * k.shape[1], programs[1]](
            q, k, *rest, scaling * LOG2E.value, q.shape[2], k.shape[2], *q.stride(), *k.stride(),
            H=k.shape[1], G=q.shape[1] // k.shape[1], D=q.shape[3], BD=max(16, triton.next_power_of_2(q.shape[3])),
            **options,
        )  # fmt: skip
