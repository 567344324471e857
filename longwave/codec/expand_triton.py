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

TOKENS, COMPONENTS = 64, 32  # of a program, and of one of its products


@triton.jit
def _along(c, axes_ptr, column, own, m, M, C, PRECISION: tl.constexpr):
    """c [tokens, components] along the axes of some columns."""
    axes = tl.load(axes_ptr + m[:, None] * C + column[None, :], mask=(m < M)[:, None] & own[None, :], other=0.0)
    return tl.dot(c, axes, input_precision=PRECISION)


@triton.jit
def _said(own_ptr, after_ptr, now, before, column, held, C, KNOWN: tl.constexpr):
    x = tl.load(own_ptr + now[:, None] * C + column[None, :], mask=held, other=0.0)
    if KNOWN:
        there = held & (before >= 0)[:, None]
        x += tl.load(after_ptr + before[:, None] * C + column[None, :], mask=there, other=0.0)
    return x


@triton.jit
def _kernel(
    c_ptr, axes_ptr, own_ptr, after_ptr, now_ptr, before_ptr, partner_ptr, cos_ptr, sin_ptr, out_ptr,
    N, M, C, H, D, layer_stride, token_stride, head_stride,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, COMPONENTS: tl.constexpr, TURNS: tl.constexpr, KNOWN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    layer, head = tl.program_id(1) // H, tl.program_id(1) % H
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, SIZE)
    real, own = t < N, d < D
    held = real[:, None] & own[None, :]
    first = tl.program_id(1) * D
    column = first + d
    x = tl.zeros([TOKENS, SIZE], tl.float32)
    if TURNS:
        other = first + tl.load(partner_ptr + d, mask=own, other=0).to(tl.int32)
        y = tl.zeros([TOKENS, SIZE], tl.float32)
    for start in range(0, M, COMPONENTS):
        m = start + tl.arange(0, COMPONENTS)
        c = tl.load(c_ptr + t[:, None] * M + m[None, :], mask=real[:, None] & (m < M)[None, :], other=0.0)
        x += _along(c, axes_ptr, column, own, m, M, C, PRECISION)
        if TURNS:
            y += _along(c, axes_ptr, other, own, m, M, C, PRECISION)
    now, before = t * 0, t * 0
    if KNOWN:
        now = tl.load(now_ptr + t, mask=real, other=0)
        before = tl.load(before_ptr + t, mask=real, other=-1)
    x += _said(own_ptr, after_ptr, now, before, column, held, C, KNOWN)
    if TURNS:
        y += _said(own_ptr, after_ptr, now, before, other, held, C, KNOWN)
        at = (layer * N + t)[:, None] * D + d[None, :]
        x = x * tl.load(cos_ptr + at, mask=held, other=0.0) + y * tl.load(sin_ptr + at, mask=held, other=0.0)
    out_ptr += layer.to(tl.int64) * layer_stride + head * head_stride
    tl.store(out_ptr + t[:, None] * token_stride + d[None, :], x.to(out_ptr.dtype.element_ty), mask=held)


def expand(c: Tensor, axes: Tensor, said: Said, turn: Turn | None, out: Tensor) -> None:
    """As expand.expand, of float32 c and axes."""
    layers, count, heads, size = out.shape
    into = out if out.stride(3) == 1 and out.dtype != torch.float64 else out.new_empty(out.shape, dtype=torch.float32)
    now, before = said.now, said.before
    if now is not None and before is not None:
        before = pad(before, (now.shape[1] - before.shape[1], 0), value=-1)
    partner = cos = sin = c  # nobody reads these
    if turn is not None:
        partner = turn.rotation.partner
        cos, sin = turn.rotation.turns(turn.positions, torch.float32)
    with on_device(c.device):
        _kernel[(triton.cdiv(count, TOKENS), layers * heads)](
            c.contiguous(), axes.mT.contiguous(), said.own.contiguous(),
            said.own if said.after is None else said.after.contiguous(),
            c if now is None else now.contiguous(), c if before is None else before.contiguous(),
            partner, cos.contiguous(), sin.contiguous(), into,
            count, c.shape[1], len(axes), heads, size, into.stride(0), into.stride(1), into.stride(2),
            SIZE=max(16, triton.next_power_of_2(size)), TOKENS=TOKENS, COMPONENTS=COMPONENTS,
            TURNS=turn is not None, KNOWN=now is not None,
            PRECISION="tf32" if into.dtype.itemsize == 2 else "ieee", num_warps=4,
        )  # fmt: skip
    if into is not out:
        out.copy_(into)
