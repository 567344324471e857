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

from longwave.ops.codes import BITS, rotation
from longwave.store.layout import Field, Group, Layout

ROWS = 64  # query rows (group x queries) up to which this is used: beyond, products dominate and the reference does
VALUES = 16  # kind of a run of 16-bit values; codes are their number of bits
# Columns of the tables. K: its states, how many runs, and the runs. A run: kind, channels, byte of the values, bytes a
# row, byte of the scales, first channel.
RUN, K_TABLE = 6, 6  # numbers of a run, and before the runs
# V: its states; kind of its one run, channels, bytes of the values, scales and zeros (-1: none), whether it is turned.
VALUE_FIELDS = tl.constexpr(11)
# the interpreter multiplies the bits of bfloat16, not the numbers
_INTERPRETED = triton.knobs.runtime.interpret
_OWN = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_DOT = {kind: tl.float32 if _INTERPRETED else own for kind, own in _OWN.items()}
BN = 32  # K's channels of a step
PAGES = 32  # whose states are taken together
LAUNCH = dict(num_warps=2, num_stages=1)
TARGET = 8  # programs a multiprocessor that splitting aims at


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the kernel finds what.

    keys int32 [H, K_TABLE + RUN * most runs], values int32 [H, 11], order_k and order_v int32 [H, D], turn float32
        [D, D].
    traits: compile-time facts of the layer. WIDE: the most channels of a 16-bit run of V, rounded up to a power of two;
        ALIGN: a divisor of all 16-bit runs' channels; GROUPS: scales of a token of V; whether there are 16-bit runs of
        K, codes of K, codes of V; K_MOST, V_MOST: the most states. eight: whether K's and V's states are int8.
    """

    layout: Layout
    keys: torch.Tensor
    values: torch.Tensor
    order_k: torch.Tensor
    order_v: torch.Tensor
    turn: torch.Tensor
    traits: dict[str, int | bool]
    eight: tuple[bool, bool]


def _power(n: int) -> bool:
    return n >= 16 and n & (n - 1) == 0


def fits(layout: Layout) -> str | None:
    """Why the kernel cannot read this layout, or None if it can."""
    if layout.dtype not in (torch.float16, torch.bfloat16):
        return f"the model computes in {layout.dtype}, not in 16 bits"
    if not (_power(layout.dim) and 32 <= layout.dim <= 256 and _power(layout.segment) and layout.segment <= 256):
        return "head_dim (32 to 256) and segment (16 to 256) must be powers of two"
    for group in layout.k:
        code = group.code
        if code.residual or any(b in BITS and code.axis != "time" for b, _ in code.runs):
            return "K's codes must lie along time"
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
    """The tables of a layout that `fits`, on its device."""
    runs = [[_runs(layout, g, i) for i in range(len(g.heads))] for g in layout.k]
    most = max(len(x) for group in runs for x in group)
    keys = torch.zeros(layout.heads, K_TABLE + RUN * most, dtype=torch.int32)
    values = torch.zeros(layout.heads, 11, dtype=torch.int32)
    order_k, order_v = torch.zeros(2, layout.heads, layout.dim, dtype=torch.int32)
    for group, found in zip(layout.k, runs, strict=True):
        for i, head in enumerate(group.heads.tolist()):
            order_k[head] = group.order[i].cpu().int()
            row = [*_smooth(group, i, layout.dim), len(found[i]), *(x for run in found[i] for x in run)]
            keys[head, : len(row)] = torch.tensor(row)
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
    wide = max([n for side, n in whole if side == "v"], default=0)
    traits = dict(
        WIDE=max(16, triton.next_power_of_2(wide)) if wide else 0,
        ALIGN=math.gcd(8, *(n for _, n in whole)),
        GROUPS=groups,
        K_VALUES=any(side == "k" for side, _ in whole),
        K_CODES=any(side == "k" and bits in BITS for side, bits, _ in kept),
        V_CODES=any(side == "v" and bits in BITS for side, bits, _ in kept),
        K_MOST=max([g.code.states for g in layout.k if g.states is not None], default=0),
        V_MOST=max([g.code.states for g in layout.v if g.states is not None], default=0),
    )
    device = layout.k[0].heads.device
    turn = rotation(layout.dim).float()
    keys, values, order_k, order_v, turn = (x.to(device) for x in (keys, values, order_k, order_v, turn))
    eight = (any(g.gains is not None for g in layout.k), any(g.gains is not None for g in layout.v))
    return Plan(layout, keys, values, order_k, order_v, turn, traits, eight)


def _at(group: Group, field: Field | None, i: int) -> int:
    """Byte of a page where the part of a group's head i starts."""
    return 0 if field is None else field.offset + i * field.nbytes // len(group.heads)


