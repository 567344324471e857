"""What the attention kernels share, in Triton: programs, a head's states and 16-bit channels, dense tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longwave.ops.spectral import tables
from longwave.ops.spectral.triton_products import _narrow, _operand, _pairs, _parts

# Probabilities grow by this where they meet V's scales: float16 would lose small ones. Scales beyond 1023 overflow.
LIFT = tl.constexpr(64.0)
RAISE = tl.constexpr(tables.RAISE)


@triton.jit
def _open(EARLY: tl.constexpr):
    """Let the next launch begin, up to its `_close`."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def _close(EARLY: tl.constexpr):
    """From here on everything that the launch before has written is there."""
    if EARLY:
        gdc_wait()


# In scalars: all threads go the same way, and the compiler knows it.
@triton.jit
def _programs(costs, h, share, cap):
    """How many programs head h has: see `_shares`."""
    return tl.minimum(tl.maximum((tl.load(costs + h).to(tl.float32) * share).to(tl.int32), 1), cap)


@triton.jit
def _share(costs, share, cap, jobs, h, H: tl.constexpr, EQUAL: tl.constexpr):
    """The first program of head h and how many it has."""
    if EQUAL:
        own = jobs // H
        first = h * own
    else:
        own = _programs(costs, h, share, cap)
        first = 0
        for i in tl.static_range(H - 1):
            first += _programs(costs, i, share, cap) * (i < h)
    return first, own


@triton.jit
def _job(costs, counts, b, job, share, cap, jobs, H: tl.constexpr, EQUAL: tl.constexpr):
    """The head that program `job` of row b works for, and its pages: from, up to."""
    count = tl.load(counts + b)
    if EQUAL:
        own = jobs // H
        h = job // own
        first = h * own
    else:
        h, first, own = 0, 0, _programs(costs, 0, share, cap)
        start = own
        for i in tl.static_range(1, H):
            programs = _programs(costs, i, share, cap)
            if job >= start:
                h, first, own = i, start, programs
            start += programs
    return h, count * (job - first) // own, count * (job - first + 1) // own


