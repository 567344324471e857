"""Make pages dense again on a GPU: the twin of `reference.expand`, in Triton.

A program has one page and one head, of K or of V, and makes tiles of tokens and channels, these in the order that they
go home in. So it asks of each channel what stores it: `Tables.codes` says it of K's codes, the tables of the attention
kernels say the rest. V's codes are of all channels at once; undoing their rotation is a product with a table of signs
that brings channels home too, exact in 16 bits, since codes and signs are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from longwave.ops.codes import BITS, signs
from longwave.ops.spectral import tables
from longwave.ops.spectral.layout import Layout
from longwave.ops.spectral.reference import check_dense
from longwave.ops.spectral.tables import fits
from longwave.ops.spectral.triton_products import INTERPRETED

__all__ = ["Tables", "expand", "fits", "tables_of"]

_OWN = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
CODE_FIELDS = tl.constexpr(4)
VALUE_FIELDS, VALUES = tl.constexpr(tables.VALUE_FIELDS), tl.constexpr(tables.VALUES)
TILE = 8192  # values made at once
WIDE = 64  # channels of a tile of V, at most


@dataclass(frozen=True, eq=False)
class Tables:
    """Where the kernels find what.

    held: the tables of the attention kernels. codes int32 [H, D, CODE_FIELDS]: of each channel of K, bits (0: it is not
        in codes), byte of its row, of its scale and of its zero. place_k, place_v int32 [H, D]: of each channel. signs
        [D, D]: the rotation times sqrt(D), in the layout's type. turned, straight: whether some heads of V have codes
        that are rotated, and that are not.
    """

    layout: Layout
    held: tables.Tables
    codes: torch.Tensor
    place_k: torch.Tensor
    place_v: torch.Tensor
    signs: torch.Tensor
    turned: bool
    straight: bool


def tables_of(layout: Layout) -> Tables:
    """The tables of a layout that `fits`, on its device."""
    held = tables.tables_of(layout)
    codes = torch.zeros(layout.heads, layout.dim, CODE_FIELDS.value, dtype=torch.int32)
    for group in layout.k:
        for i, head in enumerate(group.heads.tolist()):
            order, first = group.order[i].tolist(), 0
            for (bits, n), rows, scales in zip(group.code.runs, group.values, group.scales, strict=True):
                if scales is not None:
                    size, at = layout.segment * bits // 8, scales.at(i)
                    for j, channel in enumerate(order[first : first + n]):
                        codes[head, channel] = torch.tensor((bits, rows.at(i) + j * size, at + 2 * j, at + 2 * (n + j)))
                first += n
    device = layout.k[0].heads.device
    place_k, place_v = (order.long().argsort(-1).int() for order in (held.order_k, held.order_v))
    turn = signs(layout.dim).to(device, torch.float32 if INTERPRETED.value else layout.dtype)
    ways = {code.residual for code in (group.code for group in layout.v) for bits, _ in code.runs if bits in BITS}
    return Tables(layout, held, codes.to(device), place_k, place_v, turn, True in ways, False in ways)


@triton.jit
def _codes(rows, eighth, i, bits, three, held, COLUMNS: tl.constexpr, LOG: tl.constexpr):
    """Codes int32 of rows of COLUMNS codes, packed, that start at pointers `rows`; all broadcast.

    Column `eighth` * COLUMNS / 8 + i, for where in its byte a code lies depends on the former alone. bits: of a code,
    three: whether some have 3. LOG: of COLUMNS / 8, to the base 2.
    """
    low = tl.where(bits == 3, 2, bits)
    log = (low > 1).to(tl.int32) + (low > 3).to(tl.int32) + (low > 7).to(tl.int32)  # of the lower plane's bits
    at = ((eighth & ((1 << log) - 1)) << LOG) + i
    code = tl.load(rows + at, mask=held, other=0).to(tl.int32)
    code = (code >> ((eighth >> log) << log)) & ((1 << low) - 1)
    if three:
        high = tl.load(rows + COLUMNS // 4 + i, mask=held & (bits == 3), other=0).to(tl.int32)
        code += ((high >> eighth) & 1) << 2
    return code


@triton.jit
def _smooth(x, page, row, place, t, basis, T: tl.constexpr, EIGHT: tl.constexpr, OWN: tl.constexpr):
    """x plus what a head's states say of the channels at `place` and tokens t, which broadcast."""
    states, width, first = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    data, gain_at = tl.multiple_of(tl.load(row + 3), 2), tl.multiple_of(tl.load(row + 4), 2)
    ok = (place >= first) & (place < first + width)
    for m in range(states):
        at = m * width + place - first
        if EIGHT:
            gain = tl.load((page + gain_at).to(tl.pointer_type(tl.float16)) + m).to(tl.float32)
            number = tl.load((page + data).to(tl.pointer_type(tl.int8)) + at, mask=ok, other=0).to(tl.float32) * gain
        else:
            number = tl.load((page + data).to(tl.pointer_type(OWN)) + at, mask=ok, other=0.0).to(tl.float32)
        x += tl.load(basis + m * T + t) * number
    return x


