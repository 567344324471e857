"""Attend over sinks, pages, open segment and window on a GPU: the twin of reference.py, in Triton.

Nothing is rebuilt. States meet q before the softmax and p after it; scales of K go into q, scales of V into p, codes go
to the tensor cores as they lie in memory, tokens (of K) or channels (of V) as rows, the few queries as columns. A
program is one warp with one row of the batch, one KV head and some pages, or a stretch of the dense tokens:

    codes       `_score_kernel`  probabilities of a page relative to its own maximum
                `_mix_kernel`    these times V
    none        `_attend_kernel` both in one, online
    then        `_merge_kernel`  where there are many splits, `_combine_kernel`: adds up, undoes V's rotation once

docs/kernels.md has the figures; tables.py says what a head stores.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longwave.ops.spectral import tables
from longwave.ops.spectral.tables import Plan, fits, plan

__all__ = ["ROWS", "attend", "fits", "plan"]

ROWS = 64  # query rows (group x queries) up to which this is used: beyond, products dominate and the reference does
CHUNK, K_TABLE = tl.constexpr(tables.CHUNK), tl.constexpr(tables.K_TABLE)
PIECE, VALUE_FIELDS = tl.constexpr(tables.PIECE), tl.constexpr(tables.VALUE_FIELDS)
# the interpreter multiplies the bits of bfloat16, not the numbers
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_OWN = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_DOT = {kind: tl.float32 if INTERPRETED.value else own for kind, own in _OWN.items()}
BLOCK = 128  # tokens of a step where there are no codes
MIX_STEP = 32  # tokens of a step of V's codes
STRETCH, DENSE_STEP = 64, 16  # dense tokens of a program, and of a step
MERGE = 16  # splits made one, or more of very many
LEAST = 4  # pages of a program where there are no codes, and pages for two such programs a processor
REGISTERS = 128  # of a thread where there are codes
STAGES = (3, 2)  # pages under way where there are no codes: while all programs fit at once, and else
# Probabilities grow by this where they meet V's scales: float16 would lose small ones. Scales beyond 1023 overflow.
LIFT = tl.constexpr(64.0)


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
def _parts(x, kind: tl.constexpr):
    """x float32 as a sum of two numbers of 16 bits."""
    high = x.to(kind)
    return high, (x - high.to(tl.float32)).to(kind)


@triton.jit
def _stack(a, b):
    """Rows of a, then rows of b. Costs nothing: accumulators keep their place in the registers."""
    return tl.reshape(tl.permute(tl.join(a, b), 2, 0, 1), 2 * a.shape[0], a.shape[1])


@triton.jit
def _halves(x):
    """The inverse: the first rows and the others."""
    return tl.split(tl.permute(tl.reshape(x, 2, x.shape[0] // 2, x.shape[1]), 1, 2, 0))


@triton.jit
def _pairs(x):
    """x [n, BR] for the tensor cores, which take 8 columns at least: each of 4 twice. Costs nothing."""
    if x.shape[1] == 4:
        x = tl.reshape(tl.broadcast_to(x[:, :, None], x.shape[0], 4, 2), x.shape[0], 8)
    return x


@triton.jit
def _operand(x, KIND: tl.constexpr):
    """float32 x [n, BR] in 16 bits, as `_pairs`.

    By an instruction that the compiler does not see through: it would do what led to x once more for each copy.
    """
    if INTERPRETED:
        x = x.to(KIND)
    elif tl.float16 == KIND:
        asm: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
        x = tl.inline_asm_elementwise(asm, "=r,r,r", [x], tl.float16, is_pure=False, pack=2)
    else:
        wide: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        x = tl.inline_asm_elementwise(wide, "=r,r,r", [x], tl.bfloat16, is_pure=False, pack=2)
    return _pairs(x)


@triton.jit
def _narrow(x, BR: tl.constexpr):
    """One of each pair of columns."""
    if BR == 4:
        x, _ = tl.split(tl.reshape(x, x.shape[0], 4, 2))
    return x


@triton.jit
def _pick(w, mask, SHIFT: tl.constexpr):
    """float16 of (w >> SHIFT) & mask in each word, left where it lies among the lowest 8 bits: a subnormal, exact.

    Two words an instruction, which the compiler does not find by itself.
    """
    if INTERPRETED:
        x = (w >> SHIFT) & mask
    elif SHIFT == 0:
        x = tl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [w, mask], tl.int16, is_pure=True, pack=2)
    else:
        asm: tl.constexpr = "{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, $2; }"
        x = tl.inline_asm_elementwise(asm, "=r,r,r", [w, mask], tl.int16, is_pure=True, pack=2)
    return x.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _pick_both(w, mask, high, high_mask):
    """The same from two planes of the same codes."""
    if INTERPRETED:
        x = (w & mask) | (high & high_mask)
    else:  # (w & mask) | t
        asm: tl.constexpr = "{ .reg .b32 t; and.b32 t, $3, $4; lop3.b32 $0, $1, $2, t, 0xEA; }"
        args = [w, mask, high, high_mask]
        x = tl.inline_asm_elementwise(asm, "=r,r,r,r,r", args, tl.int16, is_pure=True, pack=2)
    return x.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _raised(w, by):
    """Words shifted left; what comes in from below is no code's."""
    if INTERPRETED:
        return w << by
    else:
        asm: tl.constexpr = "shf.l.wrap.b32 $0, 0, $1, $2;"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [w, by], tl.int16, is_pure=True, pack=2)


