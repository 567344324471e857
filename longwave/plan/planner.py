"""From a byte budget to a code for every head of K and V: the planner.

What an option (options.py) costs in quality comes from a measurement (sensitivity.py); what it takes in bytes is exact.
One price of a byte for all heads then spends the budget where a byte buys most. This module knows nothing about models
or caches.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from longwave.ops.spectral.layout import Code
from longwave.plan.options import (
    KEY_MORE,
    KEY_OPTIONS,
    VALUE_MORE,
    VALUE_OPTIONS,
    Shape,
    code_bytes,
    key_code,
    value_code,
)
from longwave.plan.profile import Sensitivity

EIGHT = 1 / 200  # what 8 bits cost beside 4: the squared error falls by 255, with a margin
FREE = 1e-9  # nats that a measured 0 counts: a budget of 1 then keeps everything as it is

# Where nothing is measured: KL in nats when all heads of SmolLM2 take an option, the other side exact. From the trials
# in docs/research.md; K with the same bits for all channels, since nobody knows which ones matter.
USUAL_KEYS = {0.0: 0.166, 2.25: 0.046, 3.25: 0.0131, 4.25: 0.0024}
USUAL_VALUES = {0: 0.82, 1: 0.0555, 2: 0.0069, 3: 0.0011, 4: 0.0002}


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


class Menu:
    """Units with their bytes and hulls worked out, from which `choose` serves any limit."""

    def __init__(self, units: Sequence[Unit], shape: Shape):
        self.units = list(units)
        self.first: list[int] = []
        self.spent = 0
        steps: list[tuple[float, int, int, int, int]] = []  # (gain a byte, unit, from, to, bytes)
        for number, unit in enumerate(self.units):
            sizes = [sum(code_bytes(code, shape) for code in pair) for pair in unit.codes]
            hull = lower_hull(sizes, unit.costs)
            self.first.append(hull[0])
            self.spent += sizes[hull[0]]
            for a, b in itertools.pairwise(hull):
                extra = sizes[b] - sizes[a]
                steps.append(((unit.costs[a] - unit.costs[b]) / extra, number, a, b, extra))
        self.steps = sorted(steps, key=lambda step: -step[0])

    def choose(self, limit: float) -> list[tuple[Code, Code]]:
        """K's and V's code for every head, at most `limit` bytes in all, with the least sum of costs that one price of
        a byte gives. Raises TooSmall if even the smallest codes exceed the limit."""
        if self.spent > limit:
            raise TooSmall(self.spent)
        picked, spent = list(self.first), self.spent
        for _, number, a, b, extra in self.steps:
            if picked[number] == a and spent + extra <= limit:
                picked[number] = b
                spent += extra
        return [unit.codes[i] for unit, i in zip(self.units, picked, strict=True)]


def choose(units: Sequence[Unit], shape: Shape, limit: float) -> list[tuple[Code, Code]]:
    """`Menu.choose`, once."""
    return Menu(units, shape).choose(limit)


@functools.lru_cache(maxsize=8)
def _menu(measured: Sensitivity | None, kind: str, layers: int, heads: int, shape: Shape) -> Menu:
    """A size budget asks for the same menu dozens of times."""
    return Menu([unit for position in range(layers) for unit in units(measured, kind, position, heads, shape)], shape)


def planned(
    measured: Sensitivity | None, kind: str, layers: int, heads: int, shape: Shape, limit: float
) -> list[tuple[Code, Code]]:
    """K's and V's code for every head, layer by layer, in at most `limit` bytes for a segment of all layers."""
    return _menu(measured, kind, layers, heads, shape).choose(limit)


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
