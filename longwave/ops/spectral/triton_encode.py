"""Compress segments into pages on a GPU: the twin of `reference.encode`, in Triton.

Four kernels, each launched once over a list of work made from the layout, an item for every segment of every row:
states, 16-bit values, codes along time, codes across channels. What to store and where stands in the list, so one
compiled kernel serves all layers of a model whatever their plan.

All is computed in float32, divisions rounded to nearest, as torch does; sums are taken in another order. A code on the
edge between two, a state likewise, may fall to the other side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from longwave.ops.codes import BITS, SPANS, signs
from longwave.ops.spectral.layout import Layout

# the interpreter multiplies the bits of bfloat16, not the numbers: there, one product in float32
_SPLIT = not triton.knobs.runtime.interpret
_OWN = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# numbers of an item of work, by kernel; -1 where there is none
STATES = tl.constexpr(7)  # side (0: K, 1: V), head, states, channels, the first of these, byte of states, of gains (-1)
VALUES = tl.constexpr(6)  # side, head, first channel, channels of the tile, of the run, byte of the tile's first value
TIME = tl.constexpr(9)  # side, head, first channel, channels, bits, byte of codes, of scales, of zeros, first span
TOKEN = tl.constexpr(8)  # side, head, bits, byte of codes, of scales, of zeros (-1), first span, item of `STATES` (-1)
TILE = 16  # channels of an item of `TIME`
WIDE = 32  # of one of `VALUES`
_SPAN_FIELDS = 10  # numbers of a row of spans: how many, and they


@dataclass(frozen=True, eq=False)
class Tables:
    """Where the kernels put what.

    states int32 [items, STATES], values [items, VALUES], time [items, TIME]; tokens: (scales of a token, whether
        rotated) -> [items, TOKEN]. order and place int32 [2, H, D]: the channel at a place, and its inverse. spans
        float32: rows of (how many, they). signs [D, D]: the rotation times sqrt(D), all 1 and -1.
    """

    layout: Layout
    states: torch.Tensor
    values: torch.Tensor
    time: torch.Tensor
    tokens: dict[tuple[int, bool], torch.Tensor]
    order: torch.Tensor
    place: torch.Tensor
    spans: torch.Tensor
    signs: torch.Tensor


def fits(layout: Layout) -> str | None:
    """Why the kernels cannot make such pages, or None if they can."""
    if layout.dtype not in _OWN:
        return f"the model computes in {layout.dtype}, not in 16 bits"
    sizes = (layout.dim, 32), (layout.segment, 16)
    if any(n & (n - 1) or not least <= n <= 256 for n, least in sizes):
        return "head_dim (32 to 256) and segment (16 to 256) must be powers of two"
    if layout.page_bytes >= 2**31:
        return "a page must be smaller than 2 GiB"
    for group in (*layout.k, *layout.v):
        for bits, n in group.code.runs:
            if bits in BITS and group.code.axis != "time" and n != layout.dim:
                return "codes across channels must take in all of a head's"
            if group.code.residual and (bits not in BITS or group.code.axis == "time"):
                return "what states leave is coded across channels, in 1 to 8 bits"
    return None


def tables_of(layout: Layout) -> Tables:
    """The work of a layout that `fits`, on its device."""
    states: list[list[int]] = []
    values: list[list[int]] = []
    time: list[list[int]] = []
    tokens: dict[tuple[int, bool], list[list[int]]] = {}
    order = torch.zeros(2, layout.heads, layout.dim, dtype=torch.int64)
    t = layout.segment
    for side, groups in enumerate((layout.k, layout.v)):
        for group in groups:
            code = group.code
            for i, head in enumerate(group.heads.tolist()):
                order[side, head] = group.order[i].cpu().long()
                item, start = -1, 0
                if group.states is not None:
                    item, first = len(states), 0 if code.residual else code.kept
                    gains = group.gains.at(i) if group.gains else -1
                    at = group.states.at(i)
                    states.append([side, head, code.states, code.smooth(layout.dim), first, at, gains])
                for (bits, n), held, scales in zip(code.runs, group.values, group.scales, strict=True):
                    data = held.at(i)
                    if scales is None:
                        for c in range(0, n, WIDE):
                            values.append([side, head, start + c, min(WIDE, n - c), n, data + 2 * c])
                    elif code.axis == "time":
                        at = scales.at(i)
                        for c in range(0, n, TILE):
                            to = data + c * t * bits // 8, at + 2 * c, at + 2 * (n + c)
                            time.append([side, head, start + c, min(TILE, n - c), bits, *to, _spans(bits, code.fit)])
                    else:
                        at, shared = scales.at(i), scales.shape[-1]
                        zeros = at + 2 * t * shared if code.zero else -1
                        own = [side, head, bits, data, at, zeros, _spans(bits, code.fit), item]
                        tokens.setdefault((shared, code.residual), []).append(own)
                    start += n
    device = layout.k[0].heads.device

    def table(rows: list[list[int]], columns: int) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, columns)

    spans = torch.zeros(1 + len(BITS), _SPAN_FIELDS)
    for row, found in enumerate(((1.0,), *(SPANS[bits] for bits in BITS))):
        spans[row, : 1 + len(found)] = torch.tensor((len(found), *found))
    turn = signs(layout.dim).to(device, torch.bfloat16 if _SPLIT else torch.float32)
    return Tables(
        layout,
        table(states, STATES.value),
        table(values, VALUES.value),
        table(time, TIME.value),
        {key: table(rows, TOKEN.value) for key, rows in tokens.items()},
        order.to(device, torch.int32),
        order.argsort(-1).to(device, torch.int32),
        spans.to(device),
        turn,
    )


def _spans(bits: int, fit: bool) -> int:
    """Where the spans of so many bits start in `Tables.spans`."""
    return (1 + BITS.index(bits) if fit else 0) * _SPAN_FIELDS


@triton.jit
def _segment(
    k_ptr, v_ptr, side, h, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, T: tl.constexpr
):  # fmt: skip
    """The first value of a program's segment in one head of K or V, and how many lie from one token to the next."""
    n, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if side == 0:
        first, stride = k_ptr + b * stride_kb + h.to(tl.int64) * stride_kh + n * T * stride_kt, stride_kt + 0
    else:
        first, stride = v_ptr + b * stride_vb + h.to(tl.int64) * stride_vh + n * T * stride_vt, stride_vt + 0
    return first, stride


