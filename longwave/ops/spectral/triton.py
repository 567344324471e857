"""Attend over sinks, pages, open segment and window in one pass on a GPU: the twin of reference.py, in Triton.

A program takes one row of the batch, one KV head and a few pages, or a stretch of the dense tokens, as flash-decoding
does: scores of a page, online softmax, its share of the output. Nothing is rebuilt: scales of K go into q, scales of V
into p, states meet q and p as sums. A second kernel adds the parts up, undoes V's rotation once and brings channels
home.

What a head stores is read from a table, so one compiled kernel serves all layers of a model whatever their plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from longwave.ops.codes import BITS, rotation
from longwave.store.layout import Group, Layout

ROWS = 64  # query rows (group x queries) up to which this is used: beyond, products dominate and the reference does
VALUES = 16  # kind of a run of 16-bit values; codes are their number of bits
# the columns of the table [H, FIELDS]: K's runs, `RUN` numbers each, then the states; V's one run, then the states
RUN = 4  # kind, channels, byte of the values, byte of the scales
K_STATES, K_WIDTH, K_FIRST, K_DATA, K_GAIN, K_RUNS = range(6)
V_STATES, V_WIDTH, V_FIRST, V_DATA, V_GAIN, V_KIND, V_CHANNELS, V_VALUES, V_SCALES, V_ZEROS, V_TURNED = range(11)
K_TABLE = 6  # K's runs start here
# the interpreter multiplies the bits of bfloat16, not the numbers
_INTERPRETED = triton.knobs.runtime.interpret
_OWN = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_DOT = {kind: tl.float32 if _INTERPRETED else own for kind, own in _OWN.items()}
TARGET = 4  # programs a multiprocessor that splitting aims at


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the kernel finds what.

    keys int32 [H, K_TABLE + RUN * most runs], values int32 [H, 11], order_k and order_v int32 [H, D], turn float32
        [D, D].
    wide: the most channels of a 16-bit run of V, rounded up to a power of two; 0 if there is none.
    groups: scales that a token has for V. gains_k, gains_v: whether states are int8.
    """

    layout: Layout
    keys: torch.Tensor
    values: torch.Tensor
    order_k: torch.Tensor
    order_v: torch.Tensor
    turn: torch.Tensor
    wide: int
    groups: int
    gains_k: bool
    gains_v: bool


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
    most = max([len(g.code.runs) for g in layout.k])
    keys = torch.zeros(layout.heads, K_TABLE + RUN * most, dtype=torch.int32)
    values = torch.zeros(layout.heads, 11, dtype=torch.int32)
    orders = [torch.zeros(layout.heads, layout.dim, dtype=torch.int32) for _ in range(2)]
    wide, groups = 0, 1
    for side, (parts, row) in enumerate(((layout.k, keys), (layout.v, values))):
        for group in parts:
            for i, head in enumerate(group.heads.tolist()):
                orders[side][head] = group.order[i].cpu().int()
                row[head, :5] = torch.tensor(_states(group, i, layout.dim))
                code = group.code
                if side == 0:
                    row[head, K_RUNS] = len(code.runs)
                for j, (bits, n) in enumerate(code.runs):
                    values_field, scales = group.values[j], group.scales[j]
                    kind = bits if bits in BITS else VALUES
                    data = values_field.offset + i * values_field.nbytes // len(group.heads)
                    at = 0 if scales is None else scales.offset + i * scales.nbytes // len(group.heads)
                    if side == 0:
                        row[head, K_TABLE + RUN * j : K_TABLE + RUN * (j + 1)] = torch.tensor([kind, n, data, at])
                        continue
                    zeros = -1
                    if scales is not None:
                        groups = scales.shape[-1]
                        if code.zero:
                            zeros = at + 2 * layout.segment * groups
                    else:
                        wide = max(wide, n)
                    row[head, V_KIND:] = torch.tensor([kind, n, data, at, zeros, int(code.residual)])
    device = layout.k[0].heads.device
    turn = rotation(layout.dim).float()
    gains = [any(g.gains is not None for g in side) for side in (layout.k, layout.v)]
    tables = [x.to(device) for x in (keys, values, *orders, turn)]
    return Plan(layout, *tables, wide and max(16, triton.next_power_of_2(wide)), groups, *gains)


