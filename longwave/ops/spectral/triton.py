"""Attend over sinks, pages, open segment and window in one pass on a GPU: the twin of reference.py, in Triton.

A program takes one row of the batch, one KV head and a few pages, or a stretch of the dense tokens, as flash-decoding
does: scores of a page, online softmax, its share of the output. Nothing is rebuilt: scales of K go into q, scales of V
into p, states meet q and p as sums. A second kernel adds the parts up, undoes V's rotation once and brings channels
home.

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
# Columns of the tables. K: its states, how many runs, and the runs; 3 bits are two runs, a plane of 2 and one of 1. A
# run: kind, channels, byte of the values, bytes a row, byte of the scales, what these are multiplied by, first channel.
RUN, K_RUNS, K_TABLE = 7, 5, 6
# V: its states; kind of its one run, channels, bytes of the values, scales and zeros (-1: none), whether it is turned.
V_KIND = 5
VALUE_FIELDS = tl.constexpr(11)
# the interpreter multiplies the bits of bfloat16, not the numbers
_INTERPRETED = triton.knobs.runtime.interpret
_OWN = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_DOT = {kind: tl.float32 if _INTERPRETED else own for kind, own in _OWN.items()}
BN = 32  # K's channels of a step
LAUNCH = dict(num_warps=4)
TARGET = 4  # programs a multiprocessor that splitting aims at


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the kernel finds what.

    keys int32 [H, K_TABLE + RUN * most runs], values int32 [H, 11], order_k and order_v int32 [H, D], turn float32
        [D, D].
    traits: compile-time facts of the layer. WIDE: the most channels of a 16-bit run of V, rounded up to a power of two;
        ALIGN: a divisor of all 16-bit runs' channels; GROUPS: scales of a token of V; whether there are 16-bit runs of
        K, codes of K, codes of V; GAINS_K, GAINS_V: whether states are int8.
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
    if not (_power(layout.dim) and layout.dim <= 256 and _power(layout.segment) and layout.segment <= 256):
        return "head_dim and segment must be powers of two, 16 to 256"
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
        GAINS_K=any(g.gains is not None for g in layout.k),
        GAINS_V=any(g.gains is not None for g in layout.v),
    )
    device = layout.k[0].heads.device
    turn = rotation(layout.dim).float()
    keys, values, order_k, order_v, turn = (x.to(device) for x in (keys, values, order_k, order_v, turn))
    return Plan(layout, keys, values, order_k, order_v, turn, traits)


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
        if bits == 3:
            found += [(2, n, data, stride, at, 1, first), (1, n, data + layout.segment // 4, stride, at, 4, first)]
        else:
            found.append((bits if bits in BITS else VALUES, n, data, stride, at, 1, first))
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
def _codes(base, rows, ok, stride, bits, COLUMNS: tl.constexpr):
    """Codes [rows, COLUMNS] in float16 of packed rows, `stride` bytes apart, in one plane of 1, 2, 4 or 8 bits.

    Packing (ops/codes.py) puts eighth m of the columns into run m % bits of the bytes, shifted by m // bits * bits.
    """
    c = tl.arange(0, COLUMNS)
    unit: tl.constexpr = COLUMNS // 8
    eighth = c // unit
    byte = tl.multiple_of((eighth & (bits - 1)) * unit, unit) + c % unit
    shift = (eighth & (0 - bits)).to(tl.int16)
    code = tl.load(base + rows[:, None] * stride + byte[None, :], mask=ok[:, None], other=0).to(tl.int16)
    code = (code >> shift[None, :]) & ((1 << bits) - 1).to(tl.int16)
    # 1024 + code has code in its last bits: cheaper than converting
    return (code | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def _states(data, gains, first, states, width, D: tl.constexpr, EIGHT: tl.constexpr):
    """States first .. first + 15: numbers [16, D] as stored, and the factors [16] that belong before them."""
    m, d = first + tl.arange(0, 16), tl.arange(0, D)
    c = tl.load(data + m[:, None] * width + d[None, :], mask=(m < states)[:, None] & (d < width)[None, :], other=0)
    if EIGHT:
        gain = tl.load(gains.to(tl.pointer_type(tl.float16)) + m, mask=m < states, other=0.0).to(tl.float32)
    else:
        gain = tl.full([16], 1.0, tl.float32)
    return c, gain


@triton.jit
def _spectral_kernel(
    q_ptr, pages_ptr, counts_ptr, basis_ptr, keys_ptr, values_ptr, order_k_ptr,
    dense_k_ptr, dense_v_ptr, seen_ptr, part_ptr, stat_ptr,
    queries, scale, page_bytes, row_bytes, dense_tokens, per_split, page_splits, splits, key_fields,
    stride_qb, stride_qh, stride_qq, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, GROUPS: tl.constexpr,
    K_VALUES: tl.constexpr, K_CODES: tl.constexpr, V_CODES: tl.constexpr, GAINS_K: tl.constexpr,
    GAINS_V: tl.constexpr, SETS: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One split of one row and KV head. part float32 [B, H, splits, BR, SETS], stat float32 [B, H, splits, 2, BR]:
    unnormalised outputs (states D, codes D, values WIDE), their maximum and sum. Dense splits use the first D."""
    pid, split = tl.program_id(0), tl.program_id(1)
    b, h = pid // H, pid % H
    r, t, d = tl.arange(0, BR), tl.arange(0, T), tl.arange(0, D)
    live = r < G * queries
    q_row = q_ptr + b.to(tl.int64) * stride_qb + (h * G + r // queries) * stride_qh + r % queries * stride_qq
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    out = tl.zeros([BR, D], tl.float32)
    part = part_ptr + ((pid.to(tl.int64) * splits + split) * BR + r[:, None]) * SETS
    if split >= page_splits:
        q = tl.load(q_row[:, None] + d[None, :], mask=live[:, None], other=0.0).to(DOT)
        seen = tl.load(seen_ptr + b * queries + r % queries, mask=live, other=0)
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
            codes_out = tl.zeros([BR, D], tl.float32)
        if WIDE > 0:
            wide_out = tl.zeros([BR, WIDE], tl.float32)
        keys, values, order = keys_ptr + h * key_fields, values_ptr + h * VALUE_FIELDS, order_k_ptr + h * D
        count = tl.load(counts_ptr + b)
        k_states, k_width = tl.load(keys), tl.load(keys + 1)
        k_first, k_data, k_gain, k_runs = tl.load(keys + 2), tl.load(keys + 3), tl.load(keys + 4), tl.load(keys + 5)
        v_states, v_width = tl.load(values), tl.load(values + 1)
        v_data, v_gain = tl.load(values + 3), tl.load(values + 4)
        kind, channels, v_values = tl.load(values + 5), tl.load(values + 6), tl.load(values + 7)
        v_scales, v_zeros = tl.load(values + 8), tl.load(values + 9)
        channel = tl.load(order + k_first + d, mask=d < k_width, other=0)
        q_smooth = tl.load(q_row[:, None] + channel[None, :], mask=live[:, None] & (d < k_width)[None, :], other=0.0)
        q_smooth = q_smooth.to(DOT)
        start_page = split * per_split
        page = pages_ptr + b.to(tl.int64) * row_bytes + start_page.to(tl.int64) * page_bytes
        for _ in range(start_page, min(start_page + per_split, count)):
            s = tl.zeros([BR, T], tl.float32)
            for m in range(0, k_states, 16):
                at = page + k_data
                at = at.to(tl.pointer_type(tl.int8)) if GAINS_K else at.to(tl.pointer_type(OWN))
                state, gain = _states(at, page + k_gain, m, k_states, k_width, D, GAINS_K)
                a = tl.dot(q_smooth, tl.trans(state.to(DOT))) * gain[None, :]
                e = tl.load(basis_ptr + (m + tl.arange(0, 16))[:, None] * T + t[None, :],
                            mask=(m + tl.arange(0, 16) < k_states)[:, None], other=0.0).to(DOT)  # fmt: skip
                high = a.to(OWN).to(DOT)  # in two parts: a mean shifts a page's scores as a whole
                s = tl.dot(high, e, s)
                s = tl.dot((a - high.to(tl.float32)).to(OWN).to(DOT), e, s)
            for i in range(k_runs):
                run = keys + 6 + 7 * i
                bits, width, data = tl.load(run), tl.load(run + 1), tl.multiple_of(tl.load(run + 2), 16)
                if K_VALUES and (not K_CODES or bits == 16):
                    first = tl.load(run + 6)
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
                    factor, first = tl.load(run + 5).to(tl.float32), tl.load(run + 6)
                    scales = (page + scale_at).to(tl.pointer_type(tl.float16))
                    for start in range(0, width, BN):
                        j = start + tl.arange(0, BN)
                        ok = j < width
                        which = tl.load(order + first + j, mask=ok, other=0)
                        step = tl.load(scales + j, mask=ok, other=0.0).to(tl.float32) * factor
                        zero = tl.load(scales + width + j, mask=ok, other=0.0).to(tl.float32)
                        codes = _codes(page + data, j, ok, stride, bits, T)
                        qn = tl.load(q_row[:, None] + which[None, :], mask=live[:, None] & ok[None, :], other=0.0)
                        qn = qn.to(tl.float32)
                        if factor == 1.0:  # the second plane of 3 bits has no zeros of its own
                            s += tl.sum(qn * zero[None, :], 1)[:, None]
                        s = tl.dot((qn * step[None, :]).to(tl.float16), codes, s)
            s = s * scale
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            old = tl.exp2(top - new)
            total = total * old + tl.sum(p, 1)
            top = new
            out = out * old[:, None]
            for m in range(0, v_states, 16):
                at = page + v_data
                at = at.to(tl.pointer_type(tl.int8)) if GAINS_V else at.to(tl.pointer_type(OWN))
                state, gain = _states(at, page + v_gain, m, v_states, v_width, D, GAINS_V)
                e = tl.load(basis_ptr + (m + tl.arange(0, 16))[:, None] * T + t[None, :],
                            mask=(m + tl.arange(0, 16) < v_states)[:, None], other=0.0).to(DOT)  # fmt: skip
                mass = tl.dot(p.to(OWN).to(DOT), tl.trans(e)) * gain[None, :]
                out = tl.dot(mass.to(OWN).to(DOT), state.to(DOT), out)
            if WIDE > 0:
                wide_out = wide_out * old[:, None]
                if kind == 16:
                    own = (page + tl.multiple_of(v_values, 16)).to(tl.pointer_type(OWN))
                    c = tl.arange(0, WIDE)
                    channels = tl.multiple_of(channels, ALIGN)
                    vn = tl.load(own + t[:, None] * channels + c[None, :], mask=(c < channels)[None, :], other=0.0)
                    wide_out = tl.dot(p.to(OWN).to(DOT), vn.to(DOT), wide_out)
            if V_CODES:
                codes_out = codes_out * old[:, None]
                if kind > 0 and kind < 16:
                    stride = tl.multiple_of(D * kind // 8, D // 8)
                    low = tl.where(kind == 3, 2, kind)
                    at = page + tl.multiple_of(v_values, 16)
                    codes = _codes(at, t, t >= 0, stride, low, D)
                    if kind == 3:
                        codes += 4.0 * _codes(at + D // 4, t, t >= 0, stride, low // 2, D)
                    middle = (((1 << kind) - 1) * -0.5).to(tl.float32)
                    scales = (page + v_scales).to(tl.pointer_type(tl.float16))
                    zeros = (page + tl.maximum(v_zeros, 0)).to(tl.pointer_type(tl.float16))
                    if GROUPS == 1:
                        step = tl.load(scales + t).to(tl.float32)
                        zero = tl.load(zeros + t, mask=t * 0 + v_zeros >= 0, other=0.0).to(tl.float32)
                        zero = tl.where(v_zeros >= 0, zero, step * middle)
                        codes_out += tl.sum(p * zero[None, :], 1)[:, None]
                        codes_out = tl.dot((p * step[None, :]).to(tl.float16), codes, codes_out)
                    else:
                        at = t[:, None] * GROUPS + (d // (D // GROUPS))[None, :]
                        step = tl.load(scales + at).to(tl.float32)
                        zero = tl.load(zeros + at, mask=at * 0 + v_zeros >= 0, other=0.0).to(tl.float32)
                        zero = tl.where(v_zeros >= 0, zero, step * middle)
                        whole = (codes.to(tl.float32) * step + zero).to(tl.float16)
                        codes_out = tl.dot(p.to(tl.float16), whole, codes_out)
            page += page_bytes
        tl.store(part + d[None, :], out)
        if V_CODES:
            tl.store(part + D + d[None, :], codes_out)
        if WIDE > 0:
            tl.store(part + (SETS - WIDE) + tl.arange(0, WIDE)[None, :], wide_out)
    stat = stat_ptr + (pid.to(tl.int64) * splits + split) * 2 * BR + r
    tl.store(stat, top)
    tl.store(stat + BR, total)


@triton.jit
def _combine_kernel(
    part_ptr, stat_ptr, out_ptr, values_ptr, order_v_ptr, turn_ptr, queries, page_splits, splits,
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
        ours = ok[:, None] & paged & ((d >= first) & (d < first + width))[None, :]
        stored += tl.sum(w[:, None] * tl.load(row + (d - first)[None, :], mask=ours, other=0.0), 0)
        dense = ok[:, None] & (start + i >= page_splits)[:, None]
        stored += tl.sum(w[:, None] * tl.load(row + order[None, :], mask=dense & (d >= 0)[None, :], other=0.0), 0)
        if V_CODES:
            ours = ok[:, None] & paged & (d >= 0)[None, :]
            codes += tl.sum(w[:, None] * tl.load(row + D + d[None, :], mask=ours, other=0.0), 0)
        if WIDE > 0:
            ours = ok[:, None] & paged & (d < tl.minimum(channels, WIDE))[None, :]
            stored += tl.sum(w[:, None] * tl.load(row + (SETS - WIDE) + d[None, :], mask=ours, other=0.0), 0)
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
    splits = page_splits + -(-k.shape[2] // stretch)
    sets = dim * (1 + plan.traits["V_CODES"]) + plan.traits["WIDE"]
    part = torch.empty(batch, layout.heads, splits, rows, sets, dtype=torch.float32, device=q.device)
    stat = torch.empty(batch, layout.heads, splits, 2, rows, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, queries, dim, dtype=q.dtype, device=q.device)
    shape = dict(H=layout.heads, G=group, D=dim, BR=rows, SETS=sets)
    _spectral_kernel[(batch * layout.heads, splits)](
        q, pages, counts, basis, plan.keys, plan.values, plan.order_k, k, v, seen, part, stat,
        queries, scaling * 1.4426950408889634, layout.page_bytes, pages.stride(0), k.shape[2], per_split, page_splits,
        splits, plan.keys.shape[1], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        T=layout.segment, BN=BN, BD=64, DENSE=stretch, OWN=_OWN[q.dtype], DOT=_DOT[q.dtype], **LAUNCH,
        **plan.traits, **shape,
    )  # fmt: skip
    _combine_kernel[(batch * layout.heads, group * queries)](
        part, stat, out, plan.values, plan.order_v, plan.turn, queries, page_splits, splits, BS=16, num_warps=4,
        WIDE=plan.traits["WIDE"], V_CODES=plan.traits["V_CODES"], **shape,
    )  # fmt: skip
    return out