@triton.jit
def _page(pages_ptr, page_bytes):
    n, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    return pages_ptr + (b * tl.num_programs(1) + n) * page_bytes


@triton.jit
def _rounded(x, low, high):
    """The nearest whole number from low to high, the even one of two; NaN gives any."""
    return tl.minimum(tl.maximum(x, low), high) + 12582912.0 - 12582912.0  # 1.5 * 2^23: no bits are left for fractions


@triton.jit
def _quantize(x, bits, zero, spans):
    """`codes.quantize` of rows x float32 [R, C]: codes int32 [R, C], scale and zero float16 [R], and whether a row
    exceeds these. Rows whose `zero` is 0 are centred on 0."""
    top = ((1 << bits) - 1).to(tl.float32)
    low, high = tl.min(x, 1), tl.max(x, 1)
    if zero != 0:
        centre, reach = (low + high) * 0.5, high - low
    else:
        centre, reach = low * 0.0, tl.maximum(-low, high) * 2.0
    best, least, first = reach, reach, reach
    for i in range(tl.load(spans).to(tl.int32)):
        wish = tl.math.div_rn(reach * tl.load(spans + 1 + i), top)
        scale = tl.maximum(wish, 0.00006103515625).to(tl.float16).to(tl.float32)  # codes.TINY
        start = centre - scale * (top * 0.5)
        if zero != 0:
            start = start.to(tl.float16).to(tl.float32)
        codes = _rounded(tl.math.div_rn(x - start[:, None], scale[:, None]), 0.0, top)
        off = codes * scale[:, None] + start[:, None] - x
        error = tl.sum(off * off, 1)
        better = (error < least) | (i == 0)
        best, first = tl.where(better, scale, best), tl.where(better, start, first)
        least = tl.where(better, error, least)
    codes = _rounded(tl.math.div_rn(x - first[:, None], best[:, None]), 0.0, top)
    bad = (best == float("inf")) | (tl.abs(first) == float("inf")) | (least != least)  # an error is NaN where x is
    return codes.to(tl.int32), best.to(tl.float16), first.to(tl.float16), bad


