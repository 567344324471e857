"""Where a kernel finds what a head stores in a page: numbers read at run time, so that one compiled kernel serves all
layers of a model whatever their plan. Made for triton.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from longwave.ops.codes import BITS
from longwave.ops.spectral.layout import Field, Group, Layout

VALUES = 16  # kind of a run of 16-bit values; codes are their number of bits
WIDTHS = (8, 4, 3, 2, 1)  # of codes, in the order that they are read in
CHUNK = 32  # channels of K's codes taken at once
# What a page of a head costs to score and to mix, from its codes' widths, in no unit: fitted to layers on an H200.
SCORE_COST = {8: 330, 4: 200, 3: 290, 2: 172, 1: 175}  # of a chunk
MIX_COST = {8: 2200, 4: 1375, 3: 1560, 2: 1270, 1: 1200}
# where a head's bias stands, numbers before its chunks, of a chunk, and of a head of V: see `tables_of`
RAISE, K_TABLE, PIECE, VALUE_FIELDS = 13, 14, 4, 11


@dataclass(frozen=True, eq=False)
class Tables:
    """Where the kernel finds what.

    costs: of a page of each head, to score and to mix; cost_k and cost_v int32 [H], the same.
    keys int32 [H, numbers], values int32 [H, 11], order_k and order_v int32 [H, D], iota int16
        [128]: 0, 1, 2 ...
    traits: compile-time facts of the layer. K_WIDE, V_WIDE: the most channels of a 16-bit run, rounded up to a power of
        two; ALIGN: a divisor of all 16-bit runs' channels; GROUPS: scales of a token of V; whether there are
        codes of K, codes of V; K_MOST, V_MOST: the most states; K_EIGHT, V_EIGHT: whether they are int8; EVEN: a
        divisor of the channels that have states and of half the bytes where these start; RAISED: whether heads have a
        bias; CODED: whether two launches are needed.
    """

    layout: Layout
    keys: torch.Tensor
    values: torch.Tensor
    order_k: torch.Tensor
    order_v: torch.Tensor
    iota: torch.Tensor
    traits: dict[str, int | bool]
    costs: tuple[tuple[int, ...], tuple[int, ...]]
    cost_k: torch.Tensor
    cost_v: torch.Tensor


def _power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def fits(layout: Layout) -> str | None:
    """Why the kernel cannot read this layout, or None if it can."""
    if layout.dtype not in (torch.float16, torch.bfloat16):
        return f"the model computes in {layout.dtype}, not in 16 bits"
    if not (_power(layout.dim) and 32 <= layout.dim <= 256 and _power(layout.segment) and 32 <= layout.segment <= 256):
        return "head_dim (32 to 256) and segment (32 to 256) must be powers of two"
    for group in layout.k:
        code = group.code
        if code.residual or any(b in BITS and code.axis != "time" for b, _ in code.runs):
            return "K's codes must lie along time"
        if sum(b not in BITS for b, _ in code.runs) > 1:
            return "K has more than one run of 16-bit channels"
    scales = set()
    for group in layout.v:
        code = group.code
        if len(code.runs) > 1:
            return "V has more than one run of channels"
        if code.residual and any(b not in BITS for b, _ in code.runs):
            return "V's residuals are values, not codes"
        if code.group == 1:
            return "V has a scale for every channel"
        for b, n in code.runs:
            if b in BITS and (code.axis != "token" or n != layout.dim):
                return "V's codes must lie across all channels of a token"
            if b in BITS:
                scales.add(n // (code.group or n))
    if len(scales) > 1:
        return "heads share V's scales differently"
    for side in (layout.k, layout.v):
        if len({g.gains is None for g in side if g.states is not None}) > 1:
            return "some heads have states of 8 bits, some of 16"
    return None


def tables_of(layout: Layout) -> Tables:
    """The tables of a layout that `fits`, on its device.

    A row of `keys`: states, channels that have them, the first of these, byte of the states and of the gains; channels,
    byte and first of the run of 16-bit values; how many chunks of 8, 4, 3, 2 and 1 bits; byte of the bias (-1: none);
    the chunks. A chunk: byte of the codes, byte of the scales, channels of the run, and in one number its channels (8
    bits) and its first channel.
    A row of `values`: the same five; kind of its one run, channels, bytes of the values, scales and zeros (-1: none),
    whether it is turned.
    """
    found = [[_keys(layout, g, i) for i in range(len(g.heads))] for g in layout.k]
    most = max(len(row) for group in found for row in group)
    keys = torch.zeros(layout.heads, most, dtype=torch.int32)
    values = torch.zeros(layout.heads, VALUE_FIELDS, dtype=torch.int32)
    order_k, order_v = torch.zeros(2, layout.heads, layout.dim, dtype=torch.int32)
    for group, rows in zip(layout.k, found, strict=True):
        for i, head in enumerate(group.heads.tolist()):
            order_k[head] = group.order[i].cpu().int()
            keys[head, : len(rows[i])] = torch.tensor(rows[i])
    groups = 1
    for group in layout.v:
        for i, head in enumerate(group.heads.tolist()):
            order_v[head] = group.order[i].cpu().int()
            row = _smooth(group, i, layout.dim)
            for (bits, n), held, scales in zip(group.code.runs, group.values, group.scales, strict=True):
                zeros = -1
                if scales is not None:
                    groups = scales.shape[-1]
                    zeros = _at(scales, i) + 2 * layout.segment * groups if group.code.zero else -1
                kind = bits if bits in BITS else VALUES
                row += [kind, n, held.at(i), _at(scales, i), zeros, int(group.code.residual)]
            values[head, : len(row)] = torch.tensor(row)
    kept = [(side, bits, n) for side in "kv" for g in getattr(layout, side) for bits, n in g.code.runs]
    whole = [(side, n) for side, bits, n in kept if bits not in BITS]

    def wide(which: str) -> int:
        n = max([n for side, n in whole if side == which], default=0)
        return max(16, 1 << (n - 1).bit_length()) if n else 0

    smooth = [_smooth(g, i, layout.dim) for g in (*layout.k, *layout.v) for i in range(len(g.heads))]
    found_at = [n for _, width, _, data, _ in smooth for n in (width, data // 2)]
    traits = dict(
        K_WIDE=wide("k"),
        V_WIDE=wide("v"),
        ALIGN=math.gcd(8, *(n for _, n in whole)),
        GROUPS=groups,
        K_CODES=any(side == "k" and bits in BITS for side, bits, _ in kept),
        V_CODES=any(side == "v" and bits in BITS for side, bits, _ in kept),
        K_MOST=max([g.code.states for g in layout.k if g.states is not None], default=0),
        V_MOST=max([g.code.states for g in layout.v if g.states is not None], default=0),
        K_EIGHT=any(g.gains is not None for g in layout.k),
        V_EIGHT=any(g.gains is not None for g in layout.v),
        EVEN=math.gcd(8, *found_at),
        RAISED=any(g.bias is not None for g in layout.k),
    )
    traits["CODED"] = bool(traits["K_CODES"] or traits["V_CODES"] or not whole)
    found_rows = list(zip(keys.tolist(), values.tolist(), strict=True))
    score, mix = tuple(_score_cost(k, v) for k, v in found_rows), tuple(_mix_cost(v) for _, v in found_rows)
    if not traits["CODED"]:
        score = mix = tuple(a + b for a, b in zip(score, mix, strict=True))
    device = layout.k[0].heads.device
    iota = torch.arange(128, dtype=torch.int16)
    keys, values, order_k, order_v, iota = (x.to(device) for x in (keys, values, order_k, order_v, iota))
    cost_k, cost_v = (torch.tensor(side, dtype=torch.int32, device=device) for side in (score, mix))
    return Tables(layout, keys, values, order_k, order_v, iota, traits, (score, mix), cost_k, cost_v)


def _score_cost(k: list[int], v: list[int]) -> int:
    chunks = sum(n * SCORE_COST[width] for width, n in zip(WIDTHS, k[8:RAISE], strict=True))
    if k[0] <= 1 and not (chunks or k[5] or v[5]):  # all tokens of a page score alike
        return 30
    return 400 + 60 * k[0] + 10 * k[5] + chunks


def _mix_cost(v: list[int]) -> int:
    return 40 + 40 * v[0] + (10 * v[6] if v[5] == VALUES else MIX_COST.get(v[5], 0))


def _at(field: Field | None, i: int) -> int:
    return 0 if field is None else field.at(i)


def _keys(layout: Layout, group: Group, i: int) -> list[int]:
    """The table's row for a group's head i of K."""
    chunks: dict[int, list[int]] = {width: [] for width in WIDTHS}
    values, first = [0, 0, 0], 0
    for (bits, n), held, scales in zip(group.code.runs, group.values, group.scales, strict=True):
        data = held.at(i)
        if bits not in BITS:
            values = [n, data, first]
        else:
            stride = layout.segment * bits // 8
            for j in range(0, n, CHUNK):
                chunks[bits] += [data + j * stride, _at(scales, i) + 2 * j, n, min(CHUNK, n - j) | first + j << 8]
        first += n
    counts = [len(chunks[width]) // PIECE for width in WIDTHS]
    raised = -1 if group.bias is None else group.bias.at(i)
    return [*_smooth(group, i, layout.dim), *values, *counts, raised, *(x for width in WIDTHS for x in chunks[width])]


def _smooth(group: Group, i: int, dim: int) -> list[int]:
    """Of a group's head i: states, channels that have them, the first of these, byte of the states and of the gains."""
    if group.states is None:
        return [0, 0, 0, 0, 0]
    code = group.code
    first = 0 if code.residual else code.kept
    return [code.states, code.smooth(dim), first, _at(group.states, i), _at(group.gains, i)]
