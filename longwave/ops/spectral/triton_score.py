"""`_score_kernel`: probabilities of the tokens of pages with codes, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from longwave.ops.spectral import tables
from longwave.ops.spectral.triton_parts import _dense, _job, _near, _open, _wide
from longwave.ops.spectral.triton_products import (
    _finer,
    _narrow,
    _none,
    _operand,
    _product,
    _product_of_planes,
    _whole,
    _words,
)

CHUNK, K_TABLE = tl.constexpr(tables.CHUNK), tl.constexpr(tables.K_TABLE)
PIECE, VALUE_FIELDS = tl.constexpr(tables.PIECE), tl.constexpr(tables.VALUE_FIELDS)


@triton.jit
def _score(
    s, level, piece, count, page, sorted_q, iota,
    BITS: tl.constexpr, ABOVE: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Scores s [T, 8 or BR], as sums of BITS, plus those of `count` chunks of K's codes, planes of BITS and, above it,
    of ABOVE bits (0: none); level [CHUNK, BR] plus their zeros' part."""
    i, r = tl.arange(0, CHUNK), tl.arange(0, BR)
    STRIDE: tl.constexpr = T * (BITS + ABOVE) // 16
    for _ in range(count):
        data, scale_at = tl.multiple_of(tl.load(piece), T // 8), tl.load(piece + 1)
        span, rest = tl.load(piece + 2), tl.load(piece + 3)
        held, first = rest & 255, rest >> 8
        row = tl.minimum(i, held - 1)  # what is not there is the last again, times zero
        scales = (page + scale_at).to(tl.pointer_type(tl.float16))
        words = (page + data).to(tl.pointer_type(tl.int16))
        step, zero = tl.load(scales + row), tl.load(scales + span + row)
        q = tl.load(sorted_q + (first + row)[:, None] * BR + r[None, :])
        w = _words(words, row * STRIDE, BITS, T)  # last: it is waited for first
        if ABOVE > 0:
            w_high = _words(words + T * BITS // 16, row * STRIDE, ABOVE, T)
        level += q * tl.where(i < held, zero.to(tl.float32), 0.0)[:, None]
        x = _operand(q * tl.where(i < held, step.to(tl.float32), 0.0)[:, None], tl.float16)
        s = _product_of_planes(w, w_high, x, s, iota, T) if ABOVE > 0 else _product(w, x, s, iota, BITS, T)
        piece += PIECE
    return s, level, piece


@triton.jit(do_not_specialize=["tokens", "cap", "jobs", "dense_splits", "n", "key_fields"])
def _score_kernel(
    q_ptr, pages_ptr, counts_ptr, basis_ptr, iota_ptr, keys_ptr, values_ptr, costs_ptr, order_k_ptr, dense_k_ptr,
    dense_v_ptr, seen_ptr,
    near_ptr, sorted_ptr, far_ptr, mass_ptr, tops_ptr, dense_part_ptr, dense_stat_ptr,
    queries, scale, page_bytes, row_bytes, n, tokens, share, cap, jobs, dense_splits, key_fields,
    stride_qb, stride_qh, stride_qq, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BR: tl.constexpr,
    BD: tl.constexpr, STRETCH: tl.constexpr, K_WIDE: tl.constexpr, ALIGN: tl.constexpr, K_CODES: tl.constexpr,
    K_MOST: tl.constexpr, V_MOST: tl.constexpr, K_EIGHT: tl.constexpr, EVEN: tl.constexpr, RAISED: tl.constexpr,
    OWN: tl.constexpr, DOT: tl.constexpr, EARLY: tl.constexpr, EQUAL: tl.constexpr,
):  # fmt: skip
    """Probabilities of the tokens of some pages, relative to each page's maximum; or all of a stretch of dense tokens.

    mass float16 [B, H, N, T, BR], even tokens before odd ones; tops float32 [B, H, N, 2, BR] a page's maximum and sum
    (later its weight), far float32 [B, H, N, V_MOST, BR] mass times the basis. Written and read by one program alone:
    near float32 [B, H, N, K_MOST, BR], q times K's states; sorted float32 [B, programs, D, BR], q by K's order."""
    _open(EARLY)
    b, job = tl.program_id(0), tl.program_id(1) - dense_splits * H
    r, d = tl.arange(0, BR), tl.arange(0, D)
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
        # token i of a page where `_product` puts it
        token = tl.arange(0, T) % (T // 2) * 2 + tl.arange(0, T) // (T // 2)
        keys, order = keys_ptr + h * key_fields, order_k_ptr + h * D
        base = pages_ptr + b.to(tl.int64) * row_bytes
        line = (b * H + h).to(tl.int64) * n + first_page
        k_states = tl.load(keys)
        near = near_ptr + line * (K_MOST * BR)
        sorted_q = sorted_ptr + (b.to(tl.int64) * jobs + job) * (D * BR)
        if K_CODES:
            every = live[None, :] & (d >= 0)[:, None]
            mine = tl.load(q_row[None, :] + tl.load(order + d)[:, None], mask=every, other=0.0)
            tl.store(sorted_q + d[:, None] * BR + r[None, :], mine.to(tl.float32))
            tl.debug_barrier()
        if K_MOST > 0:
            _near(
                near, base, first_page, end_page, page_bytes, keys, order, q_row, live, scale,
                T, D, BR, K_MOST, K_EIGHT, EVEN, RAISED, OWN, DOT,
            )  # fmt: skip
        if K_WIDE > 0:
            cell = tl.arange(0, K_WIDE)
            k_wide, k_data, q_wide = _wide(keys, order, q_row, live, K_WIDE, ALIGN, DOT)
        page = base + first_page.to(tl.int64) * page_bytes
        if K_MOST + V_MOST > 0:
            row0 = tl.load(basis_ptr + token)
        iota = tl.load(iota_ptr + tl.arange(0, max(16, T // 8)))
        eight, four, three = tl.load(keys + 8), tl.load(keys + 9), tl.load(keys + 10)
        two, one = tl.load(keys + 11), tl.load(keys + 12)
        kind = tl.load(values_ptr + h * VALUE_FIELDS + 5)
        bare = (kind == 0) & (eight + four + three + two + one == 0) & (k_states <= 1)
        if K_WIDE > 0:
            bare = bare & (k_wide == 0)
        if K_MOST + V_MOST > 0:
            bare = bare & (tl.max(row0, 0) == tl.min(row0, 0))
        if bare:  # all tokens of a page score alike
            i = tl.arange(0, 16)
            for start in range(first_page, end_page, 16):
                at = line + start - first_page + i[:, None]
                held = (start + i < end_page)[:, None] & (r >= 0)[None, :]
                s = tl.zeros([16, BR], tl.float32)
                if K_MOST > 0:
                    scored = held & (r * 0 + k_states > 0)[None, :]
                    a = tl.load(near_ptr + at * (K_MOST * BR) + r[None, :], mask=scored, other=0.0)
                    s += a * (tl.max(row0, 0) * scale)
                tl.store(tops_ptr + at * (2 * BR) + r[None, :], s, mask=held)
                tl.store(tops_ptr + at * (2 * BR) + BR + r[None, :], s * 0 + T, mask=held)
                if V_MOST > 0:
                    for m in tl.static_range(V_MOST):
                        whole = tl.sum(tl.load(basis_ptr + m * T + token), 0)
                        tl.store(far_ptr + (at * V_MOST + m) * BR + r[None, :], s * 0 + whole, mask=held)
            end_page = first_page
        for _ in range(first_page, end_page):
            s = tl.zeros([T, max(8, BR)], tl.float32)
            if K_WIDE > 0:
                own = (page + k_data).to(tl.pointer_type(OWN))
                k_held = (cell < k_wide)[None, :] & (token >= 0)[:, None]
                k_own = tl.load(own + token[:, None] * k_wide + cell[None, :], mask=k_held, other=0.0)
                s = tl.dot(k_own.to(DOT), q_wide, s)
            s = _narrow(s, BR)
            if K_CODES:
                sums = _none(8, T, BR)
                level = tl.zeros([CHUNK, BR], tl.float32)
                piece = keys + K_TABLE
                sums, level, piece = _score(sums, level, piece, eight, page, sorted_q, iota, 8, 0, CHUNK, T, BR)
                sums = _finer(sums, 8, 4, T)
                sums, level, piece = _score(sums, level, piece, four, page, sorted_q, iota, 4, 0, CHUNK, T, BR)
                sums = _finer(sums, 4, 2, T)
                sums, level, piece = _score(sums, level, piece, three, page, sorted_q, iota, 2, 1, CHUNK, T, BR)
                sums, level, piece = _score(sums, level, piece, two, page, sorted_q, iota, 2, 0, CHUNK, T, BR)
                sums, level, piece = _score(sums, level, piece, one, page, sorted_q, iota, 1, 0, CHUNK, T, BR)
                s += _whole(sums, 2, T, BR) + tl.sum(level, 0)[None, :]
            if K_MOST > 0:
                for m in tl.static_range(K_MOST):
                    a = tl.load(near + m * BR + r, mask=r * 0 + k_states > m, other=0.0)
                    row = row0 if m == 0 else tl.load(basis_ptr + m * T + token)
                    s += row[:, None] * a[None, :]
                near += K_MOST * BR
            top = tl.max(s, 0) * scale
            p = tl.exp2(s * scale - top[None, :])
            tl.store(tops_ptr + line * 2 * BR + r, top)
            tl.store(tops_ptr + (line * 2 + 1) * BR + r, tl.sum(p, 0))
            if kind > 0:
                tl.store(mass_ptr + (line * T + tl.arange(0, T)[:, None]) * BR + r[None, :], p.to(tl.float16))
            if V_MOST > 0:
                for m in tl.static_range(V_MOST):
                    row = row0 if m == 0 else tl.load(basis_ptr + m * T + token)
                    far = tl.sum(p * row[:, None], 0)
                    tl.store(far_ptr + (line * V_MOST + m) * BR + r, far)
            page += page_bytes
            line += 1
