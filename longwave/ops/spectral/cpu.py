"""Attend over pages on a CPU, the twin of reference.py, compiled by numba.

What a page holds of a head is a few matrices whose rows are contiguous: tokens by channels, channels by tokens (codes
along time), or states by channels. A block of rows is unpacked to float32 and serves all query rows before the next
block. Two products do: an input along the rows (`_with_rows`), and one along the columns (`_with_columns`). Scores and
mix are then the same loop, since what is the input of one is the output of the other.

An output is summed in an order that depends on its own pages only, neither on the batch nor on the threads.
The first call ever compiles for some seconds; numba keeps the result on disk.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longwave.ops.codes import BITS, rotation
from longwave.store.layout import Group, Layout

try:
    import numba
    from llvmlite import ir
    from numba import carray, njit, prange, types
    from numba.extending import intrinsic
except ImportError:  # `usable` says so
    numba = None  # type: ignore[assignment]

ROWS = 8192  # query rows (group x queries) up to which this is used; at 1536 it took a quarter of the reference's time
BLOCK = 32  # matrix rows unpacked at once: with 128 columns they fill half of a small first-level cache
CHUNK = 4  # pages of a task
LANES = 8  # codes unpacked together

# kinds of numbers; codes are their number of bits
FLOAT32, FLOAT16, BFLOAT16, INT8 = 100, 101, 102, 103
KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.int8: INT8}
# input along the rows and output along the columns, or the other way round; for states, the input along the columns
# and then through the basis table, or through the table and then along the rows
BY_ROWS, BY_COLUMNS, THEN_TABLE, TABLE_FIRST = range(4)
# the columns of a plan's table
HEAD, PRODUCT, KIND, FROM, TO, LENGTH, WIDTH, DATA, STRIDE, SCALE, ZEROS, SHARED, SOURCE, TARGET = range(14)
FIELDS = 14


@dataclass(frozen=True, eq=False)
class Side:
    """K's or V's half of a plan.

    matrices int64 [matrices, FIELDS]: head, product, kind, first index of the input and of the output, rows, columns,
        byte of the page where the rows start, bytes a row, byte where the scales start (-1: none), whether zeros
        follow them, columns that share a scale, whether the input and the output are rotated.
    order int64 [H, D]: a head's channels as stored. rotation float32 [D, D], or None where nothing is rotated.
    scales: the most scales and zeros of a matrix. states: the most states.
    """

    matrices: torch.Tensor
    order: torch.Tensor
    rotation: torch.Tensor | None
    scales: int
    states: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the kernel finds what, for pages of one layout."""

    segment: int
    page_bytes: int
    k: Side
    v: Side


def usable(layout: Layout, q: torch.Tensor) -> bool:
    """Whether `scores` and `mix` here answer for q [B, H, R, D]; where they do not, the reference does."""
    return (
        numba is not None
        and q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape[2] <= ROWS
        and layout.dtype in KINDS
        and not (torch.is_grad_enabled() and q.requires_grad)
    )


def plan(layout: Layout) -> Plan:
    """Numeric tables for pages of `layout`, which must hold numbers of 32 or 16 bits."""
    sides = [_side(layout, groups, keys) for groups, keys in ((layout.k, True), (layout.v, False))]
    return Plan(layout.segment, layout.page_bytes, *sides)