@triton.jit
def _halved(x, R: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr):
    """[R, C] -> [R, C / 2]: the second half of the columns above the first."""
    shift = (tl.arange(0, 2) * SHIFT)[None, :, None]
    return tl.sum(tl.reshape(x, [R, 2, C // 2]) << shift, 1)


@triton.jit
def _put(to, x, ok, C: tl.constexpr):
    tl.store(to[:, None] + tl.arange(0, C)[None, :], x.to(tl.uint8), mask=ok[:, None])


@triton.jit
def _pack(to, codes, ok, bits, R: tl.constexpr, C: tl.constexpr):
    """`codes.pack`: codes int32 [R, C] to rows of bytes at `to` [R]. Halves on halves, until a byte is full."""
    if bits == 8:
        _put(to, codes, ok, C)
    else:
        half = _halved(tl.where(bits == 3, codes & 3, codes), R, C, 4)
        if bits == 4:
            _put(to, half, ok, C // 2)
        else:
            quarter = _halved(half, R, C // 2, 2)
            if bits == 1:
                _put(to, _halved(quarter, R, C // 4, 1), ok, C // 8)
            else:
                _put(to, quarter, ok, C // 4)
        if bits == 3:
            high = _halved(_halved(codes >> 2, R, C, 4), R, C // 2, 2)
            _put(to + C // 4, _halved(high, R, C // 4, 1), ok, C // 8)


@triton.jit
def _states_kernel(
    k_ptr, v_ptr, basis_ptr, work_ptr, place_ptr, pages_ptr, page_bytes,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """States of one head of one segment."""
    work = work_ptr + tl.program_id(0) * STATES
    side, h, states, width = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    first, data, gain_at = tl.load(work + 4), tl.load(work + 5), tl.load(work + 6)
    page = _page(pages_ptr, page_bytes)
    x, stride = _segment(k_ptr, v_ptr, side, h, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, T)
    t, d = tl.arange(0, BT), tl.arange(0, D)
    place = tl.load(place_ptr + (side * H + h) * D + d) - first
    ok = (place >= 0) & (place < width)
    for m in range(states):
        sums = tl.zeros([BT, D], tl.float32)
        for begin in range(0, T, BT):
            part = tl.load(x + (begin + t)[:, None] * stride + d[None, :]).to(tl.float32)
            sums += part * tl.load(basis_ptr + m * T + begin + t)[:, None]
        state = tl.sum(sums, 0)
        if gain_at >= 0:
            largest = tl.max(tl.where(ok, tl.abs(state), 0.0), 0)
            gain = tl.math.div_rn(largest, 127.0).to(tl.float16)
            tl.store((page + gain_at + 2 * m).to(tl.pointer_type(tl.float16)), gain)
            unit = tl.maximum(gain.to(tl.float32), 5.960464477539063e-08)  # the smallest float16
            number = _rounded(tl.math.div_rn(state, unit), -127.0, 127.0)
            tl.store((page + data + m * width + place).to(tl.pointer_type(tl.int8)), number.to(tl.int8), mask=ok)
        else:
            tl.store((page + data + (m * width + place) * 2).to(tl.pointer_type(OWN)), state.to(OWN), mask=ok)


@triton.jit
def _values_kernel(
    k_ptr, v_ptr, work_ptr, order_ptr, pages_ptr, page_bytes,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Some channels of one head of one segment, as they are."""
    work = work_ptr + tl.program_id(0) * VALUES
    side, h, first, count = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    width, data = tl.load(work + 4), tl.load(work + 5)
    x, stride = _segment(k_ptr, v_ptr, side, h, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, T)
    t, j = tl.arange(0, T), tl.arange(0, BC)
    ok = (t >= 0)[:, None] & (j < count)[None, :]
    channel = tl.load(order_ptr + (side * H + h) * D + first + j, mask=j < count, other=0)
    value = tl.load(x + t[:, None] * stride + channel[None, :], mask=ok, other=0.0)
    to = (_page(pages_ptr, page_bytes) + data).to(tl.pointer_type(OWN))
    tl.store(to + t[:, None] * width + j[None, :], value, mask=ok)


@triton.jit
def _time_kernel(
    k_ptr, v_ptr, work_ptr, order_ptr, spans_ptr, pages_ptr, flag_ptr, page_bytes,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Some channels of one head of one segment, in codes along time."""
    work = work_ptr + tl.program_id(0) * TIME
    side, h, first, count = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    bits, data, scale_at, zero_at = tl.load(work + 4), tl.load(work + 5), tl.load(work + 6), tl.load(work + 7)
    page = _page(pages_ptr, page_bytes)
    x, stride = _segment(k_ptr, v_ptr, side, h, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, T)
    j, t = tl.arange(0, BC), tl.arange(0, T)
    ok = j < count
    channel = tl.load(order_ptr + (side * H + h) * D + first + j, mask=ok, other=0)
    value = tl.load(x + channel[:, None] + t[None, :] * stride, mask=ok[:, None] & (t >= 0)[None, :], other=0.0)
    codes, scale, zero, bad = _quantize(value.to(tl.float32), bits, 1, spans_ptr + tl.load(work + 8))
    _pack(page + data + j * (T // 8 * bits), codes, ok, bits, BC, T)
    tl.store((page + scale_at).to(tl.pointer_type(tl.float16)) + j, scale, mask=ok)
    tl.store((page + zero_at).to(tl.pointer_type(tl.float16)) + j, zero, mask=ok)
    tl.store(flag_ptr + j * 0, 1, mask=ok & bad)


@triton.jit
def _tokens_kernel(
    k_ptr, v_ptr, basis_ptr, work_ptr, states_ptr, order_ptr, spans_ptr, signs_ptr, pages_ptr, flag_ptr, page_bytes,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, GROUPS: tl.constexpr,
    TURN: tl.constexpr, SPLIT: tl.constexpr, SHRINK: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head of one segment, in codes across channels; TURN: of what the stored states leave,
    rotated."""
    work = work_ptr + tl.program_id(0) // (T // BT) * TOKEN
    begin = tl.program_id(0) % (T // BT) * BT
    side, h, bits, data = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    scale_at, zero_at, item = tl.load(work + 4), tl.load(work + 5), tl.load(work + 7)
    page = _page(pages_ptr, page_bytes)
    x, stride = _segment(k_ptr, v_ptr, side, h, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, T)
    order = order_ptr + (side * H + h) * D
    t, d = begin + tl.arange(0, BT), tl.arange(0, D)
    if TURN:
        smooth = states_ptr + tl.maximum(item, 0) * STATES
        states = tl.where(item >= 0, tl.load(smooth + 2), 0)
        state_at, gain_at = tl.load(smooth + 5), tl.load(smooth + 6)
        rows = tl.zeros([BT, D], tl.float32)
        for start in range(0, D, BD):
            c = start + tl.arange(0, BD)
            part = tl.load(x + t[:, None] * stride + tl.load(order + c)[None, :]).to(tl.float32)
            held = tl.zeros([BT, BD], tl.float32)
            for m in range(states):
                if gain_at >= 0:
                    gain = tl.load((page + gain_at + 2 * m).to(tl.pointer_type(tl.float16))).to(tl.float32)
                    state = tl.load((page + state_at + m * D + c).to(tl.pointer_type(tl.int8))).to(tl.float32) * gain
                else:
                    state = tl.load((page + state_at + (m * D + c) * 2).to(tl.pointer_type(OWN))).to(tl.float32)
                held += tl.load(basis_ptr + m * T + t)[:, None] * state[None, :]
            part -= held
            signs = tl.load(signs_ptr + c[:, None] * D + d[None, :])
            if SPLIT:  # three times eight bits are all of a float32, and the signs are exact
                high = part.to(tl.bfloat16)
                part -= high.to(tl.float32)
                middle = part.to(tl.bfloat16)
                low = (part - middle.to(tl.float32)).to(tl.bfloat16)
                rows = tl.dot(low, signs, rows)
                rows = tl.dot(middle, signs, rows)
                rows = tl.dot(high, signs, rows)
            else:
                rows = tl.dot(part, signs, rows, input_precision="ieee")
        rows *= SHRINK
    else:
        rows = tl.load(x + t[:, None] * stride + tl.load(order + d)[None, :]).to(tl.float32)
    rows = tl.reshape(rows, [BT * GROUPS, D // GROUPS])
    codes, scale, zero, bad = _quantize(rows, bits, (zero_at >= 0).to(tl.int32), spans_ptr + tl.load(work + 6))
    _pack(page + data + t * (D // 8 * bits), tl.reshape(codes, [BT, D]), t >= 0, bits, BT, D)
    r = begin * GROUPS + tl.arange(0, BT * GROUPS)
    tl.store((page + scale_at).to(tl.pointer_type(tl.float16)) + r, scale)
    if zero_at >= 0:
        tl.store((page + zero_at).to(tl.pointer_type(tl.float16)) + r, zero)
    tl.store(flag_ptr + r * 0, 1, mask=bad)


def encode(tables: Tables, k: torch.Tensor, v: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Pages uint8 [B, N, page bytes] of K and V [B, H, N * T, D] in the layout's dtype; basis float32 [S, T].

    Waits for the device once, if anything is in codes. Raises ValueError where K or V exceed what float16 scales hold.
    """
    layout = tables.layout
    batch, heads, tokens, dim = k.shape
    n, rest = divmod(tokens, layout.segment)
    if k.dtype != layout.dtype or v.dtype != layout.dtype:
        raise ValueError(f"these pages are made of {layout.dtype}, got K in {k.dtype} and V in {v.dtype}")
    if k.shape != v.shape or (heads, dim) != (layout.heads, layout.dim) or rest:
        want = f"[B, {layout.heads}, N * {layout.segment}, {layout.dim}]"
        raise ValueError(f"K and V are {want}, got {list(k.shape)} and {list(v.shape)}")
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    pages = torch.zeros(batch, n, layout.page_bytes, dtype=torch.uint8, device=k.device)  # fields leave holes
    if not batch * n:
        return pages
    flag = torch.zeros(1, dtype=torch.int32, device=k.device)
    basis = basis.contiguous()
    strides = (layout.page_bytes, *k.stride()[:3], *v.stride()[:3])
    shape = dict(H=heads, T=layout.segment, D=dim, num_stages=1)
    own = _OWN[k.dtype]
    if len(tables.states):  # before what they leave is coded
        _states_kernel[(len(tables.states), n, batch)](
            k, v, basis, tables.states, tables.place, pages, *strides,
            BT=min(layout.segment, 4096 // dim), OWN=own, **shape,
        )  # fmt: skip
    if len(tables.values):
        _values_kernel[(len(tables.values), n, batch)](
            k, v, tables.values, tables.order, pages, *strides, BC=WIDE, OWN=own, **shape
        )
    if len(tables.time):
        _time_kernel[(len(tables.time), n, batch)](
            k, v, tables.time, tables.order, tables.spans, pages, flag, *strides, BC=TILE, **shape
        )
    for (groups, turn), work in tables.tokens.items():
        block = min(layout.segment, max(16, 2048 // dim))  # larger ones want more registers than there are
        _tokens_kernel[(len(work) * (layout.segment // block), n, batch)](
            k, v, basis, work, tables.states, tables.order, tables.spans, tables.signs, pages, flag, *strides,
            BT=block, BD=min(dim, 64), GROUPS=groups, TURN=turn, SPLIT=_SPLIT, SHRINK=dim**-0.5, OWN=own,
            num_warps=8 if dim == 256 else 4, **shape,
        )  # fmt: skip
    if (len(tables.time) or tables.tokens) and flag.item():
        raise ValueError("K or V exceed what float16 scales can hold (65504): keep these channels at 16 bits")
    return pages
