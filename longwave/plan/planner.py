"""From a byte budget to a code for every head of K and V: the planner.

What an option (options.py) costs in quality comes from a measurement (sensitivity.py); what it takes in bytes is exact.
One price of a byte for all heads then spends the budget where a byte buys most. This module knows nothing about models
or caches.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from longwave.ops.spectral.layout import Code
from longwave.plan.options import (
    BOTH_OPTIONS,
    KEY_MORE,
    KEY_OPTIONS,
    VALUE_MORE,
    VALUE_OPTIONS,
    Shape,
    both_codes,
    code_bytes,
    key_code,
    value_code,
)
from longwave.plan.profile import SIDES, Sensitivity

EIGHT = 1 / 200  # what 8 bits cost beside 4: the squared error falls by 255, with a margin
CAUTION = 0.5  # unseen windows that merging is counted to lose in: it loses rarely, then much (Sensitivity.unseen)
FREE = 1e-9  # nats that a measured 0 counts: a budget of 1 then keeps everything as it is

# Where nothing is measured: KL in nats when all heads of SmolLM2 take an option, the other side exact, by bits, from
# the trials in docs/research.md; K with the same bits for all channels, since nobody knows which ones matter. Costs of
# one model carry over to another only so far: nothing but means is left to the last third of the layers alone, 2 bits
# of K and 1 of V to pages whose scales leave no room for more ("coarse"), and below so many bits a number such plans
# fall apart (docs/planner.md).
USUAL_KEYS = {0: 0.166, 2: 0.046, 3: 0.0131, 4: 0.0024}
USUAL_VALUES = {0: 0.82, 1: 0.0555, 2: 0.0069, 3: 0.0011, 4: 0.0002}
FLAT_SHARE, SAFE_BITS = 1 / 3, 2.24
UNMEASURED = ("safe", "coarse")
BOTH = -1  # in place of K's option: the second is one of K and V together


@dataclass(frozen=True)
class Unit:
    """One head: codes of K and V together, what each pair costs, and which options of K and V it is; of both where the
    first is `BOTH`."""

    codes: tuple[tuple[Code, Code], ...]
    costs: tuple[float, ...]
    options: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Expected:
    """What a plan was measured to cost: KL from the dense model in nats a token of text, and its standard error over
    the windows that were measured."""

    kl: float
    error: float

    def __str__(self) -> str:
        error = "" if math.isinf(self.error) else f" ± {self.error:.1g}"  # of one window nothing is known
        return f"KL {self.kl:.2g}{error}"


class TooSmall(ValueError):
    """A limit below the smallest plan, which takes `needed` bytes."""

    def __init__(self, needed: int):
        super().__init__(f"the smallest plan takes {needed} bytes")
        self.needed = needed


def extended(costs: Sequence[float]) -> tuple[float, ...]:
    """Measured costs with those of 8 bits and of the model's own numbers, which alone cost nothing."""
    costs = [max(cost, FREE) for cost in costs]
    return (*costs, costs[-1] * EIGHT, 0.0)


def _flat(key: Code) -> bool:
    """Whether K is nothing but the mean of each segment: all tokens of a segment then get the same attention, so V's
    means are all that is asked for."""
    return key.kept == 0 and key.states == 1 and not key.merged


def joined(keys: Sequence[tuple[Code, float]], values: Sequence[tuple[Code, float]]) -> Unit:
    """A head from its K's and V's codes and costs. Costs add up, but for a flat K."""
    codes, costs, options = [], [], []
    for i, (key, cost) in enumerate(keys):
        for j, (value, more) in enumerate(values):
            codes.append((key, value))
            costs.append(cost if _flat(key) and value.states else cost + more)
            options.append((i, j))
    return Unit(tuple(codes), tuple(costs), tuple(options))