@triton.jit
def _shifted(w, by):
    """Words shifted right; what comes in from above is no code's. By hand for the same reason."""
    if INTERPRETED:
        return w >> by
    else:
        asm: tl.constexpr = "shf.r.wrap.b32 $0, $1, 0, $2;"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [w, by], tl.int16, is_pure=True, pack=2)


@triton.jit
def _words(base, at, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Words int16 [rows of a product, rows] of packed rows of COLUMNS codes; `at` [rows] says where a row starts."""
    WORDS: tl.constexpr = COLUMNS * BITS // 16
    i = tl.arange(0, max(16, COLUMNS * max(BITS, 2) // 16)) % WORDS
    return tl.load(base + i[:, None] + at[None, :])


@triton.jit
def _none(BITS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr):
    """Sums of `_product`, empty: a tile for each code of a byte, even columns first."""
    ROWS: tl.constexpr = max(16, COLUMNS * max(BITS, 2) // 16)
    out = ()
    for _ in tl.static_range(COLUMNS // ROWS):
        out = out + (tl.zeros([ROWS, max(8, BR)], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return out


@triton.jit
def _product(w, x, out, iota, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """out, tiles [rows, 8 or BR], plus packed rows of COLUMNS codes, transposed, times x float16 [rows, 8 or BR].

    w: their `_words`, some of them again, for their next codes, where a product has more rows. Packing (ops/codes.py)
    puts code c into byte c mod (COLUMNS * BITS / 8), above the codes before it; a word is two bytes. So row i of
    the tiles, one below the other, is column 2 i of the codes while i < COLUMNS / 2, and column 2 i + 1 - COLUMNS from
    there on: the same for every width. A code is taken where it lies; `_whole` makes up for that.
    iota: 0, 1, 2 ... int16, loaded: what is loaded may be brought to the tensor cores' layout early.
    """
    WORDS: tl.constexpr = COLUMNS * BITS // 16
    ROWS: tl.constexpr = w.shape[0]
    if ROWS > WORDS:
        by = iota // WORDS * BITS
        w = _shifted(w, tl.broadcast_to(by[:, None], w.shape))
    COUNT: tl.constexpr = COLUMNS // (2 * ROWS)
    STEP: tl.constexpr = ROWS // WORDS * BITS
    first = tl.full(w.shape, (1 << BITS) - 1, tl.int16)
    new = ()
    mask = first
    for tile in tl.static_range(COUNT):
        new = new + (tl.dot(_pick(w, mask, 0), x, out[tile]),)  # type: ignore[assignment]  # noqa: RUF005
        mask = mask << STEP
    mask = first
    for tile in tl.static_range(COUNT):
        new = new + (tl.dot(_pick(w, mask, 8), x, out[COUNT + tile]),)  # type: ignore[assignment]  # noqa: RUF005
        mask = mask << STEP
    return new


@triton.jit
def _product_of_planes(w, high, x, out, iota, COLUMNS: tl.constexpr):
    """The same for codes of 3 bits, whose upper bits are a plane of their own: `high`, one bit a code."""
    ROWS: tl.constexpr = w.shape[0]
    WORDS: tl.constexpr = COLUMNS * 2 // 16
    tl.static_assert(high.shape[0] == ROWS)
    COUNT: tl.constexpr = COLUMNS // (2 * ROWS)
    again = iota // (COLUMNS // 16)  # rows of `high` with the word's next code
    if ROWS > WORDS:
        twice = iota // WORDS * 2
        w = _shifted(w, tl.broadcast_to(twice[:, None], w.shape))
    new = ()
    for half in tl.static_range(2):
        low = w
        if half == 0:
            if ROWS * 16 // COLUMNS <= 2:  # at most once
                upper = _raised(high, tl.broadcast_to((2 - again)[:, None], w.shape))
            else:
                upper = _shifted(_raised(high, tl.full(w.shape, 2, tl.int16)), tl.broadcast_to(again[:, None], w.shape))
        else:
            low = _shifted(w, tl.full(w.shape, 8, tl.int16))
            upper = _shifted(high, tl.broadcast_to((6 + again)[:, None], w.shape))
        mask, high_mask = tl.full(w.shape, 3, tl.int16), tl.full(w.shape, 4, tl.int16)
        for tile in tl.static_range(COUNT):
            picked = _pick_both(low, mask, upper, high_mask)
            new = new + (tl.dot(picked, x, out[half * COUNT + tile]),)  # type: ignore[assignment]  # noqa: RUF005
            mask, high_mask = mask << 2 * ROWS // WORDS, high_mask << 2 * ROWS // WORDS
    return new


@triton.jit
def _finer(out, FROM: tl.constexpr, TO: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of FROM bits as sums of TO bits, whose tiles are smaller and count otherwise."""
    ROWS: tl.constexpr = max(16, COLUMNS * max(FROM, 2) // 16)
    SMALL: tl.constexpr = max(16, COLUMNS * max(TO, 2) // 16)
    new = ()
    for tile in tl.static_range(COLUMNS // ROWS):
        if SMALL == ROWS:
            new = new + (out[tile],)  # type: ignore[assignment]  # noqa: RUF005
        else:  # twice as many: 8 bits to 4, 4 to 2
            low, high = _halves(out[tile])
            new = new + (low, high * (1 << (16 * SMALL // COLUMNS)))  # type: ignore[assignment]  # noqa: RUF005
    return new


@triton.jit
def _whole(out, BITS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr):
    """The sums [COLUMNS, BR] as they are meant."""
    ROWS: tl.constexpr = max(16, COLUMNS * max(BITS, 2) // 16)
    COUNT: tl.constexpr = COLUMNS // (2 * ROWS)
    STEP: tl.constexpr = 16 * ROWS // COLUMNS
    tiles = ()
    for half in tl.static_range(2):
        power = 1 << 24
        for tile in tl.static_range(COUNT):
            tiles = tiles + (_narrow(out[half * COUNT + tile], BR) * power,)  # type: ignore[assignment]  # noqa: RUF005
            power = power >> STEP
    if COUNT == 1:
        return _stack(tiles[0], tiles[1])  # type: ignore[misc]
    elif COUNT == 2:
        return _stack(_stack(tiles[0], tiles[1]), _stack(tiles[2], tiles[3]))  # type: ignore[misc]
    else:
        low = _stack(_stack(tiles[0], tiles[1]), _stack(tiles[2], tiles[3]))  # type: ignore[misc]
        high = _stack(_stack(tiles[4], tiles[5]), _stack(tiles[6], tiles[7]))  # type: ignore[misc]
        return _stack(low, high)


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


@triton.jit
def _near(
    near, base, first_page, end_page, page_bytes, keys, order, q_row, live,
    D: tl.constexpr, BR: tl.constexpr, MOST: tl.constexpr, EIGHT: tl.constexpr, EVEN: tl.constexpr,
    OWN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """q times K's states of the pages of a program: float32 [pages, MOST, BR] at `near`."""
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


@triton.jit(do_not_specialize=["tokens", "cap", "jobs", "dense_splits", "n", "key_fields"])
def _score_kernel(
    q_ptr, pages_ptr, counts_ptr, basis_ptr, iota_ptr, keys_ptr, values_ptr, costs_ptr, order_k_ptr, dense_k_ptr,
    dense_v_ptr, seen_ptr,
    near_ptr, sorted_ptr, far_ptr, mass_ptr, tops_ptr, dense_part_ptr, dense_stat_ptr,
    queries, scale, page_bytes, row_bytes, n, tokens, share, cap, jobs, dense_splits, key_fields,
    stride_qb, stride_qh, stride_qq, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BR: tl.constexpr,
    BD: tl.constexpr, STRETCH: tl.constexpr, K_WIDE: tl.constexpr, ALIGN: tl.constexpr, K_CODES: tl.constexpr,
    K_MOST: tl.constexpr, V_MOST: tl.constexpr, K_EIGHT: tl.constexpr, EVEN: tl.constexpr, OWN: tl.constexpr,
    DOT: tl.constexpr, EARLY: tl.constexpr, EQUAL: tl.constexpr,
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
                near, base, first_page, end_page, page_bytes, keys, order, q_row, live,
                D, BR, K_MOST, K_EIGHT, EVEN, OWN, DOT,
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
    SETS: tl.constexpr, STAGES: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
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
                near, base, first_page, end_page, page_bytes, keys, order, q_row, live,
                D, BR, K_MOST, K_EIGHT, EVEN, OWN, DOT,
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


def _resources(
    rows: int, dim: int, segment: int, coded: bool, stages: int, traits: dict[str, int | bool]
) -> tuple[dict, int, int]:
    """Options of a launch, pages under way where there are no codes, and programs a multiprocessor runs at once.

    One warp waits for nobody; more where its registers would not do. Half of them let twice as many warps wait.
    """
    wide = max(traits["K_WIDE"], traits["V_WIDE"])
    warps = 4 if rows > 32 or wide > 32 or dim > 128 else 2 if rows > 16 or segment > 128 else 1
    options = dict(num_warps=warps, num_stages=1)
    if coded and warps == 1 and rows <= 8:
        return options | dict(maxnreg=REGISTERS), 1, 65536 // (32 * REGISTERS)
    page = 2 * segment * (traits["K_WIDE"] + traits["V_WIDE"])
    most = max(4, triton.next_power_of_2(max(traits["K_MOST"], traits["V_MOST"])))
    stages = stages if page <= 1 << 14 else 2 if page <= 1 << 15 else 1
    held = page * (stages - 1) + 16 * segment * most + 4096  # shared memory
    return options, stages, max(1, min(8 // warps, (227 << 10) // held))


@lru_cache(1024)  # asked by every layer of every step, and answered anew once in a segment
def _shares(costs: tuple[int, ...], n: int, most: float, least: int) -> tuple[float, int, tuple[int, ...]]:
    """How the programs of a row, about `most`, are shared among its heads, by what a page of each costs.

    n: pages of the row; a program has `least` or more. Programs a cost, the most that a head may have, and how many
    each has. Once around: a few programs left over for a second time would take as long as all the others.
    """
    share, cap = np.float32(most / sum(costs)), -(-n // least)
    # to the last bit as `_programs` has it
    own = tuple(min(max(int(np.float32(cost) * share), 1), cap) for cost in costs)
    if len(set(own)) == 1 and n:  # kernels are told so: no more programs than the longest of them needs
        own = (-(-n // -(-n // own[0])),) * len(own)
    return float(share), cap, own


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
    layout, traits = plan.layout, plan.traits
    coded = bool(traits["CODED"])
    batch, heads, queries, dim = q.shape
    if {q.dtype, k.dtype, v.dtype} != {layout.dtype}:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the pages were made of {layout.dtype}")
    group = heads // layout.heads
    rows = max(4, triton.next_power_of_2(group * queries))
    if rows > ROWS:
        raise ValueError(f"{group * queries} query rows a KV head; this kernel takes {ROWS}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    n, pairs, segment = pages.shape[1], batch * layout.heads, layout.segment
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    for stages in STAGES:
        resources, stages, slots = _resources(rows, dim, segment, coded, stages, traits)
        if coded or pairs * -(-n // LEAST) <= slots * processors:
            break
    least = LEAST if not coded and pairs * n >= 2 * LEAST * processors else 1
    dense_splits = -(-k.shape[2] // STRETCH)
    most = slots * processors / batch  # programs of a row
    beside = most * n / max(1, n + dense_splits / 2)  # where dense tokens take their part: two stretches are a page
    score, mix = (_shares(costs, n, room, least) for costs, room in zip(plan.costs, (beside, most), strict=True))
    if not coded:
        mix = score
    equal = [len(set(own)) == 1 for *_, own in (score, mix)]
    score_share, mix_share = ((share, cap, sum(own)) for share, cap, own in (score, mix))
    splits, jobs = max(mix[-1]), mix_share[-1]
    k_most, v_most, wide = traits["K_MOST"], traits["V_MOST"], traits["V_WIDE"]
    step = min(segment, BLOCK)  # tokens of a step where there are no codes
    sets = max(1, dim * traits["V_CODES"] + wide + dim * (v_most > 0))

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(pairs, *shape, dtype=dtype, device=q.device)

    dense_part, dense_stat = scratch(dense_splits, rows, dim), scratch(dense_splits, 2, rows)
    near = scratch(n, k_most, rows)
    out = torch.empty(batch, heads, queries, dim, dtype=q.dtype, device=q.device)
    shape = dict(H=layout.heads, G=group, D=dim, BR=rows)
    # Hopper and later: a launch begins while the one before ends
    early = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (9, 0)
    follows = dict(EARLY=early, EQUAL=equal[1]) | (dict(launch_pdl=True) if early else {})
    kinds = dict(OWN=_OWN[q.dtype], DOT=_DOT[q.dtype], **resources)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    dense = dict(BD=DENSE_STEP, STRETCH=STRETCH)
    bytes_of = (layout.page_bytes, pages.stride(0))
    scale = scaling * 1.4426950408889634

    def traited(*names: str) -> dict[str, int | bool]:
        return {name: traits[name] for name in names}

    part = torch.empty(batch, jobs, rows, sets, dtype=torch.float32, device=q.device)
    stat = torch.empty(batch, jobs, 2, rows, dtype=torch.float32, device=q.device)
    if coded:
        far, tops = scratch(n, v_most, rows), scratch(n, 2, rows)
        mass = scratch(n * bool(traits["V_CODES"] or wide), segment, rows, dtype=torch.float16)
        ordered = torch.empty(batch, score_share[-1] * traits["K_CODES"], dim, rows, device=q.device)
        _score_kernel[(batch, dense_splits * layout.heads + score_share[-1])](
            q, pages, counts, basis, plan.iota, plan.keys, plan.values, plan.cost_k, plan.order_k, k, v, seen,
            near, ordered, far, mass, tops, dense_part, dense_stat,
            queries, scale, *bytes_of, n, k.shape[2], *score_share, dense_splits,
            plan.keys.shape[1], *strides, EARLY=early, EQUAL=equal[0], T=segment, **shape, **dense, **kinds,
            **traited("K_WIDE", "ALIGN", "K_CODES", "K_MOST", "V_MOST", "K_EIGHT", "EVEN"),
        )  # fmt: skip
        if n:
            _mix_kernel[(batch, jobs)](
                pages, counts, plan.iota, plan.values, plan.cost_v, far, mass, tops, part, stat,
                queries, *bytes_of, n, *mix_share,
                T=segment, BT=min(MIX_STEP, segment), SETS=sets, **shape, **kinds, **follows,
                **traited("V_WIDE", "ALIGN", "GROUPS", "V_CODES", "V_MOST", "V_EIGHT", "EVEN"),
            )  # fmt: skip
    else:
        parts = segment // step
        far, tops = scratch(n, parts, v_most, rows), scratch(n, parts, rows)
        _attend_kernel[(batch, dense_splits * layout.heads + jobs)](
            q, pages, counts, basis, plan.keys, plan.values, plan.cost_v, plan.order_k, k, v, seen,
            near, far, tops, part, stat, dense_part, dense_stat,
            queries, scale, *bytes_of, n, k.shape[2], *mix_share, dense_splits, plan.keys.shape[1], *strides,
            EARLY=early, EQUAL=equal[1], T=segment, BT=step, SETS=sets, STAGES=stages, **shape, **dense, **kinds,
            **traited("K_WIDE", "V_WIDE", "ALIGN", "K_MOST", "V_MOST", "K_EIGHT", "V_EIGHT", "EVEN"),
        )  # fmt: skip
    groups = 0
    if splits > 2 * MERGE:
        merge = max(MERGE, triton.next_power_of_2(-(-splits // 16)))  # combined are 16 at once
        groups = -(-splits // merge)
        many = (part, stat)
        part, stat = scratch(groups, rows, sets), scratch(groups, 2, rows)
        _merge_kernel[(pairs, group * queries, groups)](
            *many, part, stat, plan.cost_v, *mix_share, groups, H=layout.heads,
            BR=rows, SETS=sets, COLUMNS=triton.next_power_of_2(sets), BS=merge, num_warps=4, **follows,
        )  # fmt: skip
    _combine_kernel[(pairs, group * queries)](
        part, stat, dense_part, dense_stat, out, plan.values, plan.order_v, plan.cost_v, queries,
        *mix_share, groups, dense_splits, SETS=sets, BS=16, V_WIDE=wide, V_CODES=traits["V_CODES"], V_MOST=v_most,
        ROOT=dim**-0.5, BITS_OF_D=dim.bit_length() - 1, MERGED=groups > 0, **shape, num_warps=8, **follows,
    )  # fmt: skip
    return out
