"""From a byte budget to a code for every head of K and V: the planner.

A head may be stored in a few ways, its *options*: one of K's and one of V's, from nothing but the states of each
segment to the model's own numbers. What an option costs in quality comes from a measurement (sensitivity.py); what it
takes in bytes is exact. One price of a byte for all heads then spends the budget where a byte buys most. This module
knows nothing about models or caches.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from longwave.store.layout import OWN, Code, Layout

if TYPE_CHECKING:
    from longwave.profile import Sensitivity

OWN_TYPE = math.inf  # the option of keeping the model's own numbers
# K: bits a number on average, scales included. V: bits a number. 0 keeps the states alone.
KEY_OPTIONS = (0.0, 0.7, 1.0, 1.3, 1.7, 2.2, 2.8, 3.5, 4.25)
VALUE_OPTIONS = (0, 1, 2, 3, 4)
# these are measured; 8 bits and the model's own numbers come after them
KEY_MORE, VALUE_MORE = (8.25, OWN_TYPE), (8, OWN_TYPE)
EIGHT = 1 / 200  # what 8 bits cost beside 4: the squared error falls by 255, with a margin
FREE = 1e-9  # nats that a measured 0 counts: a budget of 1 then keeps everything as it is
RECALL = 0.25  # what a nat on recall prompts counts beside a nat on prose

BLOCK = 8  # channels that share their bits
KEY_BITS = (2, 3, 4, 8)
# mean squared error of a channel's codes, in variances of the channel (normal values, the span of least error)
NOISE = {0: 1.0, 2: 0.1188, 3: 0.0374, 4: 0.0115, 8: 4.5e-5}

# Where nothing is measured: KL in nats when all heads of SmolLM2 take an option, the other side exact. From the trials
# in docs/research.md; K with the same bits for all channels, since nobody knows which ones matter.
USUAL_KEYS = {0.0: 0.166, 2.25: 0.046, 3.25: 0.0131, 4.25: 0.0024}
USUAL_VALUES = {0: 0.82, 1: 0.0555, 2: 0.0069, 3: 0.0011, 4: 0.0002}


@dataclass(frozen=True)
class Shape:
    """How pages are cut: tokens and channels, states and their bits, and the model's own type."""

    segment: int
    dim: int
    states: int
    state_bits: int
    dtype: torch.dtype


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
        steps = [(weight[block] * (NOISE[now] - NOISE[b]) / (cost[b] - cost[now]), b) for b in KEY_BITS if b > now]
        if steps:
            gain, b = max(steps)
            heapq.heappush(heap, (-gain / sizes[block], block, now, b))

    for block in range(len(sizes)):
        push(block)
    while heap:
        _, block, now, b = heapq.heappop(heap)
        price = (cost[b] - cost[now]) * sizes[block]
        if bits[block] == now and price <= spare:
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


@functools.lru_cache(maxsize=4096)
def code_bytes(code: Code, shape: Shape) -> int:
    """Bytes of a segment of one head stored so; never less than its part of a page."""
    order = torch.arange(shape.dim)[None]
    return Layout([code], [], order, order[:0], shape.segment, shape.dtype).page_bytes


@dataclass(frozen=True)
class Unit:
    """One head: codes of K and V together, and what each pair costs."""

    codes: tuple[tuple[Code, Code], ...]
    costs: tuple[float, ...]


class TooSmall(ValueError):
    """A limit below the smallest plan, which takes `needed` bytes."""

    def __init__(self, needed: int):
        super().__init__(f"the smallest plan takes {needed} bytes")
        self.needed = needed


def extended(costs: Sequence[float]) -> tuple[float, ...]:
    """Measured costs with those of 8 bits and of the model's own numbers, which alone cost nothing."""
    costs = [max(cost, FREE) for cost in costs]
    return (*costs, costs[-1] * EIGHT, 0.0)


def joined(keys: Sequence[tuple[Code, float]], values: Sequence[tuple[Code, float]]) -> Unit:
    """A head from its K's and V's codes and costs. Costs add up, but for one case: where K is nothing but the mean of
    each segment, all tokens of a segment get the same attention, so V's means are all that is asked for."""
    codes, costs = [], []
    for key, cost in keys:
        flat = key.kept == 0 and key.states == 1
        for value, more in values:
            codes.append((key, value))
            costs.append(cost if flat and value.states else cost + more)
    return Unit(tuple(codes), tuple(costs))


def units(measured: Sensitivity | None, kind: str, position: int, heads: int, shape: Shape) -> list[Unit]:
    """The heads of one layer.

    kind: "measured" takes every head's own costs; "uniform" the mean over all heads, or the usual ones where nothing is
    measured; "bits" is measured and leaves out what compresses a channel.
    """
    made = []
    for head in range(heads):
        sides: list[list[tuple[Code, float]]] = []
        for side in ("k", "v"):
            if measured is None:
                usual = USUAL_KEYS if side == "k" else USUAL_VALUES
                options: list[float] = list(usual)
                costs = [cost / heads for cost in usual.values()]
                weights = None
            else:
                options = list(KEY_OPTIONS if side == "k" else VALUE_OPTIONS)
                every = measured.costs(side)
                costs = (every.mean((0, 1)) if kind == "uniform" else every[position, head]).tolist()
                weights = measured.weights(position, head)
            options += KEY_MORE if side == "k" else VALUE_MORE
            codes = [key_code(weights, o, shape) if side == "k" else value_code(o, shape) for o in options]
            pairs = list(zip(codes, extended(costs), strict=True))
            sides.append([pair for pair in pairs if kind != "bits" or pair[0].kept == shape.dim])
        made.append(joined(*sides))
    return made


def choose(units: Sequence[Unit], shape: Shape, limit: float) -> list[tuple[Code, Code]]:
    """K's and V's code for every head, at most `limit` bytes in all, with the least sum of costs that one price of a
    byte gives.

    Raises TooSmall if even the smallest codes exceed the limit.
    """
    picked: list[int] = []
    steps: list[tuple[float, int, int, int, int]] = []  # (gain a byte, unit, from, to, bytes)
    spent = 0
    for number, unit in enumerate(units):
        sizes = [sum(code_bytes(code, shape) for code in pair) for pair in unit.codes]
        hull = lower_hull(sizes, unit.costs)
        picked.append(hull[0])
        spent += sizes[hull[0]]
        for a, b in itertools.pairwise(hull):
            extra = sizes[b] - sizes[a]
            steps.append(((unit.costs[a] - unit.costs[b]) / extra, number, a, b, extra))
    if spent > limit:
        raise TooSmall(spent)
    for _, number, a, b, extra in sorted(steps, key=lambda step: -step[0]):
        if picked[number] == a and spent + extra <= limit:
            picked[number] = b
            spent += extra
    return [unit.codes[i] for unit, i in zip(units, picked, strict=True)]


def lower_hull(sizes: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Indices of the options on the lower convex hull of cost over bytes, from the smallest option on."""
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], costs[i]))
    hull: list[int] = []
    for i in order:
        if hull and (sizes[i] == sizes[hull[-1]] or costs[i] >= costs[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (costs[a] - costs[b]) * (sizes[i] - sizes[b]) > (costs[b] - costs[i]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