def units(
    measured: Sensitivity | None, kind: str, position: int, heads: int, shape: Shape, flat: bool = True
) -> list[Unit]:
    """The heads of one layer.

    kind: "measured" takes every head's own costs; "uniform" the mean over all heads; "bits" is measured and leaves out
    what compresses a channel; "safe" and "coarse" need no measurement. flat: whether such a layer may keep nothing but
    means.
    """
    if kind in UNMEASURED:

        def side(usual: dict[int, float], code: Callable[[float], Code], coarsest: int) -> list[tuple[Code, float]]:
            costs = extended([cost / heads for cost in usual.values()])
            options = zip((*usual, *VALUE_MORE), costs, strict=True)
            return [(code(o), cost) for o, cost in options if (o or flat) and (o != coarsest or kind == "coarse")]

        scales = 32 / shape.segment

        def key(bits: float) -> Code:
            code = key_code(None, bits + scales if bits else 0.0, shape)
            return replace(code, fit=False) if bits >= 4 else code  # the whole range: outliers are not known either

        keys = side(USUAL_KEYS, key, 2)
        values = side(USUAL_VALUES, lambda bits: value_code(bits, shape), 1)
        return [joined(keys, values)] * heads
    assert measured is not None
    every = [measured.costs(side) for side in SIDES]
    every[-1] = every[-1] + CAUTION * measured.unseen(SIDES[-1])
    made = []
    for head in range(heads):
        weights = measured.weights(position, head)
        k, v, both = ((x.mean((0, 1)) if kind == "uniform" else x[position, head]).tolist() for x in every)
        of_k = [key_code(weights, option, shape) for option in (*KEY_OPTIONS, *KEY_MORE)]
        of_v = [value_code(option, shape) for option in (*VALUE_OPTIONS, *VALUE_MORE)]
        unit = joined(list(zip(of_k, extended(k), strict=True)), list(zip(of_v, extended(v), strict=True)))
        unit = Unit(
            (*(both_codes(option, shape) for option in BOTH_OPTIONS), *unit.codes),
            (*(max(cost, FREE) for cost in both), *unit.costs),
            (*((BOTH, i) for i in range(len(BOTH_OPTIONS))), *unit.options),
        )
        if kind == "bits":
            whole = [i for i, pair in enumerate(unit.codes) if all(code.kept == shape.dim for code in pair)]
            unit = Unit(
                tuple(unit.codes[i] for i in whole),
                tuple(unit.costs[i] for i in whole),
                tuple(unit.options[i] for i in whole),
            )
        made.append(unit)
    return made


def expected(measured: Sensitivity, chosen: Sequence[tuple[int, int]], flat: Sequence[bool]) -> Expected:
    """What options (of K, of V) of every head, layer by layer, were measured to cost in sum. flat: heads whose K is."""
    total = torch.zeros(len(measured.recall))
    heads = measured.key_weight.shape[1]
    for number, ((i, j), alone) in enumerate(zip(chosen, flat, strict=True)):
        if i == BOTH:
            total += measured.both[:, number // heads, number % heads, j]
            continue
        for side, option in (("k", i),) if alone else (("k", i), ("v", j)):
            costs = getattr(measured, side)[:, number // heads, number % heads]
            last = costs.shape[-1]
            if option <= last:  # the option after the last is 8 bits, and the one after that costs nothing
                total += costs[:, option] if option < last else costs[:, -1] * EIGHT
    text = total[~measured.recall] if bool((~measured.recall).any()) else total
    return Expected(float(text.mean()), float(text.std() / len(text) ** 0.5) if len(text) > 1 else math.inf)


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

    def picked(self, limit: float) -> list[int]:
        """Which codes of every unit, at most `limit` bytes in all, with the least sum of costs that one price of a byte
        gives. Raises TooSmall if even the smallest codes exceed the limit."""
        if self.spent > limit:
            raise TooSmall(self.spent)
        picked, spent = list(self.first), self.spent
        for _, number, a, b, extra in self.steps:
            if picked[number] == a and spent + extra <= limit:
                picked[number] = b
                spent += extra
        return picked


def choose(units: Sequence[Unit], shape: Shape, limit: float) -> list[tuple[Code, Code]]:
    """K's and V's code for every unit: `Menu.picked`, once."""
    return [unit.codes[i] for unit, i in zip(units, Menu(units, shape).picked(limit), strict=True)]


@functools.lru_cache(maxsize=8)
def menu(measured: Sensitivity | None, kind: str, layers: int, heads: int, shape: Shape) -> Menu:
    """Of a whole model, layer by layer. A size budget asks for the same one dozens of times."""
    every = (
        units(measured, kind, position, heads, shape, flat=position >= layers - int(layers * FLAT_SHARE))
        for position in range(layers)
    )
    return Menu([unit for layer in every for unit in layer], shape)


def planned(
    measured: Sensitivity | None, kind: str, layers: int, heads: int, shape: Shape, limit: float
) -> tuple[list[tuple[Code, Code]], Expected | None]:
    """K's and V's code for every head, layer by layer, in at most `limit` bytes for a segment of all layers, and what
    they are expected to cost, where that was measured."""
    found = menu(measured, kind, layers, heads, shape)
    if kind == "safe" and found.spent > limit:
        found = menu(measured, "coarse", layers, heads, shape)
    picks = list(zip(found.units, found.picked(limit), strict=True))
    codes = [unit.codes[i] for unit, i in picks]
    if measured is None or kind in UNMEASURED:
        return codes, None
    flat = [_flat(key) and bool(value.states) for key, value in codes]
    return codes, expected(measured, [unit.options[i] for unit, i in picks], flat)


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
