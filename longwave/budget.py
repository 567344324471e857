"""The user's one dial: a fraction of the dense bytes, or a size in bytes.

A fraction bounds the middle, that is what one more token costs; a size bounds the whole cache for the tokens that are
coming.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a budget is read, and refused, without torch
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


@dataclass(frozen=True)
class Room:
    """A budget given as a size, and what it must do for.

    size: bytes of the whole cache. tokens: of each row, prompt and new ones. rows: of the batch. known: whether anybody
    said what is coming; where nobody did, tokens is the model's window.
    """

    size: int
    tokens: int
    rows: int = 1
    known: bool = True

    def __str__(self) -> str:
        window = "" if self.known else ", this model's window (max_tokens= says how many are coming)"
        return f"{self.rows} x {self.tokens:,} tokens{window}"


class DoesNotFit(ValueError):
    """A size that a method cannot meet. needed: the bytes of the smallest that it can."""

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed


def bind_to_size(method: Method, shape: CacheShape, profile: Profile | None, room: Room) -> Bound:
    """`method` bound to the largest fraction whose peak stays within the room; what fits dense stays dense.

    Raises DoesNotFit where no fraction does.
    """

    def bound(fraction: float | None) -> tuple[Bound, int]:
        candidate = method.bind(shape, profile, fraction)
        return candidate, candidate.peak_bytes(room.tokens, room.rows)

    if not method.fits_budget():
        for some in (method.near(), method):  # elsewhere lies what the device has no room for
            candidate = some.bind(shape, profile, None)
            needed = candidate.device_bytes(room.tokens, room.rows)
            if needed <= room.size:
                return candidate
        raise DoesNotFit(
            f"{human(room.size)} cannot hold {room}: {candidate} takes {human(needed)} ({needed} bytes), and its "
            "options leave nothing to save",
            needed,
        )
    whole, needed = bound(1.0)  # first, since it needs no profile
    if needed <= room.size:
        return whole
    low, high = method.least_budget(shape, profile), 1.0
    candidate, needed = bound(low)
    if needed > room.size:
        raise DoesNotFit(
            f"{human(room.size)} cannot hold {room}: the smallest that {method.name} can do is {human(needed)} "
            f"({needed} bytes), with the window and the other options as they are",
            needed,
        )
    for _ in range(24):
        middle = (low + high) / 2
        trial, needed = bound(middle)
        if needed <= room.size:
            low, candidate = middle, trial
        else:
            high = middle
    return candidate
