"""The ways to store a head, its *options*: one of K's and one of V's, from nothing but the states of each segment to
the model's own numbers, with the code of each and its exact bytes. Knows nothing about models or caches."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from longwave.ops.spectral.layout import OWN, Code, Layout

OWN_TYPE = math.inf  # the option of keeping the model's own numbers
# K: bits a number on average, scales included. V: bits a number. 0 keeps the states alone.
KEY_OPTIONS = (0.0, 0.7, 1.0, 1.3, 1.7, 2.2, 2.8, 3.5, 4.25)
VALUE_OPTIONS = (0, 1, 2, 3, 4)
# K and V together: "merged" is one weighted mean a segment, and a bias (ops/merge.py)
BOTH_OPTIONS = ("merged",)
# these are measured; 8 bits and the model's own numbers come after them
KEY_MORE, VALUE_MORE = (8.25, OWN_TYPE), (8, OWN_TYPE)

BLOCK = 8  # channels that share their bits
KEY_BITS = (2, 3, 4, 8)
# mean squared error of a channel's codes, in variances of the channel (normal values, the span of least error)
NOISE = {0: 1.0, 2: 0.1188, 3: 0.0374, 4: 0.0115, 8: 4.5e-5}


@dataclass(frozen=True)
class Shape:
    """How pages are cut: tokens and channels, states and their bits, and the model's own type."""

    segment: int
    dim: int
    states: int
    state_bits: int
    dtype: torch.dtype


def _gain(less: float, more: float) -> float:
    """What a byte buys. Bits that cost no more than the states they replace are worth any price."""
    return less / more if more > 0 else math.inf


def key_runs(weights: Sequence[float], target: float, shape: Shape) -> tuple[tuple[int, int], ...]:
    """Runs (bits, channels) for channels of falling weight, `target` bits a number on average.

    Blocks of channels take bits one after the other, each time where the weighted error falls most for a byte: reverse
    water-filling. A channel's weight is the squared score error of compressing it: its variance around the segment's
    mean times the mean square of the query there.
    """
    state_cost = shape.states * (shape.state_bits or shape.dtype.itemsize * 8) / shape.segment
    cost = {0: state_cost, **{bits: bits + 32 / shape.segment for bits in KEY_BITS}}
    sizes = [min(BLOCK, len(weights) - i) for i in range(0, len(weights), BLOCK)]
    weight = [sum(weights[i * BLOCK : i * BLOCK + size]) for i, size in enumerate(sizes)]
    bits = [0] * len(sizes)
    spare = (target - state_cost) * len(weights) + 1e-6
    heap: list[tuple[float, int, int, int]] = []

    def push(block: int) -> None:
        now = bits[block]
        steps = [(_gain(weight[block] * (NOISE[now] - NOISE[b]), cost[b] - cost[now]), b) for b in KEY_BITS if b > now]
        if steps:
            gain, b = max(steps)
            heapq.heappush(heap, (-gain / sizes[block], block, now, b))

    for block in range(len(sizes)):
        push(block)
    while heap:
        _, block, now, b = heapq.heappop(heap)
        price = (cost[b] - cost[now]) * sizes[block]
        if bits[block] == now and price <= max(spare, 0.0):  # what costs nothing is always taken
            spare -= price
            bits[block] = b
            push(block)
    counts = {b: sum(size for size, own in zip(sizes, bits, strict=True) if own == b) for b in KEY_BITS}
    return tuple((b, counts[b]) for b in sorted(KEY_BITS, reverse=True) if counts[b])


def key_code(weights: Sequence[float] | None, option: float, shape: Shape) -> Code:
    """K's code at an option. Without weights all channels take the same bits, as many as the option allows."""
    if option == OWN_TYPE:
        return Code(((OWN, shape.dim),), states=0)
    if weights is None:
        fitting = [b for b in KEY_BITS if b + 32 / shape.segment <= option + 1e-6]
        runs: tuple[tuple[int, int], ...] = ((max(fitting), shape.dim),) if fitting else ()
    else:
        runs = key_runs(weights, option, shape)
    whole = sum(n for _, n in runs) == shape.dim
    return Code(runs, states=0 if whole else shape.states, state_bits=shape.state_bits)


def value_code(option: float, shape: Shape) -> Code:
    """V's code at an option: states for every channel, and what they leave in so many bits, rotated."""
    if option == OWN_TYPE:
        return Code(((OWN, shape.dim),), states=0)
    runs = ((int(option), shape.dim),) if option else ()
    return Code(runs, shape.states, axis="token", residual=bool(option), state_bits=shape.state_bits, zero=False)


def both_codes(option: str, shape: Shape) -> tuple[Code, Code]:
    """K's and V's code at an option of both."""
    assert option == "merged"
    key, value = key_code(None, 0.0, shape), value_code(0, shape)
    return replace(key, states=1, merged=True), replace(value, states=1, merged=True)


@functools.lru_cache(maxsize=4096)
def code_bytes(code: Code, shape: Shape) -> int:
    """Bytes of a segment of one head stored so; never less than its part of a page."""
    order = torch.arange(shape.dim)[None]
    return Layout([code], [], order, order[:0], shape.segment, shape.dtype).page_bytes
