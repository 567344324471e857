"""The user's one dial: a fraction of the dense bytes, or a size in bytes.

A fraction bounds the middle, that is what one more token costs; a size bounds the whole cache for the longest
sequence it is built for.
"""

import math
import re

from longwave.methods.base import Bound, Method
from longwave.plan.profile import Profile
from longwave.shape import CacheShape

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_budget(budget: float | str) -> tuple[float | None, int | None]:
    """(fraction, None) or (None, bytes): 0.25, "25%", "0.25", "512MiB", "2GB"."""
    wrong = f'a budget is a fraction such as 0.25 or "25%", or a size such as "512MiB" or "2GB"; got {budget!r}'
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z%]*)\s*", budget)
        if match is None:
            raise ValueError(wrong)
        number, unit = float(match[1]), match[2].upper()
        if unit in UNITS:
            size = number * UNITS[unit]
            if not 1 <= size < math.inf:
                raise ValueError(wrong)
            return None, math.floor(size)
        if unit not in ("", "%"):
            raise ValueError(wrong)
        budget = number / 100 if unit == "%" else number
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ValueError(wrong)
    return float(budget), None


def human(size: int) -> str:
    """A size for people: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.4g} GiB"


def bind_to_size(
    method: Method, shape: CacheShape, profile: Profile | None, size: int, tokens: int, batch: int
) -> Bound:
    """`method` bound to the largest fraction whose peak for `batch` rows of `tokens` stays within `size` bytes."""

    def bound(fraction: float | None) -> tuple[Bound, int]:
        candidate = method.bind(shape, profile, fraction)
        return candidate, candidate.peak_bytes(tokens, batch)

    where = f"{batch} x {tokens:,} tokens"
    if not method.fits_budget():
        candidate, needed = bound(None)
        if needed > size:
            raise ValueError(f"{candidate} holds {human(needed)} for {where}, more than the budget of {human(size)}")
        return candidate
    whole, needed = bound(1.0)  # first, since it needs no profile
    if needed <= size:
        return whole
    low, high = method.least_budget(shape, profile), 1.0
    candidate, needed = bound(low)
    if needed > size:
        raise ValueError(
            f"{human(size)} cannot hold {where}: the smallest that {method.name} can do is {human(needed)} "
            f"({needed} bytes), with the window and the other options as they are"
        )
    for _ in range(24):
        middle = (low + high) / 2
        trial, needed = bound(middle)
        if needed <= size:
            low, candidate = middle, trial
        else:
            high = middle
    return candidate
