"""expand.py in Triton: one pass that writes nothing but K or V. A program has some tokens of one head.

Products are of TF32 where what is written has 16 bits: it keeps as many as float16 has, and more than bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from longwave.codec.predict import Said
from longwave.ops.kernels import on_device

if TYPE_CHECKING:
    from longwave.codec.expand import Turn

TOKENS, COMPONENTS = 128, 32  # of a program, and of one of its products


@triton.jit
def _said(own_ptr, after_ptr, now, before, column, held, C, KNOWN: tl.constexpr):
    x = tl.load(own_ptr + now[:, None] * C + column[None, :], mask=held, other=0.0)
    if KNOWN:
        there = held & (before >= 0)[:, None]
        x += tl.load(after_ptr + before[:, None] * C + column[None, :], mask=there, other=0.0)
    return x


@triton.jit
def _kernel(
    c_ptr, axes_ptr, own_ptr, after_ptr, now_ptr, before_ptr, pair_ptr, cos_ptr, sin_ptr, out_ptr,
    N, M, C, H, D, layer_stride, token_stride, head_stride,
    HALF: tl.constexpr, TOKENS: tl.constexpr, COMPONENTS: tl.constexpr, TURNS: tl.constexpr, KNOWN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    layer, head = tl.program_id(1) // H, tl.program_id(1) % H
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    first, m = tl.program_id(1).to(tl.int64) * D, tl.arange(0, COMPONENTS)
    one, other = tl.load(pair_ptr + tl.arange(0, HALF)), tl.load(pair_ptr + HALF + tl.arange(0, HALF))
    real, one_real, other_real = (t < N)[:, None], (one < D)[None, :], (other < D)[None, :]
    c_ptr += t[:, None] * M + m[None, :]
    one_ptr = axes_ptr + (first + one)[None, :] * M + m[:, None]
    other_ptr = axes_ptr + (first + other)[None, :] * M + m[:, None]
    x, y = tl.zeros([TOKENS, HALF], tl.float32), tl.zeros([TOKENS, HALF], tl.float32)
    for start in range(0, M, COMPONENTS):
        c = tl.load(c_ptr + start, mask=real, other=0.0)
        x = tl.dot(c, tl.load(one_ptr + start, mask=one_real, other=0.0), x, input_precision=PRECISION)
        y = tl.dot(c, tl.load(other_ptr + start, mask=other_real, other=0.0), y, input_precision=PRECISION)
    now, before = t * 0, t * 0
    if KNOWN:
        now = tl.load(now_ptr + t, mask=t < N, other=0)
        before = tl.load(before_ptr + t, mask=t < N, other=-1)
    x += _said(own_ptr, after_ptr, now, before, first + one, real & one_real, C, KNOWN)
    y += _said(own_ptr, after_ptr, now, before, first + other, real & other_real, C, KNOWN)
    if TURNS:
        at = (layer * N + t)[:, None] * D
        one_at, other_at = at + one[None, :], at + other[None, :]
        turned = x * tl.load(cos_ptr + one_at, mask=real & one_real, other=0.0)
        turned += y * tl.load(sin_ptr + one_at, mask=real & one_real, other=0.0)
        y = y * tl.load(cos_ptr + other_at, mask=real & other_real, other=0.0)
        y += x * tl.load(sin_ptr + other_at, mask=real & other_real, other=0.0)
        x = turned
    out_ptr += layer.to(tl.int64) * layer_stride + head * head_stride + t[:, None] * token_stride
    tl.store(out_ptr + one[None, :], x.to(out_ptr.dtype.element_ty), mask=real & one_real)
    tl.store(out_ptr + other[None, :], y.to(out_ptr.dtype.element_ty), mask=real & other_real)


def _pairs(turn: Turn | None, size: int, device: torch.device) -> Tensor:
    """Channels so that partners stand in the same place of two halves: int32 [2, half], `size` or more where none is.
    Nobody waits for the device."""
    half = max(16, triton.next_power_of_2(triton.cdiv(size, 2)))
    own = torch.arange(2 * half, device=device)
    if turn is None:
        return own.view(2, half).int()
    partner = torch.cat([turn.rotation.partner, own[size:]])
    alone = (partner == own) * 4 * half  # they come last, two by two
    return (alone + 2 * torch.minimum(own, partner) + (own > partner)).argsort().view(half, 2).mT.contiguous().int()


def expand(c: Tensor, axes: Tensor, said: Said, turn: Turn | None, out: Tensor) -> None:
    """As expand.expand, of float32 c and axes."""
    layers, count, heads, size = out.shape
    into = out if out.stride(3) == 1 and out.dtype != torch.float64 else out.new_empty(out.shape, dtype=torch.float32)
    now, before = said.now, said.before
    if now is not None and before is not None:
        before = pad(before, (now.shape[1] - before.shape[1], 0), value=-1)
    cos = sin = c  # nobody reads these
    if turn is not None:
        cos, sin = turn.rotation.turns(turn.positions, torch.float32)
    pairs, beside = _pairs(turn, size, c.device), -c.shape[1] % COMPONENTS
    c, axes = (pad(x, (0, beside)) if beside else x.contiguous() for x in (c, axes))
    with on_device(c.device):
        _kernel[(triton.cdiv(count, TOKENS), layers * heads)](
            c, axes, said.own.contiguous(), said.own if said.after is None else said.after.contiguous(),
            c if now is None else now.contiguous(), c if before is None else before.contiguous(),
            pairs, cos.contiguous(), sin.contiguous(), into,
            count, c.shape[1], len(axes), heads, size, into.stride(0), into.stride(1), into.stride(2),
            HALF=pairs.shape[1], TOKENS=TOKENS, COMPONENTS=COMPONENTS, TURNS=turn is not None, KNOWN=now is not None,
            PRECISION="tf32" if into.dtype.itemsize == 2 else "ieee", num_warps=8,
        )  # fmt: skip
    if into is not out:
        out.copy_(into)