@triton.jit
def _states(
    base, page, page_bytes, data, gain_at, m, width, held, D: tl.constexpr, EIGHT: tl.constexpr, OWN: tl.constexpr
):
    """State m [n] of the pages `page` [n]: numbers [n, D] as stored, and the factors [n] that go before them."""
    SIZE: tl.constexpr = 1 if EIGHT else 2
    d, page = tl.arange(0, D), page.to(tl.int64)
    first = (base + data).to(tl.pointer_type(tl.int8 if EIGHT else OWN))
    at = page * (page_bytes // SIZE) + m * width
    number = tl.load(first + at[:, None] + d[None, :], mask=held[:, None] & (d < width)[None, :], other=0)
    if EIGHT:
        gains = (base + gain_at).to(tl.pointer_type(tl.float16))
        gain = tl.load(gains + page * (page_bytes // 2) + m, mask=held, other=0.0).to(tl.float32)
    else:
        gain = tl.where(held, 1.0, 0.0)
    return number, gain


@triton.jit
def _near(
    near, base, first_page, end_page, page_bytes, keys, order, q_row, live, scale,
    T: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, MOST: tl.constexpr, EIGHT: tl.constexpr, EVEN: tl.constexpr,
    RAISED: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """q times K's states of the pages of a program: float32 [pages, MOST, BR] at `near`. Where the one state is a
    merged head's, with its bias: the basis is T ** -0.5 there, and what comes of it is multiplied by `scale`."""
    r, d, i = tl.arange(0, BR), tl.arange(0, D), tl.arange(0, 16)
    states = tl.load(keys)
    if states > 0:
        width, smooth = tl.multiple_of(tl.load(keys + 1), EVEN), tl.load(keys + 2)
        data, gain_at = tl.multiple_of(tl.load(keys + 3), 2 * EVEN), tl.load(keys + 4)
        ok = d < width
        which = tl.load(order + smooth + d, mask=ok, other=0)
        q = _pairs(tl.load(q_row[None, :] + which[:, None], mask=live[None, :] & ok[:, None], other=0.0).to(DOT))
        for start in range(0, (end_page - first_page) * MOST, 16):
            of, m = first_page + (start + i) // MOST, (start + i) % MOST
            held = (of < end_page) & (m < states)
            number, gain = _states(base, of, page_bytes, data, gain_at, m, width, held, D, EIGHT, OWN)
            a = _narrow(tl.dot(number.to(DOT), q), BR) * gain[:, None]
            if RAISED:
                raised_at = tl.load(keys + RAISE)
                if raised_at >= 0:
                    raised = (base + raised_at).to(tl.pointer_type(tl.float16))
                    b = tl.load(raised + of.to(tl.int64) * (page_bytes // 2), mask=held, other=0.0).to(tl.float32)
                    a += (b * (1.4426950408889634 * T**0.5 / scale))[:, None]
            tl.store(near + (start + i)[:, None] * BR + r[None, :], a, mask=held[:, None] & (r >= 0)[None, :])
        tl.debug_barrier()


@triton.jit
def _wide(keys, order, q_row, live, K_WIDE: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr):
    """A head's run of 16-bit channels of K: how many, their byte, and q of them [K_WIDE, 8 or BR]."""
    cell = tl.arange(0, K_WIDE)
    width, data = tl.multiple_of(tl.load(keys + 5), ALIGN), tl.multiple_of(tl.load(keys + 6), 16)
    which = tl.load(order + tl.load(keys + 7) + cell, mask=cell < width, other=0)
    held = (cell < width)[:, None] & live[None, :]
    return width, data, _pairs(tl.load(q_row[None, :] + which[:, None], mask=held, other=0.0).to(DOT))


@triton.jit
def _far(
    part, far, tops, top, base, first_page, end_page, page_bytes, values, live,
    D: tl.constexpr, BR: tl.constexpr, MOST: tl.constexpr, PARTS: tl.constexpr, LINE: tl.constexpr, EIGHT: tl.constexpr,
    EVEN: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What V's states of the pages of a program add, stored at part [D, BR]: far float32 [pages, PARTS, MOST, BR] is p
    times the basis at the maximum tops [pages, PARTS, LINE], BR of them read; `top` [BR] is that of the split."""
    r, d, i = tl.arange(0, BR), tl.arange(0, D), tl.arange(0, 16)
    states, width = tl.load(values), tl.multiple_of(tl.load(values + 1), EVEN)
    data, gain_at = tl.multiple_of(tl.load(values + 3), 2 * EVEN), tl.load(values + 4)
    out = tl.zeros([D, max(8, BR)], tl.float32)
    for start in range(0, (end_page - first_page) * (PARTS * MOST), 16):
        of, m = first_page + (start + i) // (PARTS * MOST), (start + i) % MOST
        held = (of < end_page) & (m < states)
        number, gain = _states(base, of, page_bytes, data, gain_at, m, width, held, D, EIGHT, OWN)
        ok = held[:, None] & (r >= 0)[None, :]
        then = tl.load(tops + ((start + i) // MOST)[:, None] * LINE + r[None, :], mask=ok, other=float("-inf"))
        mass = tl.load(far + (start + i)[:, None] * BR + r[None, :], mask=ok, other=0.0)
        mass = mass * tl.exp2(then - top[None, :]) * (gain * LIFT)[:, None]
        high, low = _parts(mass, OWN)
        number = tl.trans(number.to(DOT))
        out = tl.dot(number, _pairs(high.to(DOT)), out)
        out = tl.dot(number, _pairs(low.to(DOT)), out)
    tl.store(part + d[:, None], _narrow(out, BR) * (1 / LIFT), mask=live[None, :] & (d < width)[:, None])


@triton.jit
def _dense(
    q_row, live, dense_k_ptr, dense_v_ptr, seen_ptr, part_ptr, stat_ptr, pid, split, splits, queries, scale, tokens,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STRETCH: tl.constexpr, OWN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """A stretch of the dense tokens: part float32 [B, H, splits, BR, D], stat float32 [B, H, splits, 2, BR]."""
    b, h = pid // H, pid % H
    r, d = tl.arange(0, BR), tl.arange(0, D)
    q = _pairs(tl.load(q_row[None, :] + d[:, None], mask=live[None, :] & (d >= 0)[:, None], other=0.0).to(DOT))
    seen = tl.load(seen_ptr + b * queries + r % queries, mask=live, other=0)
    out = tl.zeros([D, max(8, BR)], tl.float32)
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    k_row = dense_k_ptr + b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    v_row = dense_v_ptr + b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
    first = split * STRETCH
    end = tl.minimum(tl.minimum(first + STRETCH, tokens), tl.max(seen, 0))
    for start in range(first, end, BD):
        i = start + tl.arange(0, BD)
        held = (i < end)[:, None] & (d >= 0)[None, :]
        k = tl.load(k_row + i[:, None] * stride_kt + d[None, :], mask=held, other=0.0).to(DOT)
        v = tl.load(v_row + i[:, None] * stride_vt + d[None, :], mask=held, other=0.0).to(DOT)
        s = _narrow(tl.dot(k, q), BR) * scale
        s = tl.where(i[:, None] < seen[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[None, :])
        old = tl.exp2(top - safe)
        out = tl.dot(tl.trans(v), _operand(p, OWN).to(DOT), out * _pairs(old[None, :]))
        total = total * old + tl.sum(p, 0)
        top = new
    line = pid.to(tl.int64) * splits + split
    out = _narrow(out, BR)
    tl.store(part_ptr + (line * BR + r[None, :]) * D + d[:, None], out, mask=live[None, :] & (d >= 0)[:, None])
    tl.store(stat_ptr + line * 2 * BR + r, top)
    tl.store(stat_ptr + (line * 2 + 1) * BR + r, total)