def _states(group: Group, i: int, dim: int) -> list[int]:
    """Of a group's head i: states, channels that have them, the first of these, byte of the states and of the gains."""
    code, field, gains = group.code, group.states, group.gains
    if field is None:
        return [0, 0, 0, 0, 0]
    first = 0 if code.residual else code.kept
    h = len(group.heads)
    gain = 0 if gains is None else gains.offset + i * gains.nbytes // h
    return [code.states, code.smooth(dim), first, field.offset + i * field.nbytes // h, gain]


@triton.jit
def _tile(base, rows, ok, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Codes [rows, COLUMNS] in float16 of packed rows at `base` (ops/codes.py says how they are packed)."""
    c = tl.arange(0, COLUMNS)
    row = base + rows[:, None] * (COLUMNS * BITS // 8)
    if BITS == 3:
        low = tl.load(row + (c % (COLUMNS // 4))[None, :], mask=ok[:, None], other=0).to(tl.int16)
        high = tl.load(row + (COLUMNS // 4 + c % (COLUMNS // 8))[None, :], mask=ok[:, None], other=0).to(tl.int16)
        low = (low >> (c // (COLUMNS // 4) * 2)[None, :].to(tl.int16)) & 3
        high = (high >> (c // (COLUMNS // 8))[None, :].to(tl.int16)) & 1
        code = low | (high << 2)
    else:
        code = tl.load(row + (c % (COLUMNS * BITS // 8))[None, :], mask=ok[:, None], other=0).to(tl.int16)
        if BITS < 8:
            code = (code >> (c // (COLUMNS * BITS // 8) * BITS)[None, :].to(tl.int16)) & (2**BITS - 1)
    # 1024 + code has code in its last bits: cheaper than converting
    return (code | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def _code_scores(
    score, page, data, scale_at, q_row, q_ok, order, n, T: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """score [BR, T] plus q times n channels of codes along time."""
    data = tl.multiple_of(data, 16)
    scales = (page + scale_at).to(tl.pointer_type(tl.float16))
    for start in range(0, n, BN):
        j = start + tl.arange(0, BN)
        ok = j < n
        channel = tl.load(order + j, mask=ok, other=0)
        q = tl.load(q_row[:, None] + channel[None, :], mask=q_ok[:, None] & ok[None, :], other=0.0).to(tl.float32)
        scale = tl.load(scales + j, mask=ok, other=0.0).to(tl.float32)
        zero = tl.load(scales + n + j, mask=ok, other=0.0).to(tl.float32)
        score += tl.sum(q * zero[None, :], 1)[:, None]
        score = tl.dot((q * scale[None, :]).to(tl.float16), _tile(page + data, j, ok, T, BITS), score)
    return score


@triton.jit
def _code_mix(
    out, page, data, scale_at, zero_at, p, D: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """out [BR, D] plus p [BR, T] times codes across channels."""
    t = tl.arange(0, T)
    data = tl.multiple_of(data, 16)
    codes = _tile(page + data, t, t >= 0, D, BITS)
    scales = (page + scale_at).to(tl.pointer_type(tl.float16))
    zeros = (page + tl.maximum(zero_at, 0)).to(tl.pointer_type(tl.float16))
    if GROUPS == 1:
        scale = tl.load(scales + t).to(tl.float32)
        zero = tl.load(zeros + t, mask=t * 0 + zero_at >= 0, other=0.0).to(tl.float32)
        zero = tl.where(zero_at >= 0, zero, scale * (-(2**BITS - 1) / 2.0))
        out += tl.sum(p * zero[None, :], 1)[:, None]
        return tl.dot((p * scale[None, :]).to(tl.float16), codes, out)
    else:
        at = t[:, None] * GROUPS + (tl.arange(0, D) // (D // GROUPS))[None, :]
        scale = tl.load(scales + at).to(tl.float32)
        zero = tl.load(zeros + at, mask=at * 0 + zero_at >= 0, other=0.0).to(tl.float32)
        zero = tl.where(zero_at >= 0, zero, scale * (-(2**BITS - 1) / 2.0))
        return tl.dot(p.to(tl.float16), (codes.to(tl.float32) * scale + zero).to(tl.float16), out)


@triton.jit
def _spectral_kernel(
    q_ptr, pages_ptr, counts_ptr, basis_ptr, keys_ptr, values_ptr, order_k_ptr,
    dense_k_ptr, dense_v_ptr, seen_ptr, part_ptr, stat_ptr,
    queries, scale, page_bytes, row_bytes, dense_tokens, per_split, page_splits, splits, key_fields,
    stride_qb, stride_qh, stride_qq, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr, GAINS_K: tl.constexpr,
    GAINS_V: tl.constexpr, SETS: tl.constexpr, DOT: tl.constexpr,
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
        q = tl.load(q_row[:, None] + d[None, :], mask=live[:, None], other=0.0)
        seen = tl.load(seen_ptr + b * queries + r % queries, mask=live, other=0)
        first = (split - page_splits) * DENSE
        k_row = dense_k_ptr + b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
        v_row = dense_v_ptr + b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
        for start in range(first, min(first + DENSE, dense_tokens), BD):
            i = start + tl.arange(0, BD)
            held = i < dense_tokens
            k = tl.load(k_row + d[:, None] + i[None, :] * stride_kt, mask=held[None, :], other=0.0)
            s = tl.dot(q.to(DOT), k.to(DOT)) * scale
            s = tl.where(i[None, :] < seen[:, None], s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - safe[:, None])
            old = tl.exp2(top - safe)
            v = tl.load(v_row + i[:, None] * stride_vt + d[None, :], mask=held[:, None], other=0.0)
            out = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), out * old[:, None])
            total = total * old + tl.sum(p, 1)
            top = new
        tl.store(part + d[None, :], out)
    else:
        codes_out = tl.zeros([BR, D], tl.float32)
        if WIDE > 0:
            wide_out = tl.zeros([BR, WIDE], tl.float32)
        keys, values, order = keys_ptr + h * key_fields, values_ptr + h * 11, order_k_ptr + h * D
        count = tl.load(counts_ptr + b)
        k_states, k_width = tl.load(keys), tl.load(keys + 1)
        k_first, k_data, k_gain, k_runs = tl.load(keys + 2), tl.load(keys + 3), tl.load(keys + 4), tl.load(keys + 5)
        v_states, v_width = tl.load(values), tl.load(values + 1)
        v_data, v_gain = tl.load(values + 3), tl.load(values + 4)
        kind, channels, v_values = tl.load(values + 5), tl.load(values + 6), tl.load(values + 7)
        v_scales, v_zeros = tl.load(values + 8), tl.load(values + 9)
        smooth = d < k_width
        channel = tl.load(order + k_first + d, mask=smooth, other=0)
        q_smooth = tl.load(q_row[:, None] + channel[None, :], mask=live[:, None] & smooth[None, :], other=0.0)
        q_smooth = q_smooth.to(tl.float32)
        start_page = split * per_split
        page = pages_ptr + b.to(tl.int64) * row_bytes + start_page.to(tl.int64) * page_bytes
        for _ in range(start_page, min(start_page + per_split, count)):
            s = tl.zeros([BR, T], tl.float32)
            for m in range(k_states):
                e = tl.load(basis_ptr + m * T + t)
                if GAINS_K:
                    own = (page + k_data).to(tl.pointer_type(tl.int8))
                    state = tl.load(own + m * k_width + d, mask=smooth, other=0)
                    gain = tl.load((page + k_gain).to(tl.pointer_type(tl.float16)) + m).to(tl.float32)
                    state = state.to(tl.float32) * gain
                else:
                    own = (page + k_data).to(tl.pointer_type(q_ptr.dtype.element_ty))
                    state = tl.load(own + m * k_width + d, mask=smooth, other=0.0).to(tl.float32)
                s += tl.sum(q_smooth * state[None, :], 1)[:, None] * e[None, :]
            done = k_first * 0
            for i in range(k_runs):
                run = keys + 6 + 4 * i
                bits, width, data, scale_at = tl.load(run), tl.load(run + 1), tl.load(run + 2), tl.load(run + 3)
                if bits == 16:
                    own = (page + tl.multiple_of(data, 16)).to(tl.pointer_type(q_ptr.dtype.element_ty))
                    for start in range(0, width, BN):
                        j = start + tl.arange(0, BN)
                        ok = j < width
                        which = tl.load(order + done + j, mask=ok, other=0)
                        qn = tl.load(q_row[:, None] + which[None, :], mask=live[:, None] & ok[None, :], other=0.0)
                        kn = tl.load(own + t[None, :] * width + j[:, None], mask=ok[:, None], other=0.0)
                        s = tl.dot(qn.to(DOT), kn.to(DOT), s)
                elif bits == 1:
                    s = _code_scores(s, page, data, scale_at, q_row, live, order + done, width, T, 1, BN)
                elif bits == 2:
                    s = _code_scores(s, page, data, scale_at, q_row, live, order + done, width, T, 2, BN)
                elif bits == 3:
                    s = _code_scores(s, page, data, scale_at, q_row, live, order + done, width, T, 3, BN)
                elif bits == 4:
                    s = _code_scores(s, page, data, scale_at, q_row, live, order + done, width, T, 4, BN)
                else:
                    s = _code_scores(s, page, data, scale_at, q_row, live, order + done, width, T, 8, BN)
                done += width
            s = s * scale
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            old = tl.exp2(top - new)
            total = total * old + tl.sum(p, 1)
            top = new
            out = out * old[:, None]
            codes_out = codes_out * old[:, None]
            for m in range(v_states):
                e = tl.load(basis_ptr + m * T + t)
                inside = d < v_width
                if GAINS_V:
                    own = (page + v_data).to(tl.pointer_type(tl.int8))
                    state = tl.load(own + m * v_width + d, mask=inside, other=0)
                    gain = tl.load((page + v_gain).to(tl.pointer_type(tl.float16)) + m).to(tl.float32)
                    state = state.to(tl.float32) * gain
                else:
                    own = (page + v_data).to(tl.pointer_type(q_ptr.dtype.element_ty))
                    state = tl.load(own + m * v_width + d, mask=inside, other=0.0).to(tl.float32)
                out += tl.sum(p * e[None, :], 1)[:, None] * state[None, :]
            if WIDE > 0:
                wide_out = wide_out * old[:, None]
                if kind == 16:
                    own = (page + tl.multiple_of(v_values, 16)).to(tl.pointer_type(q_ptr.dtype.element_ty))
                    c = tl.arange(0, WIDE)
                    vn = tl.load(own + t[:, None] * channels + c[None, :], mask=(c < channels)[None, :], other=0.0)
                    wide_out = tl.dot(p.to(vn.dtype).to(DOT), vn.to(DOT), wide_out)
            if kind == 1:
                codes_out = _code_mix(codes_out, page, v_values, v_scales, v_zeros, p, D, T, 1, GROUPS)
            elif kind == 2:
                codes_out = _code_mix(codes_out, page, v_values, v_scales, v_zeros, p, D, T, 2, GROUPS)
            elif kind == 3:
                codes_out = _code_mix(codes_out, page, v_values, v_scales, v_zeros, p, D, T, 3, GROUPS)
            elif kind == 4:
                codes_out = _code_mix(codes_out, page, v_values, v_scales, v_zeros, p, D, T, 4, GROUPS)
            elif kind == 8:
                codes_out = _code_mix(codes_out, page, v_values, v_scales, v_zeros, p, D, T, 8, GROUPS)
            page += page_bytes
        tl.store(part + d[None, :], out)
        tl.store(part + D + d[None, :], codes_out)
        if WIDE > 0:
            tl.store(part + 2 * D + tl.arange(0, WIDE)[None, :], wide_out)
    stat = stat_ptr + (pid.to(tl.int64) * splits + split) * 2 * BR + r
    tl.store(stat, top)
    tl.store(stat + BR, total)


@triton.jit
def _combine_kernel(
    part_ptr, stat_ptr, out_ptr, values_ptr, order_v_ptr, turn_ptr, queries, page_splits, splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr, SETS: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """Splits weighed and added for one query row; out [B, H * G, queries, D], contiguous."""
    pid, r = tl.program_id(0), tl.program_id(1)
    b, h = pid // H, pid % H
    d = tl.arange(0, D)
    i = tl.arange(0, BS)
    values = values_ptr + h * 11
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
        ours = ok[:, None] & paged & (d >= 0)[None, :]
        codes += tl.sum(w[:, None] * tl.load(row + D + d[None, :], mask=ours, other=0.0), 0)
        if WIDE > 0:
            ours = ok[:, None] & paged & (d < tl.minimum(channels, WIDE))[None, :]
            stored += tl.sum(w[:, None] * tl.load(row + 2 * D + d[None, :], mask=ours, other=0.0), 0)
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
    sets = 2 * dim + plan.wide
    part = torch.empty(batch, layout.heads, splits, rows, sets, dtype=torch.float32, device=q.device)
    stat = torch.empty(batch, layout.heads, splits, 2, rows, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, queries, dim, dtype=q.dtype, device=q.device)
    shape = dict(H=layout.heads, G=group, D=dim, WIDE=plan.wide, BR=rows, SETS=sets)
    _spectral_kernel[(batch * layout.heads, splits)](
        q, pages, counts, basis, plan.keys, plan.values, plan.order_k, k, v, seen, part, stat,
        queries, scaling * 1.4426950408889634, layout.page_bytes, pages.stride(0), k.shape[2], per_split, page_splits,
        splits, plan.keys.shape[1], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        T=layout.segment, BN=32, BD=64, DENSE=stretch, GROUPS=plan.groups, GAINS_K=plan.gains_k,
        GAINS_V=plan.gains_v, DOT=_DOT[q.dtype], num_warps=4, **shape,
    )  # fmt: skip
    _combine_kernel[(batch * layout.heads, group * queries)](
        part, stat, out, plan.values, plan.order_v, plan.turn, queries, page_splits, splits, BS=16, num_warps=4, **shape
    )  # fmt: skip
    return out
