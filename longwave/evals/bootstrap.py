"""Intervals by bootstrap, from how many samples on they are given, and what one of a difference to dense says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
FEWEST = 6  # pairs that can differ from zero at 5 %: with five, all on one side still has probability 2 / 2**5


def bootstrap(
    rows: Sequence[Any], total: Callable[[Sequence[Any]], float], seed: str, sets: Sequence[Any] | None = None
) -> tuple[float, float]:
    """Percentile interval (2.5 %, 97.5 %) of `total` over resampled rows. Deterministic in `seed`.

    sets: the set of each row where `total` is a mean over sets: rows are then drawn within theirs, so none is lost.
    """
    if len(rows) < 2:
        return total(rows), total(rows)
    return _interval([total([rows[i] for i in pick]) for pick in _picks(sets or [None] * len(rows), seed)])


def bootstrap_mean(values: Sequence[float], seed: str) -> tuple[float, float]:
    """The same for a mean of numbers, much faster."""
    if len(values) < 2:
        return float(np.mean(values)), float(np.mean(values))
    array = np.asarray(values)
    return _interval([float(array[pick].mean()) for pick in _picks([None] * len(values), seed)])


def _picks(sets: Sequence[Any], seed: str) -> np.ndarray:
    """Row numbers of every resample: [RESAMPLES, rows], as many of each set as there are."""
    draw = np.random.default_rng(int(hashlib.sha256(seed.encode()).hexdigest()[:8], 16))
    members = [np.flatnonzero([value == name for value in sets]) for name in dict.fromkeys(sets)]
    return np.hstack([rows[draw.integers(0, len(rows), size=(RESAMPLES, len(rows)))] for rows in members])


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def given(low: float | None, high: float | None, count: int) -> tuple[float, float] | None:
    """An interval where `count` samples can give one: fewer than FEWEST say too little, and samples that are all alike
    have a bootstrap without width, which is not certainty."""
    return None if low is None or high is None or low == high or count < FEWEST else (low, high)


def judge(low: float, high: float, pairs: int, lower: bool) -> str:
    """What an interval of a difference to dense says: "worse", "better", or "" where it says neither."""
    if pairs < FEWEST or low <= 0 <= high:
        return ""
    return "better" if (high < 0) == lower else "worse"
