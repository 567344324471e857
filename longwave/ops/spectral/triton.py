"""Attend over sinks, pages, open segment and window in one pass on a GPU: the twin of reference.py, in Triton.

A program takes one row of the batch, one KV head and a few pages, or a stretch of the dense tokens, as flash-decoding
does: scores of a page, online softmax, its share of the output. Nothing is rebuilt: scales of K go into q, scales of V
into p. States meet q before and p after, in kernels of their own that take many pages at once; the last one adds the
parts up, undoes V's rotation once and brings channels home. docs/kernels.md has the figures.

What a head stores is read from a table, so one compiled kernel serves all layers of a model whatever their plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from longwave.ops.codes import BITS, PLANES, rotation
from longwave.store.layout import Field, Group, Layout

ROWS = 64  # query rows (group x queries) up to which this is used: beyond, products dominate and the reference does
VALUES = 16  # kind of a run of 16-bit values; codes are their number of bits
WIDTHS = (8, 4, 2, 1)  # bits of a plane
# K's table of a head: see `plan`; CHUNK channels of one plane a chunk, of PIECE numbers each
CHUNK, K_TABLE, PIECE = tl.constexpr(16), tl.constexpr(12), tl.constexpr(7)
VALUE_FIELDS = tl.constexpr(11)
# the interpreter multiplies the bits of bfloat16, not the numbers
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_OWN = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_DOT = {kind: tl.float32 if INTERPRETED.value else own for kind, own in _OWN.items()}
STRETCH, DENSE_STEP = 64, 32  # dense tokens of a program, and of a step
STAGES = 1
TARGET = 16  # programs a multiprocessor that splitting aims at


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the kernel finds what.

    keys int32 [H, numbers], values int32 [H, 11], order_k and order_v int32 [H, D], turn float32 [D, D].
    traits: compile-time facts of the layer. K_WIDE, V_WIDE: the most channels of a 16-bit run, rounded up to a power of
        two; ALIGN: a divisor of all 16-bit runs' channels; GROUPS: scales of a token of V; whether there are
        codes of K, codes of V; K_MOST, V_MOST: the most states; K_EIGHT, V_EIGHT: whether they are int8.
    """

    layout: Layout
    keys: torch.Tensor
    values: torch.Tensor
    order_k: torch.Tensor
    order_v: torch.Tensor
    turn: torch.Tensor
    traits: dict[str, int | bool]


def _power(n: int) -> bool:
    return n >= 16 and n & (n - 1) == 0