def _runs(layout: Layout, group: Group, i: int) -> list[tuple[int, ...]]:
    """K's runs of a group's head i, as the table has them."""
    found: list[tuple[int, ...]] = []
    first = 0
    for (bits, n), held, scales in zip(group.code.runs, group.values, group.scales, strict=True):
        data, at = _at(group, held, i), _at(group, scales, i)
        stride = layout.segment * bits // 8
        found.append((bits if bits in BITS else VALUES, n, data, stride, at, first))
        first += n
    return found


def _smooth(group: Group, i: int, dim: int) -> list[int]:
    """Of a group's head i: states, channels that have them, the first of these, byte of the states and of the gains."""
    if group.states is None:
        return [0, 0, 0, 0, 0]
    code = group.code
    first = 0 if code.residual else code.kept
    return [code.states, code.smooth(dim), first, _at(group, group.states, i), _at(group, group.gains, i)]


@triton.jit
def _plane(base, rows, ok, stride, bits, COLUMNS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Codes int16 [rows, COUNT] of packed rows, `stride` bytes apart, in one plane of 1, 2, 4 or 8 bits: of COLUMNS
    columns, those from FIRST on.

    Packing (ops/codes.py) puts eighth m of the columns into run m % bits of the bytes, shifted by m // bits * bits.
    """
    c = FIRST + tl.arange(0, COUNT)
    unit: tl.constexpr = COLUMNS // 8
    eighth = c // unit
    byte = tl.multiple_of((eighth & (bits - 1)) * unit, unit) + c % unit
    shift = (eighth & (0 - bits)).to(tl.int16)
    code = tl.load(base + rows[:, None] * stride + byte[None, :], mask=ok[:, None], other=0).to(tl.int16)
    return (code >> shift[None, :]) & ((1 << bits) - 1).to(tl.int16)


@triton.jit
def _codes(base, rows, ok, stride, bits, COLUMNS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """The same in float16; 3 bits are a plane of 2 and then a plane of 1."""
    low = tl.where(bits == 3, 2, bits)
    code = _plane(base, rows, ok, stride, low, COLUMNS, FIRST, COUNT)
    if bits == 3:
        code |= _plane(base + COLUMNS // 4, rows, ok, stride, low // 2, COLUMNS, FIRST, COUNT) << 2
    # 1024 + code has code in its last bits: cheaper than converting
    return (code | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def _mix(
    out, page, data, scale_at, zero_at, bits, p,
    T: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """out [BR, D / 2] plus p [BR, T] times codes across channels, those from FIRST on."""
    t = tl.arange(0, T)
    codes = _codes(data, t, t >= 0, tl.multiple_of(D * bits // 8, D // 8), bits, D, FIRST, D // 2)
    middle = (((1 << bits) - 1) * -0.5).to(tl.float32)
    scales = (page + scale_at).to(tl.pointer_type(tl.float16))
    zeros = (page + tl.maximum(zero_at, 0)).to(tl.pointer_type(tl.float16))
    if GROUPS == 1:
        step = tl.load(scales + t).to(tl.float32)
        zero = tl.load(zeros + t, mask=t * 0 + zero_at >= 0, other=0.0).to(tl.float32)
        zero = tl.where(zero_at >= 0, zero, step * middle)
        out += tl.sum(p * zero[None, :], 1)[:, None]
        return tl.dot((p * step[None, :]).to(tl.float16), codes, out)
    else:
        at = t[:, None] * GROUPS + ((FIRST + tl.arange(0, D // 2)) // (D // GROUPS))[None, :]
        step = tl.load(scales + at).to(tl.float32)
        zero = tl.load(zeros + at, mask=at * 0 + zero_at >= 0, other=0.0).to(tl.float32)
        zero = tl.where(zero_at >= 0, zero, step * middle)
        return tl.dot(p.to(tl.float16), (codes.to(tl.float32) * step + zero).to(tl.float16), out)


@triton.jit
def _page_states(base, first, pages, inside, states, m, width, data, gain_at, page_bytes,
                 D: tl.constexpr, EIGHT: tl.constexpr, OWN: tl.constexpr):  # fmt: skip
    """State m of a head in many pages: numbers [pages, D] as stored, and the factors [pages] that go before them."""
    d = tl.arange(0, D)
    at = base + (first + pages).to(tl.int64) * page_bytes
    ok = inside[:, None] & (d < width)[None, :]
    if EIGHT:
        where = at[:, None] + data + m * width + d[None, :]
        number = tl.load(where.to(tl.pointer_type(tl.int8)), mask=ok, other=0)
        gain = tl.load((at + gain_at + 2 * m).to(tl.pointer_type(tl.float16)), mask=inside, other=0.0).to(tl.float32)
    else:
        where = at[:, None] + data + (m * width + d[None, :]) * 2
        number = tl.load(where.to(tl.pointer_type(OWN)), mask=ok, other=0.0)
        gain = tl.where(inside, 1.0, 0.0)
    return number, gain


@triton.jit
def _project_kernel(
    q_ptr, pages_ptr, counts_ptr, keys_ptr, order_k_ptr, near_ptr, queries, page_bytes, row_bytes, n, key_fields,
    stride_qb, stride_qh, stride_qq,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, MOST: tl.constexpr,
    EIGHT: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """q times K's states of BP pages: near float32 [B, H, N, MOST, BR]."""
    pid, first = tl.program_id(0), tl.program_id(1) * BP
    b, h = pid // H, pid % H
    r, d, i = tl.arange(0, BR), tl.arange(0, D), tl.arange(0, BP)
    keys = keys_ptr + h * key_fields
    states, width, smooth = tl.load(keys), tl.load(keys + 1), tl.load(keys + 2)
    data, gain_at = tl.load(keys + 3), tl.load(keys + 4)
    q_row = q_ptr + b.to(tl.int64) * stride_qb + (h * G + r // queries) * stride_qh + r % queries * stride_qq
    channel = tl.load(order_k_ptr + h * D + smooth + d, mask=d < width, other=0)
    ok = (r < G * queries)[:, None] & (d < width)[None, :]
    q = tl.load(q_row[:, None] + channel[None, :], mask=ok, other=0.0)
    inside = first + i < tl.load(counts_ptr + b)
    base = pages_ptr + b.to(tl.int64) * row_bytes
    for m in range(states):
        number, gain = _page_states(base, first, i, inside, states, m, width, data, gain_at, page_bytes, D, EIGHT, OWN)
        a = tl.dot(q.to(DOT), tl.trans(number.to(DOT))) * gain[None, :]
        to = near_ptr + ((pid.to(tl.int64) * n + first + i)[None, :] * MOST + m) * BR + r[:, None]
        tl.store(to, a, mask=(first + i < n)[None, :])


@triton.jit
def _expand_kernel(
    pages_ptr, counts_ptr, values_ptr, far_ptr, tops_ptr, part_ptr, stat_ptr,
    page_bytes, row_bytes, n, splits, first_split,
    H: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, MOST: tl.constexpr, SETS: tl.constexpr,
    EIGHT: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What V's states of BP pages add, weighed by `far` float32 [B, H, N, MOST, BR] = p E^T at the maximum `tops`
    [B, H, N, BR]: a split like those of the kernel before, whose mass was counted there."""
    pid, block = tl.program_id(0), tl.program_id(1)
    b, h = pid // H, pid % H
    r, d, i = tl.arange(0, BR), tl.arange(0, D), tl.arange(0, BP)
    first = block * BP
    values = values_ptr + h * VALUE_FIELDS
    states, width = tl.load(values), tl.load(values + 1)
    data, gain_at = tl.load(values + 3), tl.load(values + 4)
    inside = first + i < tl.load(counts_ptr + b)
    line = pid.to(tl.int64) * n + first + i
    tops = tl.load(tops_ptr + line[None, :] * BR + r[:, None], mask=inside[None, :], other=float("-inf"))
    top = tl.max(tops, 1)
    w = tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top)[:, None])
    base = pages_ptr + b.to(tl.int64) * row_bytes
    out = tl.zeros([BR, D], tl.float32)
    for m in range(states):
        number, gain = _page_states(base, first, i, inside, states, m, width, data, gain_at, page_bytes, D, EIGHT, OWN)
        far = tl.load(far_ptr + (line[None, :] * MOST + m) * BR + r[:, None], mask=inside[None, :], other=0.0)
        mass = far * w * gain[None, :]
        high = mass.to(OWN).to(DOT)
        out = tl.dot(high, number.to(DOT), out)
        out = tl.dot((mass - high.to(tl.float32)).to(OWN).to(DOT), number.to(DOT), out)
    split = pid.to(tl.int64) * splits + first_split + block
    tl.store(part_ptr + (split * BR + r[:, None]) * SETS + d[None, :], out)
    stat = stat_ptr + split * 2 * BR + r
    tl.store(stat, top)
    tl.store(stat + BR, tl.zeros([BR], tl.float32))


@triton.jit
def _spectral_kernel(
    q_ptr, pages_ptr, counts_ptr, basis_ptr, keys_ptr, values_ptr, order_k_ptr,
    dense_k_ptr, dense_v_ptr, seen_ptr, near_ptr, far_ptr, tops_ptr, part_ptr, stat_ptr,
    queries, scale, page_bytes, row_bytes, n, dense_tokens, per_split, page_splits, splits, key_fields,
    stride_qb, stride_qh, stride_qq, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, GROUPS: tl.constexpr,
    K_VALUES: tl.constexpr, K_CODES: tl.constexpr, V_CODES: tl.constexpr, K_MOST: tl.constexpr, V_MOST: tl.constexpr,
    SETS: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One split of one row and KV head. part float32 [B, H, splits, BR, SETS], stat float32 [B, H, splits, 2, BR]:
    unnormalised outputs (codes D, values WIDE; of dense tokens D), their maximum and sum.
    near is what `_project_kernel` made; far and tops are for `_expand_kernel`."""
    pid, split = tl.program_id(0), tl.program_id(1)
    b, h = pid // H, pid % H
    r, t, d = tl.arange(0, BR), tl.arange(0, T), tl.arange(0, D)
    live = r < G * queries
    q_row = q_ptr + b.to(tl.int64) * stride_qb + (h * G + r // queries) * stride_qh + r % queries * stride_qq
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    part = part_ptr + ((pid.to(tl.int64) * splits + split) * BR + r[:, None]) * SETS
    if split >= page_splits:
        q = tl.load(q_row[:, None] + d[None, :], mask=live[:, None], other=0.0).to(DOT)
        seen = tl.load(seen_ptr + b * queries + r % queries, mask=live, other=0)
        out = tl.zeros([BR, D], tl.float32)
        first = (split - page_splits) * DENSE
        k_row = dense_k_ptr + b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
        v_row = dense_v_ptr + b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
        for start in range(first, min(first + DENSE, dense_tokens), BD):
            i = start + tl.arange(0, BD)
            held = i < dense_tokens
            k = tl.load(k_row + i[:, None] * stride_kt + d[None, :], mask=held[:, None], other=0.0).to(DOT)
            s = tl.dot(q, tl.trans(k)) * scale
            s = tl.where(i[None, :] < seen[:, None], s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - safe[:, None])
            old = tl.exp2(top - safe)
            v = tl.load(v_row + i[:, None] * stride_vt + d[None, :], mask=held[:, None], other=0.0).to(DOT)
            out = tl.dot(p.to(OWN).to(DOT), v, out * old[:, None])
            total = total * old + tl.sum(p, 1)
            top = new
        tl.store(part + d[None, :], out)
    else:
        if V_CODES:
            low_out = tl.zeros([BR, D // 2], tl.float32)  # in halves: a page's codes of V are many registers
            high_out = tl.zeros([BR, D // 2], tl.float32)
        if WIDE > 0:
            wide_out = tl.zeros([BR, WIDE], tl.float32)
        keys, values, order = keys_ptr + h * key_fields, values_ptr + h * VALUE_FIELDS, order_k_ptr + h * D
        count = tl.load(counts_ptr + b)
        k_states, k_runs, v_states = tl.load(keys), tl.load(keys + 5), tl.load(values)
        kind, channels, v_values = tl.load(values + 5), tl.load(values + 6), tl.load(values + 7)
        v_scales, v_zeros = tl.load(values + 8), tl.load(values + 9)
        wide = tl.multiple_of(tl.where(kind == 16, channels, 0), ALIGN)
        start_page = split * per_split
        page = pages_ptr + b.to(tl.int64) * row_bytes + start_page.to(tl.int64) * page_bytes
        line = (pid.to(tl.int64) * n + start_page) * BR + r
        for _ in range(start_page, min(start_page + per_split, count)):
            if WIDE > 0:  # on their way while the scores are made
                own = (page + tl.multiple_of(v_values, 16)).to(tl.pointer_type(OWN))
                c = tl.arange(0, WIDE)
                vn = tl.load(own + t[:, None] * wide + c[None, :], mask=(c < wide)[None, :], other=0.0)
            s = tl.zeros([BR, T], tl.float32)
            if K_MOST > 0:
                for m in range(k_states):
                    a = tl.load(near_ptr + (line - r) * K_MOST + m * BR + r)
                    s += a[:, None] * tl.load(basis_ptr + m * T + t)[None, :]
            if K_CODES:
                level = tl.zeros([BR, BN], tl.float32)
            for i in range(k_runs):
                run = keys + 6 + 6 * i
                bits, width, data = tl.load(run), tl.load(run + 1), tl.multiple_of(tl.load(run + 2), 16)
                if K_VALUES and (not K_CODES or bits == 16):
                    first = tl.load(run + 5)
                    width = tl.multiple_of(width, ALIGN)
                    own = (page + data).to(tl.pointer_type(OWN))
                    for start in range(0, width, BN):
                        j = start + tl.arange(0, BN)
                        ok = j < width
                        which = tl.load(order + first + j, mask=ok, other=0)
                        qn = tl.load(q_row[:, None] + which[None, :], mask=live[:, None] & ok[None, :], other=0.0)
                        kn = tl.load(own + t[:, None] * width + j[None, :], mask=ok[None, :], other=0.0)
                        s = tl.dot(qn.to(DOT), tl.trans(kn.to(DOT)), s)
                elif K_CODES:
                    stride, scale_at = tl.multiple_of(tl.load(run + 3), 16), tl.load(run + 4)
                    first = tl.load(run + 5)
                    scales = (page + scale_at).to(tl.pointer_type(tl.float16))
                    for start in range(0, width, BN):
                        j = start + tl.arange(0, BN)
                        ok = j < width
                        which = tl.load(order + first + j, mask=ok, other=0)
                        step = tl.load(scales + j, mask=ok, other=0.0).to(tl.float32)
                        zero = tl.load(scales + width + j, mask=ok, other=0.0).to(tl.float32)
                        codes = _codes(page + data, j, ok, stride, bits, T, 0, T)
                        qn = tl.load(q_row[:, None] + which[None, :], mask=live[:, None] & ok[None, :], other=0.0)
                        qn = qn.to(tl.float32)
                        level += qn * zero[None, :]
                        s = tl.dot((qn * step[None, :]).to(tl.float16), codes, s)
            if K_CODES:
                s += tl.sum(level, 1)[:, None]
            s = s * scale
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            old = tl.exp2(top - new)
            total = total * old + tl.sum(p, 1)
            top = new
            if V_MOST > 0:
                tl.store(tops_ptr + line, new)
                if V_MOST == 1:
                    if v_states > 0:
                        tl.store(far_ptr + line, tl.sum(p * tl.load(basis_ptr + t)[None, :], 1))
                else:
                    for begin in range(0, v_states, 16):
                        state = begin + tl.arange(0, 16)
                        held = state < v_states
                        e = tl.load(basis_ptr + state[None, :] * T + t[:, None], mask=held[None, :], other=0.0)
                        far = tl.dot(p.to(tl.float16), e.to(tl.float16))
                        to = far_ptr + (line - r)[:, None] * V_MOST + state[None, :] * BR + r[:, None]
                        tl.store(to, far, mask=held[None, :])
            if WIDE > 0:
                wide_out = wide_out * old[:, None]
                wide_out = tl.dot(p.to(OWN).to(DOT), vn.to(DOT), wide_out)
            if V_CODES:
                low_out = low_out * old[:, None]
                high_out = high_out * old[:, None]
                if kind > 0 and kind < 16:
                    at = page + tl.multiple_of(v_values, 16)
                    low_out = _mix(low_out, page, at, v_scales, v_zeros, kind, p, T, D, GROUPS, 0)
                    high_out = _mix(high_out, page, at, v_scales, v_zeros, kind, p, T, D, GROUPS, D // 2)
            page += page_bytes
            line += BR
        if V_CODES:
            half = tl.arange(0, D // 2)
            tl.store(part + half[None, :], low_out)
            tl.store(part + D // 2 + half[None, :], high_out)
        if WIDE > 0:
            tl.store(part + V_CODES * D + tl.arange(0, WIDE)[None, :], wide_out)
    stat = stat_ptr + (pid.to(tl.int64) * splits + split) * 2 * BR + r
    tl.store(stat, top)
    tl.store(stat + BR, total)


@triton.jit
def _combine_kernel(
    part_ptr, stat_ptr, out_ptr, values_ptr, order_v_ptr, turn_ptr, queries, page_splits, dense_splits, splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr, SETS: tl.constexpr,
    BS: tl.constexpr, V_CODES: tl.constexpr,
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
        paged = (start + i < page_splits)[:, None]
        smooth = ok[:, None] & (start + i >= dense_splits)[:, None]
        ours = smooth & ((d >= first) & (d < first + width))[None, :]
        stored += tl.sum(w[:, None] * tl.load(row + (d - first)[None, :], mask=ours, other=0.0), 0)
        dense = ((start + i >= page_splits) & (start + i < dense_splits))[:, None]
        stored += tl.sum(w[:, None] * tl.load(row + order[None, :], mask=dense & (d >= 0)[None, :], other=0.0), 0)
        if V_CODES:
            ours = ok[:, None] & paged & (d >= 0)[None, :]
            codes += tl.sum(w[:, None] * tl.load(row + d[None, :], mask=ours, other=0.0), 0)
        if WIDE > 0:
            ours = ok[:, None] & paged & (d < tl.minimum(channels, WIDE))[None, :]
            stored += tl.sum(w[:, None] * tl.load(row + V_CODES * D + d[None, :], mask=ours, other=0.0), 0)
    if turned > 0:
        turn = tl.load(turn_ptr + d[:, None] * D + d[None, :])  # out[c] = sum over j of codes[j] turn[c, j]
        stored += tl.sum(turn * codes[None, :], 1)
    else:
        stored += codes
    mass = tl.sum(total, 0)
    stored = stored / tl.where(mass > 0, mass, 1.0)
    to = out_ptr + ((b * H * G + h * G + r // queries).to(tl.int64) * queries + r % queries) * D
    tl.store(to + order, stored)


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
    rows = max(16, triton.next_power_of_2(group * queries))
    if rows > ROWS:
        raise ValueError(f"{group * queries} query rows a KV head; this kernel takes {ROWS}")
    if q.stride(-1) != 1:
        q = q.contiguous()
    n = pages.shape[1]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    wanted = max(1, TARGET * processors // (batch * layout.heads))
    per_split = max(1, -(-n // wanted))
    page_splits, stretch = -(-n // per_split), 128
    dense_splits = page_splits + -(-k.shape[2] // stretch)  # where those of V's states begin
    traits = plan.traits
    k_most, v_most = traits["K_MOST"], traits["V_MOST"]
    blocks = -(-n // PAGES)
    splits = dense_splits + (blocks if v_most else 0)
    sets = max(dim, dim * traits["V_CODES"] + traits["WIDE"])

    def scratch(*shape: int) -> torch.Tensor:
        return torch.empty(batch, layout.heads, *shape, dtype=torch.float32, device=q.device)

    part, stat = scratch(splits, rows, sets), scratch(splits, 2, rows)
    near, far, tops = scratch(n, k_most, rows), scratch(n, v_most, rows), scratch(n if v_most else 0, rows)
    out = torch.empty(batch, heads, queries, dim, dtype=q.dtype, device=q.device)
    pairs = batch * layout.heads
    shape = dict(H=layout.heads, D=dim, BR=rows)
    kinds = dict(OWN=_OWN[q.dtype], DOT=_DOT[q.dtype])
    where = (layout.page_bytes, pages.stride(0), n)
    if k_most and n:
        _project_kernel[(pairs, blocks)](
            q, pages, counts, plan.keys, plan.order_k, near, queries, *where, plan.keys.shape[1], *q.stride()[:3],
            G=group, BP=PAGES, MOST=k_most, EIGHT=plan.eight[0], **shape, **kinds,
        )  # fmt: skip
    _spectral_kernel[(pairs, dense_splits)](
        q, pages, counts, basis, plan.keys, plan.values, plan.order_k, k, v, seen, near, far, tops, part, stat,
        queries, scaling * 1.4426950408889634, *where, k.shape[2], per_split, page_splits, splits, plan.keys.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        G=group, T=layout.segment, BN=BN, BD=64, DENSE=stretch, SETS=sets, **traits, **shape, **kinds, **LAUNCH,
    )  # fmt: skip
    if v_most and n:
        _expand_kernel[(pairs, blocks)](
            pages, counts, plan.values, far, tops, part, stat, *where, splits, dense_splits,
            BP=PAGES, MOST=v_most, SETS=sets, EIGHT=plan.eight[1], **shape, **kinds,
        )  # fmt: skip
    _combine_kernel[(pairs, group * queries)](
        part, stat, out, plan.values, plan.order_v, plan.turn, queries, page_splits, dense_splits, splits,
        G=group, SETS=sets, BS=16, WIDE=traits["WIDE"], V_CODES=traits["V_CODES"], **shape,
    )  # fmt: skip
    return out
