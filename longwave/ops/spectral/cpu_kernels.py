"""What cpu.py compiles with numba: tasks that attend over pages, and that make them dense again.

All in one file: numba keeps what it has compiled until the file of a task changes, and would not notice when helpers or
numbers from another file do. Tasks get addresses, so their caller must have checked every size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic

BLOCK = 32  # matrix rows unpacked at once: with 128 columns they fill half of a small first-level cache
CHUNK = 4  # pages of a task
LANES = 8  # codes unpacked together

# kinds of numbers; codes are their number of bits
FLOAT32, FLOAT16, BFLOAT16, INT8 = 100, 101, 102, 103
# input along the rows and output along the columns, or the other way round; for states, the input along the columns
# and then through the basis table, or through the table and then along the rows; or one number for all the output
BY_ROWS, BY_COLUMNS, THEN_TABLE, TABLE_FIRST, RAISE = range(5)
# the columns of a table of matrices
HEAD, PRODUCT, KIND, FROM, TO, LENGTH, WIDTH, DATA, STRIDE, SCALE, ZEROS, SHARED, SOURCE, TARGET = range(14)
FIELDS = 14
# what a task is told, as int64: sizes, strides of the output, and addresses of tensors, contiguous but for the output
KEYS, BATCH, PAGES, PAGE_BYTES, TOKENS, DIM, HEADS, QUERIES, MATRICES, SETS, SCALES, STATES = range(12)
ROW_STRIDE, HEAD_STRIDE, TOKEN_STRIDE = range(12, 15)
AT_MATRICES, AT_ORDER, AT_ROTATION, AT_PAGES, AT_X, AT_TABLE, AT_PARTS, AT_OUT = range(15, 23)

U = np.uintp
compiler: Any = intrinsic  # builds LLVM's code itself; its types mean nothing to mypy
# without "nnan" and "ninf": an infinity in a page comes out as in the reference
OPTIONS: dict[str, Any] = dict(error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
# Signed indices cost a test for -1, and slices a reference count; either keeps LLVM from vectorising. So inner
# loops have flat arrays and unsigned indices.


@compiler
def _float(typing: Any, bits: Any) -> Any:
    """The float32 that 32 bits stand for."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), build


@compiler
def _pointer(typing: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), build


@compiler
def _call(typing: Any, entry: Any, task: Any, told: Any) -> Any:
    """Call the kernel at an address: linked in, LLVM would compile all of it again for each of its callers."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = context.get_value_type(types.int64)
        kernel = ir.FunctionType(ir.VoidType(), [number, number])
        builder.call(builder.inttoptr(args[0], kernel.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


def _unpacker(add: bool) -> Any:
    """An instruction for LANES codes: rows of them are too short for loops that LLVM vectorises by itself."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, real = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(ir.FloatType(), LANES)

        def spread(x: Any) -> Any:
            first = builder.insert_element(ir.Constant(number, ir.Undefined), x, ir.IntType(32)(0))
            return builder.shuffle_vector(first, first, ir.Constant(number, [0] * LANES))

        source, shift, mask, lift, out, to = args
        held = builder.inttoptr(source, ir.VectorType(ir.IntType(8), LANES).as_pointer())
        codes = builder.lshr(builder.zext(builder.load(held, align=1), number), spread(shift))
        codes = builder.shl(builder.and_(codes, spread(mask)), spread(lift))
        values = builder.sitofp(codes, real)
        flat = context.make_array(signature.args[4])(context, builder, out).data
        place = builder.bitcast(builder.gep(flat, [to]), real.as_pointer())
        if add:
            values = builder.fadd(values, builder.load(place, align=4))
        builder.store(values, place, align=4)
        return context.get_dummy_value()

    @compiler
    def unpack(typing: Any, source: Any, shift: Any, mask: Any, lift: Any, out: Any, to: Any) -> Any:
        """out[to + i] = (byte i from the address `source` on >> shift & mask) << lift, or that is added."""
        small = types.int32
        return types.void(types.int64, small, small, small, types.float32[::1], types.uint64), build

    return unpack


_set_codes, _add_codes = _unpacker(False), _unpacker(True)