def fits(layout: Layout) -> str | None:
    """Why the kernel cannot read this layout, or None if it can."""
    if layout.dtype not in (torch.float16, torch.bfloat16):
        return f"the model computes in {layout.dtype}, not in 16 bits"
    if not (_power(layout.dim) and 32 <= layout.dim <= 256 and _power(layout.segment) and 32 <= layout.segment <= 256):
        return "head_dim (32 to 256) and segment (32 to 256) must be powers of two"
    for group in layout.k:
        code = group.code
        if code.residual or any(b in BITS and code.axis != "time" for b, _ in code.runs):
            return "K's codes must lie along time"
        if sum(b not in BITS for b, _ in code.runs) > 1:
            return "K has more than one run of 16-bit channels"
    scales = set()
    for group in layout.v:
        code = group.code
        if len(code.runs) > 1:
            return "V has more than one run of channels"
        for b, n in code.runs:
            if b in BITS and (code.axis != "token" or n != layout.dim):
                return "V's codes must lie across all channels of a token"
            if b in BITS:
                scales.add(n // (code.group or n))
    if len(scales) > 1:
        return "heads share V's scales differently"
    for side in (layout.k, layout.v):
        if len({g.gains is None for g in side if g.states is not None}) > 1:
            return "some heads have states of 8 bits, some of 16"
    return None


def plan(layout: Layout) -> Plan:
    """The tables of a layout that `fits`, on its device.

    A row of `keys`: states, channels that have them, the first of these, byte of the states and of the gains; channels,
    byte and first of the run of 16-bit values; how many chunks of 8, 4, 2 and 1 bits; the chunks. A chunk: channels,
    byte of the codes, bytes a channel, byte of the scales, channels of the run, first channel, what a code counts.
    A row of `values`: the same five; kind of its one run, channels, bytes of the values, scales and zeros (-1: none),
    whether it is turned.
    """
    found = [[_keys(layout, g, i) for i in range(len(g.heads))] for g in layout.k]
    most = max(len(row) for group in found for row in group)
    keys = torch.zeros(layout.heads, most, dtype=torch.int32)
    values = torch.zeros(layout.heads, VALUE_FIELDS.value, dtype=torch.int32)
    order_k, order_v = torch.zeros(2, layout.heads, layout.dim, dtype=torch.int32)
    for group, rows in zip(layout.k, found, strict=True):
        for i, head in enumerate(group.heads.tolist()):
            order_k[head] = group.order[i].cpu().int()
            keys[head, : len(rows[i])] = torch.tensor(rows[i])
    groups = 1
    for group in layout.v:
        for i, head in enumerate(group.heads.tolist()):
            order_v[head] = group.order[i].cpu().int()
            row = _smooth(group, i, layout.dim)
            for (bits, n), held, scales in zip(group.code.runs, group.values, group.scales, strict=True):
                zeros = -1
                if scales is not None:
                    groups = scales.shape[-1]
                    zeros = _at(group, scales, i) + 2 * layout.segment * groups if group.code.zero else -1
                kind = bits if bits in BITS else VALUES
                row += [kind, n, _at(group, held, i), _at(group, scales, i), zeros, int(group.code.residual)]
            values[head, : len(row)] = torch.tensor(row)
    kept = [(side, bits, n) for side in "kv" for g in getattr(layout, side) for bits, n in g.code.runs]
    whole = [(side, n) for side, bits, n in kept if bits not in BITS]

    def wide(which: str) -> int:
        n = max([n for side, n in whole if side == which], default=0)
        return max(16, triton.next_power_of_2(n)) if n else 0

    traits = dict(
        K_WIDE=wide("k"),
        V_WIDE=wide("v"),
        ALIGN=math.gcd(8, *(n for _, n in whole)),
        GROUPS=groups,
        K_CODES=any(side == "k" and bits in BITS for side, bits, _ in kept),
        V_CODES=any(side == "v" and bits in BITS for side, bits, _ in kept),
        K_MOST=max([g.code.states for g in layout.k if g.states is not None], default=0),
        V_MOST=max([g.code.states for g in layout.v if g.states is not None], default=0),
        K_EIGHT=any(g.gains is not None for g in layout.k),
        V_EIGHT=any(g.gains is not None for g in layout.v),
    )
    device = layout.k[0].heads.device
    turn = rotation(layout.dim).float()
    keys, values, order_k, order_v, turn = (x.to(device) for x in (keys, values, order_k, order_v, turn))
    return Plan(layout, keys, values, order_k, order_v, turn, traits)


def _at(group: Group, field: Field | None, i: int) -> int:
    """Byte of a page where the part of a group's head i starts."""
    return 0 if field is None else field.offset + i * field.nbytes // len(group.heads)


def _keys(layout: Layout, group: Group, i: int) -> list[int]:
    """The table's row for a group's head i of K."""
    chunks: dict[int, list[int]] = {width: [] for width in WIDTHS}
    values, first, step = [0, 0, 0], 0, CHUNK.value
    for (bits, n), held, scales in zip(group.code.runs, group.values, group.scales, strict=True):
        data = _at(group, held, i)
        if bits not in BITS:
            values = [n, data, first]
        else:
            stride, plane, below = layout.segment * bits // 8, data, 0
            for width in PLANES[bits]:
                for j in range(0, n, step):
                    scale_at = _at(group, scales, i) + 2 * j
                    piece = [min(step, n - j), plane + j * stride, stride, scale_at, n, first + j, 1 << below]
                    chunks[width] += piece
                plane += layout.segment * width // 8
                below += width
        first += n
    counts = [len(chunks[width]) // PIECE.value for width in WIDTHS]
    return [*_smooth(group, i, layout.dim), *values, *counts, *(x for width in WIDTHS for x in chunks[width])]


def _smooth(group: Group, i: int, dim: int) -> list[int]:
    """Of a group's head i: states, channels that have them, the first of these, byte of the states and of the gains."""
    if group.states is None:
        return [0, 0, 0, 0, 0]
    code = group.code
    first = 0 if code.residual else code.kept
    return [code.states, code.smooth(dim), first, _at(group, group.states, i), _at(group, group.gains, i)]


@triton.jit
def _stack(a, b):
    """Rows of a, then rows of b. Costs nothing: accumulators keep their place in the registers."""
    return tl.reshape(tl.permute(tl.join(a, b), 2, 0, 1), 2 * a.shape[0], a.shape[1])


@triton.jit
def _halves(x):
    """The inverse: the first rows and the others."""
    return tl.split(tl.permute(tl.reshape(x, 2, x.shape[0] // 2, x.shape[1]), 1, 2, 0))


@triton.jit
def _pick(w, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """float16 of (w >> SHIFT) & MASK in each word, left where it lies among the lowest 8 bits: a subnormal, exact.

    Two words an instruction, which the compiler does not find by itself.
    """
    if INTERPRETED:
        x = (w >> SHIFT) & MASK
    elif SHIFT == 0:
        mask = tl.full(w.shape, MASK, tl.int16)
        x = tl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [w, mask], tl.int16, is_pure=True, pack=2)
    else:
        mask = tl.full(w.shape, MASK, tl.int16)
        asm: tl.constexpr = "{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, $2; }"
        x = tl.inline_asm_elementwise(asm, "=r,r,r", [w, mask], tl.int16, is_pure=True, pack=2)
    return x.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _fields(
    w, x, SHIFT: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr
):
    """Products of COUNT codes of each word's byte with x, one below the other."""
    if COUNT == 1:
        return tl.dot(_pick(w, SHIFT, ((1 << BITS) - 1) << (FIRST * STEP)), x)
    else:
        low = _fields(w, x, SHIFT, BITS, STEP, FIRST, COUNT // 2)
        return _stack(low, _fields(w, x, SHIFT, BITS, STEP, FIRST + COUNT // 2, COUNT // 2))


@triton.jit
def _product(base, at, ok, x, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Packed rows of COLUMNS codes, transposed, times x float16 [rows, BR]: [COLUMNS, BR], each row still to be
    multiplied by `_lift`, since a code is taken where it lies.

    base points to int16 words, `at` [rows] says where a row starts. Packing (ops/codes.py) puts code c into byte
    c mod (COLUMNS * BITS / 8), above the codes before it; a word is two bytes. Output row i is column 2 i of the row
    while i < COLUMNS / 2, and column 2 i + 1 - COLUMNS from there on: the same for every width.
    """
    WORDS: tl.constexpr = COLUMNS * BITS // 16
    AGAIN: tl.constexpr = 16 // WORDS if WORDS < 16 else 1  # a product has 16 rows at least
    i = tl.arange(0, WORDS * AGAIN)
    w = tl.load(base + (i % WORDS)[:, None] + at[None, :], mask=(i >= 0)[:, None] & ok[None, :], other=0)
    if AGAIN > 1:
        w = w >> (i // WORDS * BITS).to(tl.int16)[:, None]
    COUNT: tl.constexpr = COLUMNS // (2 * WORDS * AGAIN)
    low = _fields(w, x, 0, BITS, BITS * AGAIN, 0, COUNT)
    return _stack(low, _fields(w, x, 8, BITS, BITS * AGAIN, 0, COUNT))


@triton.jit
def _lift(BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """float32 [COLUMNS]: 2^24 over the weight of the bits where a code lies."""
    WORDS: tl.constexpr = COLUMNS * BITS // 16
    AGAIN: tl.constexpr = 16 // WORDS if WORDS < 16 else 1
    i = tl.arange(0, COLUMNS) % (COLUMNS // 2)
    return ((151 - i // (WORDS * AGAIN) * (BITS * AGAIN)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _score(
    s, level, piece, count, page, q_row, live, order, BITS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Scores s [T, BR] plus those of `count` chunks of K's codes; level [CHUNK, BR] plus their zeros' part."""
    i = tl.arange(0, CHUNK)
    for _ in range(count):
        n, data, stride = tl.load(piece), tl.multiple_of(tl.load(piece + 1), T // 8), tl.load(piece + 2)
        scale_at, span, first, weight = (
            tl.load(piece + 3), tl.load(piece + 4), tl.load(piece + 5), tl.load(piece + 6),
        )  # fmt: skip
        ok = i < n
        at = i * tl.multiple_of(stride // 2, T // 16)
        which = tl.load(order + first + i, mask=ok, other=0)
        scales = (page + scale_at).to(tl.pointer_type(tl.float16))
        step = tl.load(scales + i, mask=ok, other=0.0).to(tl.float32) * weight
        zero = tl.load(scales + span + i, mask=(i < n) & (i * 0 + weight == 1), other=0.0).to(tl.float32)
        q = tl.load(q_row[None, :] + which[:, None], mask=ok[:, None] & live[None, :], other=0.0).to(tl.float32)
        level += q * zero[:, None]
        words = (page + data).to(tl.pointer_type(tl.int16))
        product = _product(words, at, ok, (q * step[:, None]).to(tl.float16), BITS, T)
        s += product * _lift(BITS, T)[:, None]
        piece += PIECE
    return s, level, piece


@triton.jit
def _mixed(data, stride, even, odd, BITS: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """V's codes [T, D] of one plane, transposed, times p: [D, BR], rows as `_product` orders them. even, odd
    [T / 2, BR]: p of the tokens of these numbers. stride: words a token."""
    i = tl.arange(0, T // 2)
    out = _product(data, 2 * i * stride, i >= 0, even, BITS, D)
    out += _product(data, (2 * i + 1) * stride, i >= 0, odd, BITS, D)
    return out * _lift(BITS, D)[:, None]


@triton.jit
def _mix(data, stride, bits, mass, T: tl.constexpr, D: tl.constexpr):
    """The same for any number of bits; mass float16 [T, BR] in the order of `_product`."""
    even, odd = _halves(mass)
    if bits == 8:
        out = _mixed(data, stride, even, odd, 8, T, D)
    elif bits == 4:
        out = _mixed(data, stride, even, odd, 4, T, D)
    else:
        out = tl.zeros([D, mass.shape[1]], tl.float32)
        above = 1.0
        if bits >= 2:
            out = _mixed(data, stride, even, odd, 2, T, D)
            data += D // 8
            above = 4.0
        if bits != 2:
            out += _mixed(data, stride, even, odd, 1, T, D) * above
    return out


@triton.jit
def _spectral_kernel(
    q_ptr, pages_ptr, counts_ptr, basis_ptr, keys_ptr, values_ptr, order_k_ptr,
    dense_k_ptr, dense_v_ptr, seen_ptr, near_ptr, part_ptr, stat_ptr,
    queries, scale, page_bytes, row_bytes, dense_tokens, per_split, page_splits, splits, key_fields,
    stride_qb, stride_qh, stride_qq, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    STRETCH: tl.constexpr, K_WIDE: tl.constexpr, V_WIDE: tl.constexpr, ALIGN: tl.constexpr, GROUPS: tl.constexpr,
    K_CODES: tl.constexpr, V_CODES: tl.constexpr, K_MOST: tl.constexpr, V_MOST: tl.constexpr, K_EIGHT: tl.constexpr,
    V_EIGHT: tl.constexpr, SETS: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One split of one row and KV head. part float32 [B, H, splits, BR, SETS], stat float32 [B, H, splits, 2, BR]:
    unnormalised outputs (codes D, values V_WIDE, states D; of dense tokens D), their maximum and sum.
    near float32 [B, H, page splits, pages a split, K_MOST, BR]: q times K's states, written and read here alone."""
    pid, split = tl.program_id(0), tl.program_id(1)
    b, h = pid // H, pid % H
    r, d = tl.arange(0, BR), tl.arange(0, D)
    live = r < G * queries
    q_row = q_ptr + b.to(tl.int64) * stride_qb + (h * G + r // queries) * stride_qh + r % queries * stride_qq
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    part = part_ptr + ((pid.to(tl.int64) * splits + split) * BR + r[None, :]) * SETS
    if split >= page_splits:
        q = tl.load(q_row[None, :] + d[:, None], mask=live[None, :] & (d >= 0)[:, None], other=0.0).to(DOT)
        seen = tl.load(seen_ptr + b * queries + r % queries, mask=live, other=0)
        out = tl.zeros([D, BR], tl.float32)
        first = (split - page_splits) * STRETCH
        k_row = dense_k_ptr + b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
        v_row = dense_v_ptr + b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
        end = tl.minimum(tl.minimum(first + STRETCH, dense_tokens), tl.max(seen, 0))
        for start in range(first, end, BD):
            i = start + tl.arange(0, BD)
            held = (i < end)[:, None] & (d >= 0)[None, :]
            k = tl.load(k_row + i[:, None] * stride_kt + d[None, :], mask=held, other=0.0).to(DOT)
            v = tl.load(v_row + i[:, None] * stride_vt + d[None, :], mask=held, other=0.0).to(DOT)
            s = tl.dot(k, q) * scale
            s = tl.where(i[:, None] < seen[None, :], s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 0))
            safe = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - safe[None, :])
            old = tl.exp2(top - safe)
            out = tl.dot(tl.trans(v), p.to(OWN).to(DOT), out * old[None, :])
            total = total * old + tl.sum(p, 0)
            top = new
        tl.store(part + d[:, None], out, mask=live[None, :] & (d >= 0)[:, None])
    else:
        # token i of a page where `_product` puts it
        token = tl.arange(0, T) % (T // 2) * 2 + tl.arange(0, T) // (T // 2)
        keys, values, order = keys_ptr + h * key_fields, values_ptr + h * VALUE_FIELDS, order_k_ptr + h * D
        base = pages_ptr + b.to(tl.int64) * row_bytes
        first_page = split * per_split
        end_page = tl.minimum(first_page + per_split, tl.load(counts_ptr + b))
        near = near_ptr + ((pid.to(tl.int64) * page_splits + split) * per_split) * (K_MOST * BR) + r
        k_states, v_states = tl.load(keys), tl.load(values)
        if K_MOST > 0:
            if k_states > 0:
                width, smooth = tl.load(keys + 1), tl.load(keys + 2)
                data, gain_at = tl.load(keys + 3), tl.load(keys + 4)
                ok = d < width
                which = tl.load(order + smooth + d, mask=ok, other=0)
                q = tl.load(q_row[None, :] + which[:, None], mask=live[None, :] & ok[:, None], other=0.0).to(DOT)
                for start in range(0, (end_page - first_page) * K_MOST, 16):
                    i = start + tl.arange(0, 16)
                    page_at = base + (first_page + i // K_MOST).to(tl.int64) * page_bytes
                    m = i % K_MOST
                    held = (first_page + i // K_MOST < end_page) & (m < k_states)
                    number, gain = _states(page_at, data, gain_at, m, width, held, D, K_EIGHT, OWN)
                    a = tl.dot(number.to(DOT), q) * gain[:, None]
                    tl.store(near[None, :] + i[:, None] * BR, a, mask=held[:, None] & (r >= 0)[None, :])
                tl.debug_barrier()
        if K_WIDE > 0:
            k_wide, k_data = tl.multiple_of(tl.load(keys + 5), ALIGN), tl.multiple_of(tl.load(keys + 6), 16)
            cell = tl.arange(0, K_WIDE)
            cells = tl.load(order + tl.load(keys + 7) + cell, mask=cell < k_wide, other=0)
            ours = (cell < k_wide)[:, None] & live[None, :]
            q_wide = tl.load(q_row[None, :] + cells[:, None], mask=ours, other=0.0).to(DOT)
        kind, channels, v_data = tl.load(values + 5), tl.load(values + 6), tl.load(values + 7)
        v_scales, v_zeros = tl.load(values + 8), tl.load(values + 9)
        if V_CODES:
            code_out = tl.zeros([D, BR], tl.float32)
        if V_WIDE > 0:
            v_wide = tl.multiple_of(tl.where(kind == 16, channels, 0), ALIGN)
            wide_out = tl.zeros([V_WIDE, BR], tl.float32)
        if V_MOST > 0:
            smooth_out = tl.zeros([D, BR], tl.float32)
            v_width = tl.load(values + 1)
            state_at, state_gain = tl.load(values + 3), tl.load(values + 4)
        page = base + first_page.to(tl.int64) * page_bytes
        for _ in range(first_page, end_page):
            s = tl.zeros([T, BR], tl.float32)
            if V_WIDE > 0:  # on their way while the scores are made
                own = (page + tl.multiple_of(v_data, 16)).to(tl.pointer_type(OWN))
                c = tl.arange(0, V_WIDE)
                v_held = (c < v_wide)[None, :] & (token >= 0)[:, None]
                v_own = tl.load(own + token[:, None] * v_wide + c[None, :], mask=v_held, other=0.0)
            if K_WIDE > 0:
                own = (page + k_data).to(tl.pointer_type(OWN))
                k_held = (cell < k_wide)[None, :] & (token >= 0)[:, None]
                k_own = tl.load(own + token[:, None] * k_wide + cell[None, :], mask=k_held, other=0.0)
                s = tl.dot(k_own.to(DOT), q_wide, s)
            if K_MOST > 0:
                for m in range(k_states):
                    a = tl.load(near + m * BR)
                    s += tl.load(basis_ptr + m * T + token)[:, None] * a[None, :]
            if K_CODES:
                level = tl.zeros([CHUNK, BR], tl.float32)
                piece = keys + K_TABLE
                s, level, piece = _score(s, level, piece, tl.load(keys + 8), page, q_row, live, order, 8, T)
                s, level, piece = _score(s, level, piece, tl.load(keys + 9), page, q_row, live, order, 4, T)
                s, level, piece = _score(s, level, piece, tl.load(keys + 10), page, q_row, live, order, 2, T)
                s, level, piece = _score(s, level, piece, tl.load(keys + 11), page, q_row, live, order, 1, T)
                s += tl.sum(level, 0)[None, :]
            s = s * scale
            new = tl.maximum(top, tl.max(s, 0))
            p = tl.exp2(s - new[None, :])
            old = tl.exp2(top - new)
            total = total * old + tl.sum(p, 0)
            top = new
            if V_MOST > 0:
                smooth_out = smooth_out * old[None, :]
                for m in range(v_states):
                    far = tl.sum(p * tl.load(basis_ptr + m * T + token)[:, None], 0)
                    number, gain = _state(page, state_at, state_gain, m, v_width, D, V_EIGHT, OWN)
                    smooth_out += number[:, None] * (far * gain)[None, :]
            if V_WIDE > 0:
                wide_out = tl.dot(tl.trans(v_own.to(DOT)), p.to(OWN).to(DOT), wide_out * old[None, :])
            if V_CODES:
                code_out = code_out * old[None, :]
                if kind > 0 and kind < 16:
                    scales = (page + v_scales).to(tl.pointer_type(tl.float16))
                    zeros = (page + tl.maximum(v_zeros, 0)).to(tl.pointer_type(tl.float16))
                    words = (page + tl.multiple_of(v_data, D // 8)).to(tl.pointer_type(tl.int16))
                    stride = tl.multiple_of(D // 16 * kind, D // 16)
                    middle = ((1 << kind) - 1) * -0.5
                    for g in tl.static_range(GROUPS):
                        step = tl.load(scales + token * GROUPS + g).to(tl.float32)
                        zero = tl.load(zeros + token * GROUPS + g, mask=token * 0 + v_zeros >= 0, other=0.0)
                        zero = tl.where(v_zeros >= 0, zero.to(tl.float32), step * middle)
                        mass = (p * step[:, None]).to(tl.float16)
                        more = _mix(words, stride, kind, mass, T, D) + tl.sum(p * zero[:, None], 0)[None, :]
                        if GROUPS == 1:
                            code_out += more
                        else:  # rows whose channel belongs to this scale
                            sharing = d % (D // 2) * 2 // (D // GROUPS) == g
                            code_out += tl.where(sharing[:, None], more, 0.0)
            page += page_bytes
            near += K_MOST * BR
        if V_CODES:
            tl.store(part + d[:, None], code_out, mask=live[None, :] & (d >= 0)[:, None])
        if V_WIDE > 0:
            c = tl.arange(0, V_WIDE)
            tl.store(part + V_CODES * D + c[:, None], wide_out, mask=live[None, :] & (c >= 0)[:, None])
        if V_MOST > 0:
            part += V_CODES * D + V_WIDE
            tl.store(part + d[:, None], smooth_out, mask=live[None, :] & (d < v_width)[:, None])
    stat = stat_ptr + (pid.to(tl.int64) * splits + split) * 2 * BR + r
    tl.store(stat, top)
    tl.store(stat + BR, total)


@triton.jit
def _states(at, data, gain_at, m, width, held, D: tl.constexpr, EIGHT: tl.constexpr, OWN: tl.constexpr):
    """State m [n] of the page at `at` [n]: numbers [n, D] as stored, and the factors [n] that go before them."""
    d = tl.arange(0, D)
    ok = held[:, None] & (d < width)[None, :]
    if EIGHT:
        where = at[:, None] + data + (m * width)[:, None] + d[None, :]
        number = tl.load(where.to(tl.pointer_type(tl.int8)), mask=ok, other=0)
        gain = tl.load((at + gain_at + 2 * m).to(tl.pointer_type(tl.float16)), mask=held, other=0.0).to(tl.float32)
    else:
        where = at[:, None] + data + ((m * width)[:, None] + d[None, :]) * 2
        number = tl.load(where.to(tl.pointer_type(OWN)), mask=ok, other=0.0)
        gain = tl.where(held, 1.0, 0.0)
    return number, gain


@triton.jit
def _state(page, data, gain_at, m, width, D: tl.constexpr, EIGHT: tl.constexpr, OWN: tl.constexpr):
    """The same for one state of one page: float32 [D] and a number."""
    d = tl.arange(0, D)
    if EIGHT:
        held = (page + data).to(tl.pointer_type(tl.int8))
        number = tl.load(held + m * width + d, mask=d < width, other=0).to(tl.float32)
        gain = tl.load((page + gain_at).to(tl.pointer_type(tl.float16)) + m).to(tl.float32)
    else:
        held = (page + data).to(tl.pointer_type(OWN))
        number = tl.load(held + m * width + d, mask=d < width, other=0.0).to(tl.float32)
        gain = 1.0
    return number, gain


@triton.jit
def _combine_kernel(
    part_ptr, stat_ptr, out_ptr, values_ptr, order_v_ptr, turn_ptr, queries, page_splits, splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V_WIDE: tl.constexpr, BR: tl.constexpr, SETS: tl.constexpr,
    BS: tl.constexpr, V_CODES: tl.constexpr, V_MOST: tl.constexpr,
):  # fmt: skip
    """Splits weighed and added for one query row; out [B, H * G, queries, D], contiguous."""
    pid, r = tl.program_id(0), tl.program_id(1)
    b, h = pid // H, pid % H
    d = tl.arange(0, D)
    i = tl.arange(0, BS)
    values = values_ptr + h * VALUE_FIELDS
    width, first = tl.load(values + 1), tl.load(values + 2)
    channels, turned = tl.load(values + 6), tl.load(values + 10)
    order = tl.load(order_v_ptr + h * D + d)
    top = tl.full([BS], float("-inf"), tl.float32)
    base = pid.to(tl.int64) * splits
    for start in range(0, splits, BS):
        ok = start + i < splits
        top = tl.maximum(top, tl.load(stat_ptr + (base + start + i) * 2 * BR + r, mask=ok, other=float("-inf")))
    peak = tl.max(top, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BS], tl.float32)
    stored, codes = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for start in range(0, splits, BS):
        ok = start + i < splits
        stat = stat_ptr + (base + start + i) * 2 * BR + r
        w = tl.exp2(tl.load(stat, mask=ok, other=float("-inf")) - peak)
        total += w * tl.load(stat + BR, mask=ok, other=0.0)
        row = part_ptr + ((base + start + i) * BR + r)[:, None] * SETS
        ok = ok & (w > 0)  # a split without tokens has written nothing to rely on
        paged = (ok & (start + i < page_splits))[:, None]
        dense = (ok & (start + i >= page_splits))[:, None]
        stored += tl.sum(w[:, None] * tl.load(row + order[None, :], mask=dense & (d >= 0)[None, :], other=0.0), 0)
        if V_CODES:
            at = d % 2 * (D // 2) + d // 2  # where `_product` puts column d
            codes += tl.sum(w[:, None] * tl.load(row + at[None, :], mask=paged & (d >= 0)[None, :], other=0.0), 0)
        if V_WIDE > 0:
            ours = paged & (d < tl.minimum(channels, V_WIDE))[None, :]
            stored += tl.sum(w[:, None] * tl.load(row + V_CODES * D + d[None, :], mask=ours, other=0.0), 0)
        if V_MOST > 0:
            ours = paged & ((d >= first) & (d < first + width))[None, :]
            smooth = row + (V_CODES * D + V_WIDE) + (d - first)[None, :]
            stored += tl.sum(w[:, None] * tl.load(smooth, mask=ours, other=0.0), 0)
    if turned > 0:
        turn = tl.load(turn_ptr + d[:, None] * D + d[None, :])  # out[c] = sum over j of codes[j] turn[c, j]
        stored += tl.sum(turn * codes[None, :], 1)
    else:
        stored += codes
    mass = tl.sum(total, 0)
    stored = stored / tl.where(mass > 0, mass, 1.0)
    to = out_ptr + ((b * H * G + h * G + r // queries).to(tl.int64) * queries + r % queries) * D
    tl.store(to + order, stored)


def _warps(rows: int, dim: int, traits: dict[str, int | bool]) -> int:
    """One warp waits for nobody; more where its registers would not do."""
    wide = max(traits["K_WIDE"], traits["V_WIDE"])
    return 4 if rows > 32 or wide > 32 or dim > 128 else 2 if rows > 16 else 1


def attend(
    plan: Plan,
    pages: torch.Tensor,
    counts: torch.Tensor,
    basis: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Attention of q over pages and dense tokens: [B, Hq, Q, D] in q's dtype.

    pages uint8 [B, N, page bytes], row b fills its first counts[b] (int32 [B]). basis float32 [S, T].
    q [B, Hq, Q, D] with Hq / H * Q at most `ROWS`. k, v [B, H, L, D]: the dense tokens, of which query i of row b sees
    the first seen[b, i] (int32 [B, Q]). scaling multiplies the scores. A query that sees nothing gets zeros.
    """
    layout = plan.layout
    batch, heads, queries, dim = q.shape
    group = heads // layout.heads
    rows = max(8, triton.next_power_of_2(group * queries))
    if rows > ROWS:
        raise ValueError(f"{group * queries} query rows a KV head; this kernel takes {ROWS}")
    if q.stride(-1) != 1:
        q = q.contiguous()
    n, pairs, traits = pages.shape[1], batch * layout.heads, plan.traits
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    per_split = max(1, n * pairs // (TARGET * processors))
    page_splits = -(-n // per_split)
    splits = page_splits + -(-k.shape[2] // STRETCH)
    sets = max(dim, dim * traits["V_CODES"] + traits["V_WIDE"] + dim * (traits["V_MOST"] > 0))

    def scratch(*shape: int) -> torch.Tensor:
        return torch.empty(pairs, *shape, dtype=torch.float32, device=q.device)

    part, stat = scratch(splits, rows, sets), scratch(splits, 2, rows)
    near = scratch(page_splits * per_split * traits["K_MOST"] * rows)
    out = torch.empty(batch, heads, queries, dim, dtype=q.dtype, device=q.device)
    shape = dict(H=layout.heads, G=group, D=dim, BR=rows, SETS=sets)
    _spectral_kernel[(pairs, splits)](
        q, pages, counts, basis, plan.keys, plan.values, plan.order_k, k, v, seen, near, part, stat,
        queries, scaling * 1.4426950408889634, layout.page_bytes, pages.stride(0), k.shape[2], per_split, page_splits,
        splits, plan.keys.shape[1], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        T=layout.segment, BD=DENSE_STEP, STRETCH=STRETCH, OWN=_OWN[q.dtype], DOT=_DOT[q.dtype], **shape, **traits,
        num_warps=_warps(rows, dim, traits), num_stages=STAGES,
    )  # fmt: skip
    _combine_kernel[(pairs, group * queries)](
        part, stat, out, plan.values, plan.order_v, plan.turn, queries, page_splits, splits,
        BS=16, V_WIDE=traits["V_WIDE"], V_CODES=traits["V_CODES"], V_MOST=traits["V_MOST"], **shape, num_warps=4,
    )  # fmt: skip
    return out