def _side(layout: Layout, groups: list[Group], keys: bool) -> Side:
    rows: list[list[int]] = []
    order = torch.zeros(layout.heads, layout.dim, dtype=torch.int64)
    for group in groups:
        for i, head in enumerate(group.heads.tolist()):
            order[head] = group.order[i]
            rows += [[head, *rest] for rest in _matrices(group, i, layout.segment, keys)]
    matrices = torch.tensor(rows, dtype=torch.int64).view(-1, FIELDS)
    turned = bool(matrices[:, [SOURCE, TARGET]].any())
    scales = max((2 * row[LENGTH] * (row[WIDTH] // row[SHARED]) for row in rows), default=0)
    states = max((group.code.states for group in groups if group.states is not None), default=0)
    return Side(matrices, order, rotation(layout.dim).float().contiguous() if turned else None, scales, states)


def _matrices(group: Group, i: int, tokens: int, keys: bool) -> Iterator[list[int]]:
    """The matrices of a group's i-th head: a plan's rows without the head."""
    code = group.code

    def ends(channel: int) -> tuple[int, int]:
        return (channel, 0) if keys else (0, channel)

    if group.states is not None:
        _, states, n = group.states.shape
        held, scale = group.states, -1 if group.gains is None else group.gains.at(i)
        product, first = THEN_TABLE if keys else TABLE_FIRST, ends(0 if code.residual else code.kept)
        stride = n * held.dtype.itemsize
        yield [product, KINDS[held.dtype], *first, states, n, held.at(i), stride, scale, 0, n, 0, 0]
    channel = 0
    for (bits, n), values, scales in zip(code.runs, group.values, group.scales, strict=True):
        kind = bits if bits in BITS else KINDS[values.dtype]
        along_time = bits in BITS and code.axis == "time"
        rows, columns, shared = (n, tokens, tokens) if along_time else (tokens, n, code.group or n)
        if scales is None:
            shared = columns
        product, first = BY_ROWS if along_time == keys else BY_COLUMNS, ends(channel)
        stride = values.shape[-1] * values.dtype.itemsize
        scale, zeros = (-1, 0) if scales is None else (scales.at(i), scales.shape[1] - 1)
        turned = (int(code.residual), 0) if keys else (0, int(code.residual))
        yield [product, kind, *first, rows, columns, values.at(i), stride, scale, zeros, shared, *turned]
        channel += n


def scores(plan: Plan, pages: torch.Tensor, q: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Unscaled scores [B, H, R, N * T] of q [B, H, R, D] over pages uint8 [B, N, page bytes]; all else float32."""
    out = torch.empty(*q.shape[:3], pages.shape[1] * plan.segment)
    _launch(plan, plan.k, True, pages, q, table, out)
    return out


def mix(plan: Plan, pages: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The output [B, H, R, D] of probabilities p [B, H, R, N * T] over pages uint8 [B, N, page bytes]."""
    out = torch.zeros(*p.shape[:3], plan.v.order.shape[1])
    _launch(plan, plan.v, False, pages, p, table, out)
    return out


_lock = threading.Lock()  # not every threading layer of numba bears two callers
# what the kernel is told, as int64: sizes, and addresses of contiguous tensors
KEYS, BATCH, PAGES, PAGE_BYTES, TOKENS, DIM, HEADS, QUERIES, MATRICES, SETS, SCALES = range(11)
AT_MATRICES, AT_ORDER, AT_ROTATION, AT_PAGES, AT_X, AT_TABLE, AT_PARTS, AT_OUT = range(11, 19)


def _launch(
    plan: Plan,
    side: Side,
    keys: bool,
    pages: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    (b, n, page_bytes), (_, h, r, inputs) = pages.shape, x.shape
    d, t = side.order.shape[1], plan.segment
    # the kernel gets addresses, so what does not fit must not reach it
    if (pages.dtype, x.dtype, table.dtype) != (torch.uint8, torch.float32, torch.float32):
        raise TypeError(f"expected uint8 pages and float32, got {pages.dtype}, {x.dtype}, {table.dtype}")
    shapes = page_bytes, x.shape[0], h, inputs, table.shape[1]
    expected = plan.page_bytes, b, side.order.shape[0], d if keys else n * t, t
    if shapes != expected or table.shape[0] < side.states:
        raise ValueError(
            f"bytes a page, batch, heads, columns and tokens are {shapes}, the plan's {expected}, "
            f"with {table.shape[0]} states of at least {side.states}"
        )
    if not b * n * r:
        return
    pages, x, table = pages.contiguous(), x.detach().contiguous(), table.contiguous()
    chunks, sets = -(-n // CHUNK), 1 if side.rotation is None else 2
    parts = torch.zeros(0 if keys else b * chunks * sets * h * r * d)
    tensors = (side.matrices, side.order, side.rotation, pages, x, table, parts, out)
    told = torch.tensor(
        [keys, b, n, page_bytes, t, d, h, r, len(side.matrices), sets, side.scales]
        + [0 if y is None else y.data_ptr() for y in tensors]
    )
    threads = torch.get_num_threads()
    with _lock:
        (kernel, loop), before = _compiled(), numba.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            loop(kernel.address, told.data_ptr(), b * chunks, not keys)
        finally:
            numba.set_num_threads(before)
            if torch.get_num_threads() != threads:  # numba's first loop sets OpenMP's count, which is torch's too
                torch.set_num_threads(threads)


if numba is not None:
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

    def _kernel(task: int, told: int) -> None:
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
                count = length * groups  # scales; as many zeros after them
                coded = matrices[e + SCALE] >= 0
                if coded:
                    held = carray(_pointer(address + matrices[e + SCALE]), (1,), np.uint16)
                    for g in range(groups * (1 + matrices[e + ZEROS])):
                        s, half = U(g * length), U(g // groups * count + g % groups)
                        for i in range(U(length)):
                            scales[s + i] = _half(held[half + i * U(groups)])
                    if not matrices[e + ZEROS]:  # codes around 0, or no codes
                        centre = np.float32((1 << kind) - 1) * np.float32(-0.5) if kind <= 8 else np.float32(0)
                        for i in range(U(count)):
                            scales[U(count) + i] = centre * scales[i]
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

    def _loop(entry: int, told: int, tasks: int, more: bool) -> None:
        for task in prange(tasks):
            _call(entry, task, told)
        if more:
            _call(entry, -1, told)


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """The kernel, and the loop over its tasks."""

    def kept(compiler: Callable[..., Any], signature: str, function: Callable[..., None], **options: bool) -> Any:
        try:
            return compiler(signature, cache=True, **options, **OPTIONS)(function)
        except RuntimeError:  # no folder to keep it in: compile in every process
            return compiler(signature, **options, **OPTIONS)(function)

    kernel = kept(numba.cfunc, "void(int64, int64)", _kernel)
    return kernel, kept(njit, "void(int64, int64, int64, boolean)", _loop, parallel=True, nogil=True)
