"""Attend over pages on a CPU, and make them dense again: the twin of reference.py, compiled by numba (cpu_kernels.py).

What a page holds of a head is a few matrices whose rows are contiguous: tokens by channels, channels by tokens (codes
along time), or states by channels. A block of rows is unpacked to float32 and serves all query rows before the next
block. Two products do: an input along the rows (`_with_rows`), and one along the columns (`_with_columns`). Scores and
mix are then the same loop, since what is the input of one is the output of the other.

An output is summed in an order that depends on its own pages only, neither on the batch nor on the threads.
The first call ever compiles for some seconds; numba keeps the result on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from longwave.ops.codes import BITS, rotation
from longwave.ops.spectral.layout import Group, Layout
from longwave.ops.spectral.reference import check_dense

try:
    import numba

    from longwave.ops.spectral import cpu_kernels as kernels
except ImportError:  # `usable` says so
    numba = None  # type: ignore[assignment]

ROWS = 8192  # query rows (group x queries) up to which this is used; at 1536 it took a quarter of the reference's time


@dataclass(frozen=True, eq=False)
class Side:
    """K's or V's half of the tables.

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
class Tables:
    """Where the kernels find what, for pages of one layout."""

    segment: int
    page_bytes: int
    k: Side
    v: Side


def usable(layout: Layout, q: torch.Tensor) -> bool:
    """Whether `scores` and `mix` here answer for q [B, H, R, D]; where they do not, the reference does."""
    return can_expand(layout, q) and q.shape[2] <= ROWS


def why_not(layout: Layout, q: torch.Tensor) -> str | None:
    """Why `usable` says no, or None where it does not."""
    if usable(layout, q):
        return None
    if numba is None:
        return "numba is not installed: pip install 'longwave[cpu]'"
    if q.device.type != "cpu":
        return f"no kernel here for {q.device.type}"
    if q.dtype != torch.float32 or layout.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel computes in float32, not for {layout.dtype}"
    return "gradients are asked for" if q.requires_grad else f"{q.shape[2]} query rows a head"


def can_expand(layout: Layout, out: torch.Tensor) -> bool:
    """Whether `expand` here fills `out`, [B, H, N * T, D]; where it does not, the reference does."""
    return (
        numba is not None
        and out.device.type == "cpu"
        and out.dtype == torch.float32
        and layout.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not (torch.is_grad_enabled() and out.requires_grad)
    )


def tables_of(layout: Layout) -> Tables:
    """Numeric tables for pages of `layout`, which must hold numbers of 32 or 16 bits."""
    sides = [_side(layout, groups, keys) for groups, keys in ((layout.k, True), (layout.v, False))]
    return Tables(layout.segment, layout.page_bytes, *sides)


