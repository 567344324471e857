"""`_mix_kernel`: probabilities times V of pages with codes, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from longwave.ops.spectral import tables
from longwave.ops.spectral.triton_parts import LIFT, _close, _far, _job, _open
from longwave.ops.spectral.triton_products import _narrow, _none, _operand, _product, _product_of_planes, _whole, _words

VALUE_FIELDS = tl.constexpr(tables.VALUE_FIELDS)


@triton.jit
def _mix(
    mass, weights, page, count, page_bytes, v_data, v_scales, v_zeros, iota,
    BITS: tl.constexpr, ABOVE: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BR: tl.constexpr,
    GROUPS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Probabilities times V's codes of `count` pages: float32 [D, BR], rows in the order of `_product`.

    Codes are planes of BITS and, above it, of ABOVE bits (0: none). weights: what a page's `mass` counts, times LIFT,
    as is the answer.
    """
    i, r, d = tl.arange(0, BT), tl.arange(0, BR), tl.arange(0, D)
    STRIDE: tl.constexpr = D * (BITS + ABOVE) // 16
    out = _none(BITS, D, BR)
    spread = tl.zeros([D, BR], tl.float32)
    flat = tl.zeros([BT, BR], tl.float32)
    STEPS: tl.constexpr = T // BT
    for step in range(count * STEPS):
        of, row = step // STEPS, step % STEPS * BT + i
        at = page + of * tl.cast(page_bytes, tl.int64)
        scales = (at + v_scales).to(tl.pointer_type(tl.float16))
        zeros = (at + tl.multiple_of(tl.maximum(v_zeros, 0), 16)).to(tl.pointer_type(tl.float16))
        words = (at + v_data).to(tl.pointer_type(tl.int16))
        p = tl.load(mass + of * (T * BR) + (row % 2 * (T // 2) + row // 2)[:, None] * BR + r[None, :])
        weight = tl.load(weights + of * (2 * BR) + r)
        size = tl.load(scales + row * GROUPS).to(tl.float32)
        zero = tl.load(zeros + row * GROUPS, mask=row * 0 + v_zeros >= 0, other=0.0)
        w = _words(words, row * STRIDE, BITS, D)  # last: it is waited for first
        if ABOVE > 0:
            w_high = _words(words + D * BITS // 16, row * STRIDE, ABOVE, D)
        p = p.to(tl.float32) * weight[None, :]
        for g in tl.static_range(GROUPS):
            if g > 0:
                size = tl.load(scales + row * GROUPS + g).to(tl.float32)
                zero = tl.load(zeros + row * GROUPS + g, mask=row * 0 + v_zeros >= 0, other=0.0)
            middle = size * (((1 << (BITS + ABOVE)) - 1) * -0.5)
            least = tl.where(v_zeros >= 0, zero.to(tl.float32), middle)
            x = _operand(p * size[:, None], tl.float16)
            if GROUPS == 1:
                flat += p * least[:, None]
                if ABOVE > 0:
                    out = _product_of_planes(w, w_high, x, out, iota, D)
                else:
                    out = _product(w, x, out, iota, BITS, D)
            else:  # rows whose channel belongs to this scale
                more = _none(BITS, D, BR)
                if ABOVE > 0:
                    more = _product_of_planes(w, w_high, x, more, iota, D)
                else:
                    more = _product(w, x, more, iota, BITS, D)
                more = _whole(more, BITS, D, BR) + tl.sum(p * least[:, None], 0)[None, :]
                mine = (d % (D // 2) * 2 // (D // GROUPS) == g)[:, None]
                spread += tl.where(mine, more, 0.0)
    if GROUPS == 1:
        spread = _whole(out, BITS, D, BR) + tl.sum(flat, 0)[None, :]
    return spread


@triton.jit(do_not_specialize=["cap", "jobs", "n"])
def _mix_kernel(
    pages_ptr, counts_ptr, iota_ptr, values_ptr, costs_ptr, far_ptr, mass_ptr, tops_ptr, part_ptr, stat_ptr,
    queries, page_bytes, row_bytes, n, share, cap, jobs,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BR: tl.constexpr,
    BT: tl.constexpr, V_WIDE: tl.constexpr, ALIGN: tl.constexpr, GROUPS: tl.constexpr, V_CODES: tl.constexpr,
    V_MOST: tl.constexpr, V_EIGHT: tl.constexpr, EVEN: tl.constexpr, SETS: tl.constexpr, OWN: tl.constexpr,
    DOT: tl.constexpr, EARLY: tl.constexpr, EQUAL: tl.constexpr,
):  # fmt: skip
    """What `_score_kernel` found times V of some pages: part float32 [B, programs, BR, SETS], unnormalised (codes D,
    values V_WIDE, states D), stat float32 [B, programs, 2, BR] maximum and sum."""
    _open(EARLY)
    b, job = tl.program_id(0), tl.program_id(1)
    h, first_page, end_page = _job(costs_ptr, counts_ptr, b, job, share, cap, jobs, H, EQUAL)
    r, d = tl.arange(0, BR), tl.arange(0, D)
    live = r < G * queries
    values = values_ptr + h * VALUE_FIELDS
    kind, channels, v_data = tl.load(values + 5), tl.load(values + 6), tl.load(values + 7)
    v_scales, v_zeros = tl.multiple_of(tl.load(values + 8), 16), tl.load(values + 9)
    base = pages_ptr + b.to(tl.int64) * row_bytes
    count = end_page - first_page
    line = (b * H + h).to(tl.int64) * n + first_page
    mass, tops = mass_ptr + line * (T * BR), tops_ptr + line * (2 * BR)
    page = base + first_page.to(tl.int64) * page_bytes
    i = tl.arange(0, 16)
    _close(EARLY)
    peak = tl.full([BR], float("-inf"), tl.float32)
    for start in range(0, count, 16):
        held = (start + i < count)[:, None] & (r >= 0)[None, :]
        then = tl.load(tops + (start + i)[:, None] * (2 * BR) + r[None, :], mask=held, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(then, 0))
    total = tl.zeros([BR], tl.float32)
    for start in range(0, count, 16):
        held = (start + i < count)[:, None] & (r >= 0)[None, :]
        at = tops + (start + i)[:, None] * (2 * BR) + r[None, :]
        w = tl.exp2(tl.load(at, mask=held, other=float("-inf")) - peak[None, :])
        total += tl.sum(tl.load(at + BR, mask=held, other=0.0) * w, 0)
        tl.store(at + BR, w * LIFT, mask=held)  # where the sum was, which is not needed again
    tl.debug_barrier()
    place = b.to(tl.int64) * jobs + job
    part = part_ptr + (place * BR + r[None, :]) * SETS
    store = live[None, :] & (d >= 0)[:, None]
    if V_CODES:
        iota = tl.load(iota_ptr + tl.arange(0, max(16, D // 8)))
        codes = tl.multiple_of(v_data, D // 8)
        if kind == 8:
            out = _mix(
                mass, tops + BR, page, count, page_bytes, codes, v_scales, v_zeros, iota,
                8, 0, T, D, BR, GROUPS, BT // 2,
            )  # fmt: skip
        elif kind == 4:
            out = _mix(
                mass, tops + BR, page, count, page_bytes, codes, v_scales, v_zeros, iota,
                4, 0, T, D, BR, GROUPS, BT,
            )  # fmt: skip
        elif kind == 3:
            out = _mix(
                mass, tops + BR, page, count, page_bytes, codes, v_scales, v_zeros, iota,
                2, 1, T, D, BR, GROUPS, BT,
            )  # fmt: skip
        elif kind == 2:
            out = _mix(
                mass, tops + BR, page, count, page_bytes, codes, v_scales, v_zeros, iota,
                2, 0, T, D, BR, GROUPS, BT,
            )  # fmt: skip
        elif kind == 1:
            out = _mix(
                mass, tops + BR, page, count, page_bytes, codes, v_scales, v_zeros, iota,
                1, 0, T, D, BR, GROUPS, BT,
            )  # fmt: skip
        else:
            out = tl.zeros([D, BR], tl.float32)
        tl.store(part + d[:, None], out * (1 / LIFT), mask=store)
    if V_WIDE > 0:
        wide = tl.multiple_of(tl.where(kind == 16, channels, 0), ALIGN)
        t, c = tl.arange(0, BT), tl.arange(0, V_WIDE)
        wide_out = tl.zeros([V_WIDE, max(8, BR)], tl.float32)
        for step in range(0, count * (T // BT)):
            of, row = first_page * 0 + step // (T // BT), step % (T // BT) * BT + t
            own = (page + of.to(tl.int64) * page_bytes + tl.multiple_of(v_data, 16)).to(tl.pointer_type(OWN))
            inside = (c < wide)[None, :] & (row >= 0)[:, None]
            v = tl.load(own + row[:, None] * wide + c[None, :], mask=inside, other=0.0)
            row_at = mass + of * (T * BR) + (row % 2 * (T // 2) + row // 2)[:, None] * BR + r[None, :]
            p = tl.load(row_at).to(tl.float32) * tl.load(tops + of * (2 * BR) + BR + r)[None, :]
            wide_out = tl.dot(tl.trans(v.to(DOT)), _operand(p, OWN).to(DOT), wide_out)
        tl.store(
            part + V_CODES * D + c[:, None], _narrow(wide_out, BR) * (1 / LIFT), mask=live[None, :] & (c >= 0)[:, None]
        )
    if V_MOST > 0:
        far = far_ptr + line * (V_MOST * BR)
        _far(
            part + (V_CODES * D + V_WIDE), far, tops, peak, base, first_page, end_page, page_bytes, values, live,
            D, BR, V_MOST, 1, 2 * BR, V_EIGHT, EVEN, OWN, DOT,
        )  # fmt: skip
    stat = stat_ptr + place * 2 * BR + r
    tl.store(stat, peak)
    tl.store(stat + BR, total)
