"""`_attend_kernel`: scores and mix in one over pages without codes, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from longwave.ops.spectral import tables
from longwave.ops.spectral.triton_parts import _dense, _far, _job, _near, _open, _wide
from longwave.ops.spectral.triton_products import _narrow, _operand, _pairs, _parts

VALUE_FIELDS = tl.constexpr(tables.VALUE_FIELDS)


@triton.jit
def _tile(
    basis, row, MOST: tl.constexpr, LIFT: tl.constexpr, TWICE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """The basis at tokens `row` for the tensor cores [4 ROWS, tokens], times LIFT: its high parts TWICE times or once,
    its low parts from row 2 ROWS on."""
    i = tl.arange(0, 4 * ROWS)
    m, times = i % ROWS, (i // ROWS)[:, None]
    e = tl.load(basis + m[:, None] * T + row[None, :], mask=(m < MOST)[:, None], other=0.0)
    high, low = _parts(e * LIFT, KIND)
    return tl.where(times < TWICE, high, tl.where(times == 2, low, 0.0))


@triton.jit(do_not_specialize=["tokens", "cap", "jobs", "dense_splits", "n", "key_fields"])
def _attend_kernel(
    q_ptr, pages_ptr, counts_ptr, basis_ptr, keys_ptr, values_ptr, costs_ptr, order_k_ptr, dense_k_ptr, dense_v_ptr,
    seen_ptr, near_ptr, far_ptr, tops_ptr, part_ptr, stat_ptr, dense_part_ptr, dense_stat_ptr,
    queries, scale, page_bytes, row_bytes, n, tokens, share, cap, jobs, dense_splits, key_fields,
    stride_qb, stride_qh, stride_qq, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, STRETCH: tl.constexpr, K_WIDE: tl.constexpr, V_WIDE: tl.constexpr, ALIGN: tl.constexpr,
    K_MOST: tl.constexpr, V_MOST: tl.constexpr, K_EIGHT: tl.constexpr, V_EIGHT: tl.constexpr, EVEN: tl.constexpr,
    RAISED: tl.constexpr, SETS: tl.constexpr, STAGES: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
    EARLY: tl.constexpr, EQUAL: tl.constexpr,
):  # fmt: skip
    """Both in one where there are no codes: part and stat as `_mix_kernel` makes them."""
    _open(EARLY)
    b, job = tl.program_id(0), tl.program_id(1) - dense_splits * H
    r, t = tl.arange(0, BR), tl.arange(0, BT)
    live = r < G * queries
    q_row = q_ptr + b.to(tl.int64) * stride_qb + r // queries * stride_qh + r % queries * stride_qq
    if job < 0:  # first, so that none of them is left over for the end
        h, split = tl.program_id(1) % H, tl.program_id(1) // H
        _dense(
            q_row + h * G * stride_qh, live, dense_k_ptr, dense_v_ptr, seen_ptr, dense_part_ptr, dense_stat_ptr,
            b * H + h, split, dense_splits, queries, scale, tokens,
            stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, H, D, BR, BD, STRETCH, OWN, DOT,
        )  # fmt: skip
    else:
        h, first_page, end_page = _job(costs_ptr, counts_ptr, b, job, share, cap, jobs, H, EQUAL)
        q_row += h * G * stride_qh
        PARTS: tl.constexpr = T // BT
        keys, values, order = keys_ptr + h * key_fields, values_ptr + h * VALUE_FIELDS, order_k_ptr + h * D
        base = pages_ptr + b.to(tl.int64) * row_bytes
        line, place = (b * H + h).to(tl.int64) * n + first_page, b.to(tl.int64) * jobs + job
        near = near_ptr + line * (K_MOST * BR)
        far = far_ptr + line * (PARTS * V_MOST * BR)
        tops = tops_ptr + line * (PARTS * BR)
        k_states = tl.load(keys)
        if K_MOST > 0:
            _near(
                near, base, first_page, end_page, page_bytes, keys, order, q_row, live, scale,
                T, D, BR, K_MOST, K_EIGHT, EVEN, RAISED, OWN, DOT,
            )  # fmt: skip
        if K_WIDE > 0:
            cell = tl.arange(0, K_WIDE)
            k_wide, k_data, q_wide = _wide(keys, order, q_row, live, K_WIDE, ALIGN, DOT)
        if V_WIDE > 0:
            c = tl.arange(0, V_WIDE)
            v_wide, v_data = tl.multiple_of(tl.load(values + 6), ALIGN), tl.multiple_of(tl.load(values + 7), 16)
            out = tl.zeros([V_WIDE, max(8, BR)], tl.float32)
        top = tl.full([BR], float("-inf"), tl.float32)
        total = tl.zeros([BR], tl.float32)
        ROWS: tl.constexpr = tl.constexpr(max(4, triton.next_power_of_2(max(K_MOST, V_MOST))))
        m, times = tl.arange(0, 4 * ROWS) % ROWS, tl.arange(0, 4 * ROWS) // ROWS
        k_basis, v_basis = (), ()
        for sub in tl.static_range(PARTS):
            k_basis = k_basis + (tl.trans(_tile(basis_ptr, sub * BT + t, K_MOST, 16.0, 2, T, ROWS, tl.float16)),)  # type: ignore[assignment]  # noqa: RUF005
            v_basis = v_basis + (_tile(basis_ptr, sub * BT + t, V_MOST, 1.0, 1, T, ROWS, OWN).to(DOT),)  # type: ignore[assignment]  # noqa: RUF005
        for j in tl.range(0, end_page - first_page, num_stages=STAGES):
            of = first_page * 0 + j
            page = base + (first_page + of).to(tl.int64) * page_bytes
            for sub in tl.static_range(PARTS):
                row = sub * BT + t
                s = tl.zeros([BT, max(8, BR)], tl.float32)
                if K_WIDE > 0:
                    own = (page + k_data).to(tl.pointer_type(OWN))
                    k_held = (cell < k_wide)[None, :] & (row >= 0)[:, None]
                    k = tl.load(own + row[:, None] * k_wide + cell[None, :], mask=k_held, other=0.0)
                    s = tl.dot(k.to(DOT), q_wide, s)
                if K_MOST > 0:
                    a = tl.load(near + (of * K_MOST + m)[:, None] * BR + r, mask=(m < k_states)[:, None], other=0.0)
                    high, low = _parts(a * (1 / 16), tl.float16)
                    s = tl.dot(k_basis[sub], _pairs(tl.where(times[:, None] == 1, low, high)), s)
                s = _narrow(s, BR)
                new = tl.maximum(top, tl.max(s, 0) * scale)
                p = tl.exp2(s * scale - new[None, :])
                old = tl.exp2(top - new)
                total = total * old + tl.sum(p, 0)
                top = new
                p = _operand(p, OWN).to(DOT)
                if V_MOST > 0:
                    tl.store(tops + (of * PARTS + sub) * BR + r, new)
                    mixed = tl.reshape(_narrow(tl.dot(v_basis[sub], p), BR), 4, ROWS, BR)
                    at = far + ((of * PARTS + sub) * V_MOST + tl.arange(0, ROWS)[:, None]) * BR + r[None, :]
                    tl.store(at, tl.sum(mixed, 0), mask=(tl.arange(0, ROWS) < V_MOST)[:, None] & (r >= 0)[None, :])
                if V_WIDE > 0:  # read the other way round: only so does the compiler ask for it ahead of time
                    own = (page + v_data).to(tl.pointer_type(OWN))
                    v_held = (c < v_wide)[:, None] & (row >= 0)[None, :]
                    v = tl.load(own + row[None, :] * v_wide + c[:, None], mask=v_held, other=0.0)
                    out = tl.dot(v.to(DOT), p, out * _pairs(old[None, :]))
        part = part_ptr + (place * BR + r[None, :]) * SETS
        if V_WIDE > 0:
            tl.store(part + c[:, None], _narrow(out, BR), mask=live[None, :] & (c >= 0)[:, None])
        if V_MOST > 0:
            tl.debug_barrier()
            _far(
                part + V_WIDE, far, tops, top, base, first_page, end_page, page_bytes, values, live,
                D, BR, V_MOST, PARTS, BR, V_EIGHT, EVEN, OWN, DOT,
            )  # fmt: skip
        tl.store(stat_ptr + place * 2 * BR + r, top)
        tl.store(stat_ptr + (place * 2 + 1) * BR + r, total)