def _side(layout: Layout, groups: list[Group], keys: bool) -> Side:
    rows: list[list[int]] = []
    order = torch.zeros(layout.heads, layout.dim, dtype=torch.int64)
    for group in groups:
        for i, head in enumerate(group.heads.tolist()):
            order[head] = group.order[i]
            rows += [[head, *rest] for rest in _matrices(group, i, layout.segment, keys)]
    matrices = torch.tensor(rows, dtype=torch.int64).view(-1, kernels.FIELDS)
    turned = bool(matrices[:, [kernels.SOURCE, kernels.TARGET]].any())
    lengths, widths, shared = matrices[:, [kernels.LENGTH, kernels.WIDTH, kernels.SHARED]].T.tolist()
    scales = max((2 * n * (width // own) for n, width, own in zip(lengths, widths, shared, strict=True)), default=0)
    states = max((group.code.states for group in groups if group.states is not None), default=0)
    return Side(matrices, order, rotation(layout.dim).float().contiguous() if turned else None, scales, states)


def _matrices(group: Group, i: int, tokens: int, keys: bool) -> Iterator[list[int]]:
    """The matrices of a group's i-th head: rows of `Side.matrices` without the head."""
    code = group.code
    kinds = {
        torch.float32: kernels.FLOAT32,
        torch.float16: kernels.FLOAT16,
        torch.bfloat16: kernels.BFLOAT16,
        torch.int8: kernels.INT8,
    }

    def ends(channel: int) -> tuple[int, int]:
        return (channel, 0) if keys else (0, channel)

    if group.states is not None:
        _, states, n = group.states.shape
        held, scale = group.states, -1 if group.gains is None else group.gains.at(i)
        product = kernels.THEN_TABLE if keys else kernels.TABLE_FIRST
        first = ends(0 if code.residual else code.kept)
        stride = n * held.dtype.itemsize
        yield [product, kinds[held.dtype], *first, states, n, held.at(i), stride, scale, 0, n, 0, 0]
    if group.bias is not None:
        yield [kernels.RAISE, kernels.FLOAT16, 0, 0, 1, 1, group.bias.at(i), 2, -1, 0, 1, 0, 0]
    channel = 0
    for (bits, n), values, scales in zip(code.runs, group.values, group.scales, strict=True):
        kind = bits if bits in BITS else kinds[values.dtype]
        along_time = bits in BITS and code.axis == "time"
        rows, columns, shared = (n, tokens, tokens) if along_time else (tokens, n, code.group or n)
        if scales is None:
            shared = columns
        product, first = kernels.BY_ROWS if along_time == keys else kernels.BY_COLUMNS, ends(channel)
        stride = values.shape[-1] * values.dtype.itemsize
        scale, zeros = (-1, 0) if scales is None else (scales.at(i), scales.shape[1] - 1)
        turned = (int(code.residual), 0) if keys else (0, int(code.residual))
        yield [product, kind, *first, rows, columns, values.at(i), stride, scale, zeros, shared, *turned]
        channel += n


def scores(tables: Tables, pages: torch.Tensor, q: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Scores [B, H, R, N * T] of scaled q [B, H, R, D] over pages uint8 [B, N, page bytes]; all else float32."""
    out = torch.empty(*q.shape[:3], pages.shape[1] * tables.segment)
    _attend(tables, tables.k, True, pages, q, table, out)
    return out


def mix(tables: Tables, pages: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The output [B, H, R, D] of probabilities p [B, H, R, N * T] over pages uint8 [B, N, page bytes]."""
    out = torch.zeros(*p.shape[:3], tables.v.order.shape[1])
    _attend(tables, tables.v, False, pages, p, table, out)
    return out


def expand(tables: Tables, pages: torch.Tensor, table: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor) -> None:
    """Write what pages uint8 [B, N, page bytes] stand for to out_k, out_v [B, H, N * T, D]; all else float32.

    The channels of a token must be contiguous; tokens, heads and rows may be parts of larger tensors.
    """
    b, n, _ = pages.shape
    sides = (tables.k, True, out_k), (tables.v, False, out_v)
    for side, _, out in sides:
        check_dense(out, (b, side.order.shape[0], n * tables.segment, side.order.shape[1]))
        _check(tables, side, pages, out, table)
    for side, keys, out in sides:
        _run(kernels.expand, tables, side, keys, pages, table, out, out.shape[1])


def _attend(
    tables: Tables,
    side: Side,
    keys: bool,
    pages: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    (b, n, _), (h, d), r = pages.shape, side.order.shape, x.shape[2]
    shapes, expected = (x.shape[0], x.shape[1], x.shape[3]), (b, h, d if keys else n * tables.segment)
    if shapes != expected:
        raise ValueError(f"batch, heads and columns are {shapes}, the tables' {expected}")
    _check(tables, side, pages, x, table)
    sets = 1 if side.rotation is None else 2
    parts = torch.zeros(0 if keys else b * -(-n // kernels.CHUNK) * sets * h * r * d)
    _run(kernels.attend, tables, side, keys, pages, table, out, int(r > 0), x, parts)


def _check(tables: Tables, side: Side, pages: torch.Tensor, x: torch.Tensor, table: torch.Tensor) -> None:
    """The kernels get addresses, so what does not fit must not reach them."""
    if (pages.dtype, x.dtype, table.dtype) != (torch.uint8, torch.float32, torch.float32):
        raise TypeError(f"expected uint8 pages and float32, got {pages.dtype}, {x.dtype}, {table.dtype}")
    shapes, expected = (pages.shape[2], table.shape[1]), (tables.page_bytes, tables.segment)
    if shapes != expected or table.shape[0] < side.states:
        raise ValueError(
            f"bytes a page and tokens are {shapes}, the tables' {expected}, "
            f"with {table.shape[0]} states of at least {side.states}"
        )


_lock = threading.Lock()  # not every threading layer of numba bears two callers


def _run(
    task: Callable[[int, int], None],
    tables: Tables,
    side: Side,
    keys: bool,
    pages: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    each: int,
    x: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
) -> None:
    """`each` tasks for every chunk of pages of every row; where there are `parts` to add up, one more after them."""
    b, n, page_bytes = pages.shape
    tasks = b * -(-n // kernels.CHUNK) * each
    if not tasks:
        return
    pages, table, x = pages.contiguous(), table.contiguous(), None if x is None else x.detach().contiguous()
    tensors = (side.matrices, side.order, side.rotation, pages, x, table, parts, out)
    (h, d), rows = side.order.shape, 0 if x is None else x.shape[2]
    told = torch.tensor(
        [keys, b, n, page_bytes, tables.segment, d, h, rows, len(side.matrices), 1 if side.rotation is None else 2]
        + [side.scales, side.states, *out.stride()[:3]]
        + [0 if y is None else y.data_ptr() for y in tensors]
    )
    threads = torch.get_num_threads()
    with _lock:
        kernel, loop, before = kernels.compiled(task), kernels.loop(), numba.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            loop(kernel.address, told.data_ptr(), tasks, x is not None and not keys)
        finally:
            numba.set_num_threads(before)
            if torch.get_num_threads() != threads:  # numba's first loop sets OpenMP's count, which is torch's too
                torch.set_num_threads(threads)