def _blended() -> tuple[Any, Any]:
    """Instructions for LANES numbers: Hadamard's sums and differences among them, and with another LANES."""

    def at(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
        flat = context.make_array(kind)(context, builder, array).data
        return builder.bitcast(builder.gep(flat, [index]), ir.VectorType(ir.FloatType(), LANES).as_pointer())

    @compiler
    def within(typing: Any, shrink: Any, x: Any, index: Any) -> Any:
        """x[index + i], times `shrink`, as their LANES sums with signs."""

        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            real, number = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
            place = at(context, builder, signature.args[1], *args[1:])
            values = builder.load(place, align=4)
            single = builder.insert_element(ir.Constant(real, ir.Undefined), args[0], ir.IntType(32)(0))
            factors = builder.shuffle_vector(single, single, ir.Constant(number, [0] * LANES))
            step = 1
            values = builder.fmul(values, factors)
            while step < LANES:
                other = builder.shuffle_vector(values, values, ir.Constant(number, [i ^ step for i in range(LANES)]))
                signs = ir.Constant(real, [-1.0 if i & step else 1.0 for i in range(LANES)])
                values = builder.fadd(builder.fmul(values, signs), other)
                step *= 2
            builder.store(values, place, align=4)
            return context.get_dummy_value()

        return types.void(types.float32, types.float32[::1], types.uint64), build

    @compiler
    def between(typing: Any, x: Any, first: Any, second: Any) -> Any:
        """Sums of x[first + i] and x[second + i] in place of the former, differences of the latter."""

        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            places = [at(context, builder, signature.args[0], args[0], index) for index in args[1:]]
            a, b = (builder.load(place, align=4) for place in places)
            builder.store(builder.fadd(a, b), places[0], align=4)
            builder.store(builder.fsub(a, b), places[1], align=4)
            return context.get_dummy_value()

        return types.void(types.float32[::1], types.uint64, types.uint64), build

    return within, between


_hadamard, _butterfly = _blended()

# the lengths of these arrays are not looked at


@njit(inline="always")
def _floats(address: int) -> np.ndarray:
    return carray(_pointer(address), (1,), np.float32)


@njit(inline="always")
def _numbers(address: int) -> np.ndarray:
    return carray(_pointer(address), (1,), np.int64)


@njit(inline="always")
def _half(x: int) -> Any:
    """float16 bits as a float32 (LLVM's own conversion does not link on every machine)."""
    bits = np.uint32(x)
    moved = ((bits & np.uint32(0x7FFF)) << np.uint32(13)) | ((bits & np.uint32(0x8000)) << np.uint32(16))
    if bits & np.uint32(0x7C00) == np.uint32(0x7C00):  # infinity or NaN
        moved |= np.uint32(0x7F800000)
    return _float(np.uint32(moved)) * np.float32(2.0**112)


@njit(inline="always")
def _unpack(
    page: int, kind: int, start: int, stride: int, rows: int, columns: int, out: np.ndarray, pitch: int
) -> None:
    """Rows of a page at an address, the first at byte `start`, to float32 out[row * pitch + column]."""
    n, width = U(columns), 2 if kind == 3 else kind
    size, top, mask = U(columns * width // 8), U(columns // 8), np.int32((1 << width) - 1)
    for row in range(rows):
        to = U(row * pitch)
        here = _pointer(page + start + row * stride)
        if kind == FLOAT32:
            floats = carray(here, (1,), np.float32)
            for i in range(n):
                out[to + i] = floats[i]
        elif kind == FLOAT16:
            halves = carray(here, (1,), np.uint16)
            for i in range(n):
                out[to + i] = _half(halves[i])
        elif kind == BFLOAT16:
            halves = carray(here, (1,), np.uint16)
            for i in range(n):
                out[to + i] = _float(np.uint32(np.uint32(halves[i]) << np.uint32(16)))
        elif kind == INT8:
            signed = carray(here, (1,), np.int8)
            for i in range(n):
                out[to + i] = np.float32(signed[i])
        else:  # codes, packed as in ops.codes
            at, codes = page + start + row * stride, carray(here, (1,), np.uint8)
            whole = size - size % U(LANES)
            for s in range(8 // width):
                part, shift = to + U(s) * size, np.int32(s * width)
                for i in range(U(0), whole, U(LANES)):
                    _set_codes(at + np.int64(i), shift, mask, np.int32(0), out, part + i)
                for i in range(whole, size):
                    out[part + i] = np.float32(np.int32((np.int32(codes[i]) >> shift) & mask))
            if kind == 3:
                whole = top - top % U(LANES)
                for s in range(8):
                    part, shift = to + U(s) * top, np.int32(s)
                    for i in range(U(0), whole, U(LANES)):
                        _add_codes(at + np.int64(size + i), shift, np.int32(1), np.int32(2), out, part + i)
                    for i in range(whole, top):
                        high = np.int32((np.int32(codes[size + i]) >> shift) & np.int32(1))
                        out[part + i] += np.float32(4) * np.float32(high)


@njit(inline="always")
def _scales(address: int, zeros: int, kind: int, length: int, groups: int, out: np.ndarray) -> None:
    """A matrix's scales at an address, [rows, groups] float16, and zeros: out [2, groups, rows]. zeros: whether these
    are stored, after the scales; else codes are around 0."""
    held, count = carray(_pointer(address), (1,), np.uint16), length * groups
    for g in range(groups * (1 + zeros)):
        s, half = U(g * length), U(g // groups * count + g % groups)
        for i in range(U(length)):
            out[s + i] = _half(held[half + i * U(groups)])
    if not zeros:
        centre = np.float32((1 << kind) - 1) * np.float32(-0.5) if kind <= 8 else np.float32(0)
        for i in range(U(count)):
            out[U(count) + i] = centre * out[i]


@njit(inline="always")
def _with_rows(
    r: int,
    weights: np.ndarray,
    rows: np.ndarray,
    top: int,
    pitch: int,
    m: int,
    n: int,
    out: np.ndarray,
    to: int,
    leap: int,
) -> None:
    """out[to + a * leap + i] += sum over j < m of weights[a * BLOCK + j] * rows[top + j * pitch + i]."""
    step = U(pitch)
    for a in range(r):
        o = U(to + a * leap)
        for k in range(0, m - 7, 8):  # eight rows share the reading and writing of the sum
            w, r0 = U(a * BLOCK + k), U(top + k * pitch)
            w0, w1, w2, w3 = weights[w], weights[w + U(1)], weights[w + U(2)], weights[w + U(3)]
            w4, w5, w6, w7 = weights[w + U(4)], weights[w + U(5)], weights[w + U(6)], weights[w + U(7)]
            r1, r2, r3, r4 = r0 + step, r0 + U(2) * step, r0 + U(3) * step, r0 + U(4) * step
            r5, r6, r7 = r0 + U(5) * step, r0 + U(6) * step, r0 + U(7) * step
            for i in range(U(n)):
                low = w0 * rows[r0 + i] + w1 * rows[r1 + i] + w2 * rows[r2 + i] + w3 * rows[r3 + i]
                high = w4 * rows[r4 + i] + w5 * rows[r5 + i] + w6 * rows[r6 + i] + w7 * rows[r7 + i]
                out[o + i] += low + high
        for k in range(m - m % 8, m):
            w0, r0 = weights[U(a * BLOCK + k)], U(top + k * pitch)
            for i in range(U(n)):
                out[o + i] += w0 * rows[r0 + i]


@njit(inline="always")
def _with_columns(
    r: int,
    x: np.ndarray,
    at: int,
    leap: int,
    rows: np.ndarray,
    top: int,
    pitch: int,
    m: int,
    n: int,
    out: np.ndarray,
) -> None:
    """out[a * BLOCK + j] = sum over i < n of x[at + a * leap + i] * rows[top + j * pitch + i], for j < m."""
    zero, step = np.float32(0), U(pitch)
    for a in range(r):
        o = U(at + a * leap)
        for k in range(0, m - 3, 4):
            w, r0 = U(a * BLOCK + k), U(top + k * pitch)
            r1, r2, r3 = r0 + step, r0 + U(2) * step, r0 + U(3) * step
            d0, d1, d2, d3 = zero, zero, zero, zero
            for i in range(U(n)):
                d0 += x[o + i] * rows[r0 + i]
                d1 += x[o + i] * rows[r1 + i]
                d2 += x[o + i] * rows[r2 + i]
                d3 += x[o + i] * rows[r3 + i]
            out[w], out[w + U(1)], out[w + U(2)], out[w + U(3)] = d0, d1, d2, d3
        for k in range(m - m % 4, m):
            r0, d0 = U(top + k * pitch), zero
            for i in range(U(n)):
                d0 += x[o + i] * rows[r0 + i]
            out[U(a * BLOCK + k)] = d0


@njit(inline="always")
def _gather(
    order: np.ndarray,
    spread: np.ndarray,
    h: int,
    r: int,
    d: int,
    q: np.ndarray,
    at: int,
    out: np.ndarray,
    turned: bool,
) -> None:
    """A row's q [H, R, D] at `at` with each head's channels as stored, and after it the same rotated: out."""
    for a in range(h * r):
        for c in range(d):
            out[U(a * d + c)] = q[U(at + a * d + order[U(a // r * d + c)])]
        if turned:
            to = U((h * r + a) * d)
            for c in range(U(d)):
                out[to + c] = np.float32(0)
            for c in range(d):
                weight, row = out[U(a * d + c)], U(c * d)
                for j in range(U(d)):
                    out[to + j] += weight * spread[row + j]


@njit(inline="always")
def _finish(
    order: np.ndarray,
    spread: np.ndarray,
    h: int,
    r: int,
    d: int,
    parts: np.ndarray,
    chunks: int,
    sets: int,
    b: int,
    out: np.ndarray,
) -> None:
    """Sum parts [B, chunks, sets, H, R, D] over chunks, rotate the second set back, bring channels home: out."""
    size = sets * h * r * d
    for row in range(b):
        first = row * chunks * size
        for chunk in range(1, chunks):
            more = U(first + chunk * size)
            for k in range(U(size)):
                parts[U(first) + k] += parts[more + k]
        for a in range(h * r):
            turned = U(first + (h * r + a) * d)
            for c in range(d):
                value, line = parts[U(first + a * d + c)], U(c * d)
                if sets > 1:
                    for j in range(U(d)):
                        value += parts[turned + j] * spread[line + j]
                out[U((row * h * r + a) * d + order[U(a // r * d + c)])] = value


def attend(task: int, told: int) -> None:
    """Task 0 .. B * chunks - 1: CHUNK pages of a row. K: their scores, to `out` [B, H, R, N * T]. V: their share of
    the output, to `parts` [B, chunks, sets, H, R, D]. Task -1: from the parts to `out` [B, H, R, D]."""
    facts = _numbers(told)
    keys, b, n, t, d = facts[KEYS], facts[BATCH], facts[PAGES], facts[TOKENS], facts[DIM]
    h, r = facts[HEADS], facts[QUERIES]
    sets, chunks, pitch = facts[SETS], (n + CHUNK - 1) // CHUNK, max(t, d)
    matrices, order, spread = _numbers(facts[AT_MATRICES]), _numbers(facts[AT_ORDER]), _floats(facts[AT_ROTATION])
    x, table = _floats(facts[AT_X]), _floats(facts[AT_TABLE])
    parts, out = _floats(facts[AT_PARTS]), _floats(facts[AT_OUT])
    if task < 0:
        _finish(order, spread, h, r, d, parts, chunks, sets, b, out)
        return
    row, chunk = task // chunks, task % chunks
    queries = np.empty(sets * h * r * d, np.float32)
    tile = np.empty(h * r * t, np.float32)  # a page's scores or probabilities
    scales = np.empty(facts[SCALES], np.float32)
    block = np.empty(BLOCK * pitch, np.float32)
    weights = np.empty(r * BLOCK, np.float32)
    if keys:
        _gather(order, spread, h, r, d, x, row * h * r * d, queries, sets > 1)
    source, source_at, source_leap = (queries, 0, d) if keys else (tile, 0, t)
    target, target_at, target_leap = (tile, 0, t) if keys else (parts, task * sets * h * r * d, d)
    for page in range(chunk * CHUNK, min(n, (chunk + 1) * CHUNK)):
        address = facts[AT_PAGES] + (row * n + page) * facts[PAGE_BYTES]
        for a in range(h * r):
            to, at = U(a * t), U(((row * h * r + a) * n + page) * t)
            if keys:
                for i in range(U(t)):
                    tile[to + i] = np.float32(0)
            else:
                for i in range(U(t)):
                    tile[to + i] = x[at + i]
        for e in range(0, facts[MATRICES] * FIELDS, FIELDS):
            head, product, kind = matrices[e + HEAD], matrices[e + PRODUCT], matrices[e + KIND]
            length, width, shared = matrices[e + LENGTH], matrices[e + WIDTH], matrices[e + SHARED]
            start = source_at + (matrices[e + SOURCE] * h + head) * r * source_leap + matrices[e + FROM]
            to = target_at + (matrices[e + TARGET] * h + head) * r * target_leap + matrices[e + TO]
            groups = width // shared
            if product == RAISE:
                by = _half(carray(_pointer(address + matrices[e + DATA]), (1,), np.uint16)[0])
                for a in range(r):
                    o = U(to + a * target_leap)
                    for i in range(U(t)):
                        target[o + i] += by
                continue
            count = length * groups  # scales; as many zeros after them
            coded = matrices[e + SCALE] >= 0
            if coded:
                _scales(address + matrices[e + SCALE], matrices[e + ZEROS], kind, length, groups, scales)
            for top in range(0, length, BLOCK):
                m, stride = min(BLOCK, length - top), matrices[e + STRIDE]
                _unpack(address, kind, matrices[e + DATA] + top * stride, stride, m, width, block, pitch)
                for g in range(groups):
                    left, s, z = g * shared, U(g * length + top), U(count + g * length + top)
                    if product == TABLE_FIRST:
                        _with_columns(r, source, start, source_leap, table, top * t, t, m, t, weights)
                    elif product != BY_ROWS:
                        _with_columns(r, source, start + left, source_leap, block, left, pitch, m, shared, weights)
                    for a in range(r):
                        w, level = U(a * BLOCK), np.float32(0)
                        if product == BY_ROWS:
                            i0, o = U(start + a * source_leap + top), U(to + a * target_leap + left)
                            for j in range(U(m)):
                                weights[w + j] = source[i0 + j]
                            if coded:
                                for j in range(U(m)):
                                    level += source[i0 + j] * scales[z + j]
                                    weights[w + j] *= scales[s + j]
                                for i in range(U(shared)):
                                    target[o + i] += level
                        elif product == BY_COLUMNS:
                            i0, o = U(start + a * source_leap + left), U(to + a * target_leap + top)
                            if coded:
                                for i in range(U(shared)):
                                    level += source[i0 + i]
                                for j in range(U(m)):
                                    weights[w + j] = weights[w + j] * scales[s + j] + level * scales[z + j]
                            for j in range(U(m)):
                                target[o + j] += weights[w + j]
                        elif coded:
                            for j in range(U(m)):
                                weights[w + j] *= scales[s + j]
                    if product == THEN_TABLE:
                        _with_rows(r, weights, table, top * t, t, m, t, target, to, target_leap)
                    elif product != BY_COLUMNS:
                        _with_rows(r, weights, block, left, pitch, m, shared, target, to + left, target_leap)
        if keys:
            for a in range(h * r):
                at, to = U(a * t), U(((row * h * r + a) * n + page) * t)
                for i in range(U(t)):
                    out[to + i] = tile[at + i]


@njit(inline="always")
def _turn(tile: np.ndarray, t: int, d: int, spread: np.ndarray, spare: np.ndarray) -> None:
    """Rows of tile [T, D] times `spread` transposed. Hadamard's is symmetric, and made of sums and differences: of
    channels whose numbers differ in one bit, bit by bit."""
    if d & (d - 1) == 0 and d >= LANES:
        shrink = np.float32(1 / np.sqrt(d))
        for first in range(U(0), U(t * d), U(d)):
            for i in range(first, first + U(d), U(LANES)):
                _hadamard(shrink, tile, i)
            step = LANES
            while step < d:
                for start in range(first, first + U(d), U(2 * step)):
                    for i in range(start, start + U(step), U(LANES)):
                        _butterfly(tile, i, i + U(step))
                step *= 2
    else:
        for row in range(t):
            at = U(row * d)
            for c in range(d):
                total, line = np.float32(0), U(c * d)
                for j in range(U(d)):
                    total += tile[at + j] * spread[line + j]
                spare[U(c)] = total
            for c in range(U(d)):
                tile[at + c] = spare[c]


def expand(task: int, told: int) -> None:
    """Task (row * chunks + chunk) * H + head: what CHUNK pages of a row hold of a head, to `out` [B, H, N * T, D].

    A page's values are put together as they are stored, in `tile` [T, D], and then go home.
    """
    facts = _numbers(told)
    keys, n, t, d, h = facts[KEYS], facts[PAGES], facts[TOKENS], facts[DIM], facts[HEADS]
    matrices, order, spread = _numbers(facts[AT_MATRICES]), _numbers(facts[AT_ORDER]), _floats(facts[AT_ROTATION])
    table, out = _floats(facts[AT_TABLE]), _floats(facts[AT_OUT])
    chunks, pitch = (n + CHUNK - 1) // CHUNK, max(t, d) + LANES
    head, chunk, row = task % h, task // h % chunks, task // h // chunks
    tile, block = np.zeros(t * d, np.float32), np.empty(BLOCK * pitch, np.float32)  # what nothing stores is 0
    scales, weights = np.empty(facts[SCALES], np.float32), np.empty(max(t * BLOCK, d), np.float32)
    home = np.empty(d, np.int32)
    for c in range(d):
        home[order[head * d + c]] = c
    for page in range(chunk * CHUNK, min(n, (chunk + 1) * CHUNK)):
        address = facts[AT_PAGES] + (row * n + page) * facts[PAGE_BYTES]
        turned = False
        for smooth in range(2):  # first what is rotated
            for e in range(0, facts[MATRICES] * FIELDS, FIELDS):
                product, kind = matrices[e + PRODUCT], matrices[e + KIND]
                if matrices[e + HEAD] != head or (product >= THEN_TABLE) != (smooth == 1) or product == RAISE:
                    continue
                length, width, shared = matrices[e + LENGTH], matrices[e + WIDTH], matrices[e + SHARED]
                channel, coded = matrices[e + FROM] + matrices[e + TO], matrices[e + SCALE] >= 0
                groups = width // shared
                count = length * groups
                if coded:
                    _scales(address + matrices[e + SCALE], matrices[e + ZEROS], kind, length, groups, scales)
                for top in range(0, length, BLOCK):
                    m, stride = min(BLOCK, length - top), matrices[e + STRIDE]
                    _unpack(address, kind, matrices[e + DATA] + top * stride, stride, m, width, block, pitch)
                    if smooth == 1:
                        if top == 0 and not turned:
                            for a in range(t):
                                to = U(a * d + channel)
                                for i in range(U(width)):
                                    tile[to + i] = np.float32(0)
                        for a in range(t):
                            for j in range(m):
                                w = U(a * BLOCK + j)
                                weights[w] = table[U((top + j) * t + a)]
                                if coded:
                                    weights[w] *= scales[U(top + j)]
                        _with_rows(t, weights, block, 0, pitch, m, width, tile, channel, d)
                    elif (product == BY_ROWS) == (keys == 1):  # channels by tokens
                        s, z = U(top), U(count + top)  # these are codes
                        for i in range(t):
                            to = U(i * d + channel + top)
                            for j in range(U(m)):
                                tile[to + j] = block[j * U(pitch) + U(i)] * scales[s + j] + scales[z + j]
                    else:
                        for g in range(groups):
                            for j in range(m):
                                scale, zero, of = np.float32(1), np.float32(0), g * length + top + j
                                if coded:
                                    scale, zero = scales[U(of)], scales[U(count + of)]
                                to, at = U((top + j) * d + channel + g * shared), U(j * pitch + g * shared)
                                for i in range(U(shared)):
                                    tile[to + i] = block[at + i] * scale + zero
                if matrices[e + SOURCE] + matrices[e + TARGET] > 0:
                    turned = True
                    _turn(tile, t, d, spread, weights)
        first = row * facts[ROW_STRIDE] + head * facts[HEAD_STRIDE] + page * t * facts[TOKEN_STRIDE]
        for i in range(t):
            to, at = U(first + i * facts[TOKEN_STRIDE]), U(i * d)
            for c in range(U(d)):
                out[to + c] = tile[at + U(np.uint32(home[c]))]


def _loop(entry: int, told: int, tasks: int, more: bool) -> None:
    for task in prange(tasks):
        _call(entry, task, told)
    if more:
        _call(entry, -1, told)


def _kept(compiler: Callable[..., Any], signature: str, function: Callable[..., None], **options: bool) -> Any:
    try:
        return compiler(signature, cache=True, **options, **OPTIONS)(function)
    except RuntimeError:  # no folder to keep it in: compile in every process
        return compiler(signature, **options, **OPTIONS)(function)


@functools.cache
def compiled(task: Callable[[int, int], None]) -> Any:
    """A task, with its `address`."""
    return _kept(numba.cfunc, "void(int64, int64)", task)


@functools.cache
def loop() -> Any:
    """The loop over all tasks."""
    return _kept(njit, "void(int64, int64, int64, boolean)", _loop, parallel=True, nogil=True)
