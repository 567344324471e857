"""`_merge_kernel` and `_combine_kernel`: what programs have found made one answer, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from longwave.ops.spectral import tables
from longwave.ops.spectral.triton_parts import _close, _open, _share

VALUE_FIELDS = tl.constexpr(tables.VALUE_FIELDS)


@triton.jit(do_not_specialize=["cap", "jobs", "groups"])
def _merge_kernel(
    part_ptr, stat_ptr, to_part_ptr, to_stat_ptr, costs_ptr, share, cap, jobs, groups,
    H: tl.constexpr, BR: tl.constexpr, SETS: tl.constexpr, COLUMNS: tl.constexpr, BS: tl.constexpr,
    EARLY: tl.constexpr, EQUAL: tl.constexpr,
):  # fmt: skip
    """BS splits of one query row made one, so that `_combine_kernel` has few: part [B, H, groups, BR, SETS]."""
    _open(EARLY)
    pid, r, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, c = tl.arange(0, BS), tl.arange(0, COLUMNS)
    first, splits = _share(costs_ptr, share, cap, jobs, pid % H, H, EQUAL)
    _close(EARLY)
    ok = group * BS + i < splits
    line = (pid // H).to(tl.int64) * jobs + first + group * BS + i
    tops = tl.load(stat_ptr + line * 2 * BR + r, mask=ok, other=float("-inf"))
    top = tl.max(tops, 0)
    w = tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(w * tl.load(stat_ptr + (line * 2 + 1) * BR + r, mask=ok, other=0.0), 0)
    # a split without tokens has written nothing to rely on, and a head not all columns: those are not read later
    held = (ok & (w > 0))[:, None] & (c < SETS)[None, :]
    part = tl.load(part_ptr + (line * BR + r)[:, None] * SETS + c[None, :], mask=held, other=0.0)
    to = pid.to(tl.int64) * groups + group
    tl.store(to_part_ptr + (to * BR + r) * SETS + c, tl.sum(part * w[:, None], 0), mask=c < SETS)
    tl.store(to_stat_ptr + to * 2 * BR + r, top)
    tl.store(to_stat_ptr + (to * 2 + 1) * BR + r, total)


@triton.jit
def _weigh(top, tops):
    """The maximum [1] of top [1] and tops [BS], and what sums at each of them are to be multiplied by."""
    new = tl.maximum(top, tl.max(tops, 0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(top - safe), tl.exp2(tops - safe)


@triton.jit(do_not_specialize=["cap", "jobs", "groups", "dense_splits"])
def _combine_kernel(
    part_ptr, stat_ptr, dense_part_ptr, dense_stat_ptr, out_ptr, values_ptr, order_v_ptr, costs_ptr,
    queries, share, cap, jobs, groups, dense_splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V_WIDE: tl.constexpr, BR: tl.constexpr, SETS: tl.constexpr,
    BS: tl.constexpr, V_CODES: tl.constexpr, V_MOST: tl.constexpr, ROOT: tl.constexpr, BITS_OF_D: tl.constexpr,
    MERGED: tl.constexpr, EARLY: tl.constexpr, EQUAL: tl.constexpr,
):  # fmt: skip
    """Splits weighed and added for one query row; out [B, H * G, queries, D], contiguous."""
    pid, r = tl.program_id(0), tl.program_id(1)
    b, h = pid // H, pid % H
    d, i = tl.arange(0, D), tl.arange(0, BS)
    values = values_ptr + h * VALUE_FIELDS
    width, first = tl.load(values + 1), tl.load(values + 2)
    channels, turned = tl.load(values + 6), tl.load(values + 10)
    order = tl.load(order_v_ptr + h * D + d)
    if MERGED:
        line, splits = pid.to(tl.int64) * groups, groups
    else:
        start, splits = _share(costs_ptr, share, cap, jobs, h, H, EQUAL)
        line = b.to(tl.int64) * jobs + start
    stat_ptr += line * (2 * BR) + r
    dense_stat_ptr += pid.to(tl.int64) * dense_splits * (2 * BR) + r
    part_ptr += (line * BR + r) * SETS
    dense_part_ptr += (pid.to(tl.int64) * dense_splits * BR + r) * D
    _close(EARLY)
    top, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([BS], tl.float32)
    stored, codes = tl.zeros([BS, D], tl.float32), tl.zeros([BS, D], tl.float32)
    for start in range(0, splits, BS):
        ok = start + i < splits
        at = stat_ptr + (start + i) * (2 * BR)
        tops = tl.load(at, mask=ok, other=float("-inf"))
        sums = tl.load(at + BR, mask=ok, other=0.0)
        row = part_ptr + (start + i)[:, None] * (BR * SETS)
        if V_CODES:
            place = d % 2 * (D // 2) + d // 2  # where `_product` puts column d
            coded = tl.load(row + place[None, :], mask=ok[:, None] & (d >= 0)[None, :], other=0.0)
        if V_WIDE > 0:
            whole = ok[:, None] & (d < tl.minimum(channels, V_WIDE))[None, :]
            values_of = tl.load(row + V_CODES * D + d[None, :], mask=whole, other=0.0)
        if V_MOST > 0:
            ours = ok[:, None] & ((d >= first) & (d < first + width))[None, :]
            smooth = tl.load(row + (V_CODES * D + V_WIDE) + (d - first)[None, :], mask=ours, other=0.0)
        new, old, w = _weigh(top, tops)
        total = total * old + w * sums
        some = (w > 0)[:, None]  # a split without tokens has written nothing to rely on
        stored = stored * old[:, None]
        if V_CODES:
            codes = codes * old[:, None] + tl.where(some, w[:, None] * coded, 0.0)
        if V_WIDE > 0:
            stored += tl.where(some, w[:, None] * values_of, 0.0)
        if V_MOST > 0:
            stored += tl.where(some, w[:, None] * smooth, 0.0)
        top = new
    for start in range(0, dense_splits, BS):
        ok = start + i < dense_splits
        at = dense_stat_ptr + (start + i) * (2 * BR)
        tops = tl.load(at, mask=ok, other=float("-inf"))
        sums = tl.load(at + BR, mask=ok, other=0.0)
        row = dense_part_ptr + (start + i)[:, None] * (BR * D)
        own = tl.load(row + order[None, :], mask=ok[:, None] & (d >= 0)[None, :], other=0.0)
        new, old, w = _weigh(top, tops)
        total = total * old + w * sums
        codes = codes * old[:, None]
        stored = stored * old[:, None] + tl.where((w > 0)[:, None], w[:, None] * own, 0.0)
        top = new
    out = tl.sum(stored, 0)
    if V_CODES:
        mixed = tl.sum(codes, 0)
        if turned > 0:  # by the Hadamard table of ops/codes.py, one bit of the columns at a time
            step = 1
            for _ in tl.static_range(BITS_OF_D):
                mixed = tl.gather(mixed, d ^ step, 0) + tl.where((d & step) == 0, mixed, -mixed)
                step = step * 2
            mixed = mixed * ROOT
        out += mixed
    mass = tl.sum(total, 0)
    out = out / tl.where(mass > 0, mass, 1.0)
    to = out_ptr + ((b * H * G + h * G + r // queries).to(tl.int64) * queries + r % queries) * D
    tl.store(to + order, out)