@triton.jit
def _plain(page, data, n, place, t, OWN: tl.constexpr):
    """16-bit values of a run of n channels, of the channels at `place` of it and tokens t: float32, 0 beyond it."""
    first = (page + tl.multiple_of(data, 16)).to(tl.pointer_type(OWN))
    ok = (place >= 0) & (place < n) & (t >= 0)
    return tl.load(first + t * n + place, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _keys_kernel(
    pages_ptr, basis_ptr, keys_ptr, codes_ptr, place_ptr, out_ptr,
    page_bytes, row_bytes, key_fields, stride_b, stride_h, stride_t,
    D: tl.constexpr, T: tl.constexpr, BC: tl.constexpr, LOG: tl.constexpr, WIDE: tl.constexpr, CODES: tl.constexpr,
    MOST: tl.constexpr, EIGHT: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """K of one head and page. Tiles are channels by tokens: a channel's codes lie side by side."""
    n, h, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    page = pages_ptr + b * row_bytes + n * page_bytes
    row = keys_ptr + h * key_fields
    out = out_ptr + b * stride_b + h.to(tl.int64) * stride_h + n * T * stride_t
    t, eighth, i = tl.arange(0, T), tl.arange(0, 8)[None, :, None], tl.arange(0, T // 8)[None, None, :]
    for first in range(0, D, BC):
        d = first + tl.arange(0, BC)
        place = tl.load(place_ptr + h * D + d)
        x = tl.zeros([BC, T], tl.float32)
        if CODES:
            about = codes_ptr + (h * D + d) * CODE_FIELDS
            bits, at = tl.load(about), tl.multiple_of(tl.load(about + 1), min(16, T // 8))
            coded, three = bits > 0, tl.max((bits == 3).to(tl.int32), 0) > 0
            scale = tl.load((page + tl.load(about + 2)).to(tl.pointer_type(tl.float16)), mask=coded, other=0.0)
            zero = tl.load((page + tl.load(about + 3)).to(tl.pointer_type(tl.float16)), mask=coded, other=0.0)
            if tl.max(bits, 0) > 0:
                rows, ours = page + at[:, None, None], coded[:, None, None]
                code = _codes(rows, eighth, i, bits[:, None, None], three, ours, T, LOG)
                code = tl.reshape(code, BC, T).to(tl.float32)
                x += code * scale.to(tl.float32)[:, None] + zero.to(tl.float32)[:, None]
        if MOST > 0:
            x = _smooth(x, page, row, place[:, None], t[None, :], basis_ptr, T, EIGHT, OWN)
        if WIDE > 0:
            inside = place - tl.load(row + 7)
            x += tl.trans(_plain(page, tl.load(row + 6), tl.load(row + 5), inside[None, :], t[:, None], OWN))
        tl.store(out + t[:, None] * stride_t + d[None, :], tl.trans(x.to(out_ptr.dtype.element_ty)))


@triton.jit
def _token_scales(page, row, t, g, GROUPS: tl.constexpr):
    """Scale and zero of tokens t of V, of their group g of channels."""
    bits, zero_at = tl.load(row + 5), tl.load(row + 9)
    scales = (page + tl.multiple_of(tl.load(row + 8), 16)).to(tl.pointer_type(tl.float16))
    zeros = (page + tl.maximum(zero_at, 0)).to(tl.pointer_type(tl.float16))
    scale = tl.load(scales + t * GROUPS + g).to(tl.float32)
    zero = tl.load(zeros + t * GROUPS + g, mask=t * 0 + zero_at >= 0, other=0.0).to(tl.float32)
    return scale, tl.where(zero_at >= 0, zero, scale * (((1 << bits) - 1) * -0.5))


@triton.jit
def _turned(
    x, page, row, rows, turn, sums, place, t,
    D: tl.constexpr, LOG: tl.constexpr, GROUPS: tl.constexpr, ROOT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """x [tokens, channels] plus what V's codes say, rotated back. sums: the first row of `turn` of each group."""
    SHARED: tl.constexpr = D // GROUPS
    c, bits = tl.arange(0, D), tl.load(row + 5)
    eighth, i = tl.arange(0, 8)[None, :, None], tl.arange(0, D // 8)[None, None, :]
    every = (t >= 0)[:, None, None]
    code = _codes(rows[:, None, None], eighth, i, tl.zeros([1, 1, 1], tl.int32) + bits, bits == 3, every, D, LOG)
    code = tl.reshape(code, t.shape[0], D)
    for g in tl.static_range(GROUPS):
        scale, zero = _token_scales(page, row, t, g, GROUPS)
        own = code if GROUPS == 1 else tl.where((c // SHARED == g)[None, :], code, 0)
        # what a zero becomes: the sum of its group's signs
        ones = tl.where(place % SHARED == 0, tl.load(sums + g * SHARED).to(tl.float32) * SHARED, 0.0)
        x += tl.dot(own.to(tl.float32).to(DOT), turn) * (scale * ROOT)[:, None]
        x += (zero * ROOT)[:, None] * ones[None, :]
    return x


@triton.jit
def _straight(x, page, row, rows, place, t, D: tl.constexpr, LOG: tl.constexpr, GROUPS: tl.constexpr):
    """The same of codes that are not rotated."""
    bits = tl.load(row + 5)
    eighth, i = (place >> LOG)[None, :], (place & (D // 8 - 1))[None, :]
    every = (t >= 0)[:, None]
    code = _codes(rows[:, None], eighth, i, tl.zeros([1, 1], tl.int32) + bits, bits == 3, every, D, LOG)
    for g in tl.static_range(GROUPS):
        scale, zero = _token_scales(page, row, t, g, GROUPS)
        x += tl.where((place // (D // GROUPS) == g)[None, :], code * scale[:, None] + zero[:, None], 0.0)
    return x


@triton.jit
def _values_kernel(
    pages_ptr, basis_ptr, values_ptr, place_ptr, signs_ptr, out_ptr,
    page_bytes, row_bytes, stride_b, stride_h, stride_t,
    D: tl.constexpr, T: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, LOG: tl.constexpr, WIDE: tl.constexpr,
    TURNED: tl.constexpr, STRAIGHT: tl.constexpr, GROUPS: tl.constexpr, MOST: tl.constexpr, EIGHT: tl.constexpr,
    ROOT: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """V of one head and page. Tiles are tokens by channels: a token's codes lie side by side."""
    n, h, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    page = pages_ptr + b * row_bytes + n * page_bytes
    row = values_ptr + h * VALUE_FIELDS
    out = out_ptr + b * stride_b + h.to(tl.int64) * stride_h + n * T * stride_t
    kind, data = tl.load(row + 5), tl.load(row + 7)
    coded, turned = (kind > 0) & (kind < VALUES), tl.load(row + 10) > 0
    c = tl.arange(0, D)
    for first in range(0, D, BC):
        d = first + tl.arange(0, BC)
        place = tl.load(place_ptr + h * D + d)
        sums = signs_ptr + place * D
        if TURNED:  # the table is its own transposed
            turn = tl.trans(tl.load(sums[:, None] + c[None, :], mask=(place * 0 + kind > 0)[:, None], other=0.0))
        for start in range(0, T, BT):
            t = start + tl.arange(0, BT)
            rows = page + tl.multiple_of(data, 16) + t * kind * (D // 8)
            x = tl.zeros([BT, BC], tl.float32)
            if TURNED:  # noqa: SIM102
                if coded & turned:
                    x = _turned(x, page, row, rows, turn, sums, place, t, D, LOG, GROUPS, ROOT, DOT)
            if STRAIGHT:  # noqa: SIM102
                if coded & (turned == 0):
                    x = _straight(x, page, row, rows, place, t, D, LOG, GROUPS)
            if MOST > 0:
                x = _smooth(x, page, row, place[None, :], t[:, None], basis_ptr, T, EIGHT, OWN)
            if WIDE > 0:
                channels = tl.where(kind == VALUES, tl.load(row + 6), 0)
                x += _plain(page, data, channels, place[None, :], t[:, None], OWN)
            tl.store(out + t[:, None] * stride_t + d[None, :], x.to(out_ptr.dtype.element_ty))


def expand(tables: Tables, pages: torch.Tensor, table: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor) -> None:
    """Write what pages uint8 [B, N, page bytes] stand for to out_k, out_v [B, H, N * T, D], of 16 bits or float32.

    The channels of a token must be contiguous; tokens, heads and rows may be parts of larger tensors. table float32
    [S, T].
    """
    layout, held, traits = tables.layout, tables.held, tables.held.traits
    (batch, n, size), dim, segment = pages.shape, layout.dim, layout.segment
    if pages.dtype != torch.uint8 or size != layout.page_bytes:
        raise ValueError(f"pages are uint8 of {layout.page_bytes} bytes, got {pages.dtype} of {size}")
    for out in (out_k, out_v):
        check_dense(out, (batch, layout.heads, n * segment, dim))
    if not batch * n:
        return
    if pages.stride()[1:] != (size, 1):
        pages = pages.contiguous()
    table, grid, kind = table.contiguous(), (n, layout.heads, batch), _OWN[layout.dtype]
    shape = dict(D=dim, T=segment, OWN=kind, num_warps=8)

    def traited(side: str, *names: str) -> dict[str, int | bool]:
        return {name: traits[f"{side}_{name}"] for name in names}

    _keys_kernel[grid](
        pages, table, held.keys, tables.codes, tables.place_k, out_k,
        size, pages.stride(0), held.keys.shape[1], *out_k.stride()[:3],
        BC=min(dim, TILE // segment), LOG=(segment // 8).bit_length() - 1, **shape,
        **traited("K", "WIDE", "CODES", "MOST", "EIGHT"),
    )  # fmt: skip
    _values_kernel[grid](
        pages, table, held.values, tables.place_v, tables.signs, out_v, size, pages.stride(0), *out_v.stride()[:3],
        BT=min(segment, TILE // dim), BC=min(dim, WIDE), LOG=(dim // 8).bit_length() - 1, TURNED=tables.turned,
        STRAIGHT=tables.straight, GROUPS=traits["GROUPS"], ROOT=dim**-0.5,
        DOT=tl.float32 if INTERPRETED.value else kind, **shape, **traited("V", "WIDE", "MOST", "EIGHT"),
    )  # fmt: skip
