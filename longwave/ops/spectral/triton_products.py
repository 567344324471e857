"""Products of packed codes, in Triton: codes go to the tensor cores as they lie, tokens (of K) or channels (of V) as
rows, the few queries as columns."""

from __future__ import annotations

import triton
import triton.language as tl

# the interpreter multiplies the bits of bfloat16, not the numbers
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


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
