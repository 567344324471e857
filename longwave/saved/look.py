"""What a saved file holds, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longwave.methods.base import Bound
from longwave.saved.binding import unpack
from longwave.saved.coded import segments
from longwave.saved.container import VERSION, Reader


@dataclass(frozen=True)
class Saved:
    """What `look` found. tokens: columns of every row, padding included; rows: real tokens of each. nbytes: of the
    file; dense_nbytes: of a dense cache of the same tokens. method: in words. kind: "exact" or "coded"."""

    path: str
    version: str
    kind: str
    method: str
    model: str
    tokens: int
    rows: list[int]
    nbytes: int
    dense_nbytes: int
    segments: int
    about: dict[str, Any]

    @property
    def ratio(self) -> float:
        return self.nbytes / self.dense_nbytes

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def look(path: str | Path, whole: bool = True) -> Saved:
    """What a file says of itself. whole: every byte is read and checked. SavedCacheError where something is wrong."""
    with open(path, "rb") as file:
        reader = Reader(file, Path(path), where)
        if whole:
            for name in reader.index:
                reader.tensor(name)
        facts = reader.facts
        return Saved(
            path=str(path),
            version=VERSION,
            kind=facts["kind"],
            method=facts["method"],
            model=facts["model"]["name"],
            tokens=facts["tokens"],
            rows=facts["rows"],
            nbytes=reader.nbytes,
            dense_nbytes=facts["dense_nbytes"],
            segments=sum(".segments." in name for name in reader.index),
            about=facts["about"],
        )


def bound_of(path: str | Path) -> Bound:
    """What the cache of an exact file is bound to."""
    with open(path, "rb") as file:
        reader = Reader(file, Path(path), where)
        plan = {name: reader.tensor(name) for name in reader.index if name.startswith("plan.")}
        return unpack(reader.facts["plan"], plan)


def where(name: str, facts: Mapping[str, Any]) -> str:
    """A tensor of a file in words: which tokens, which layer."""
    kind, *parts = name.split(".")
    if kind == "ids":
        return "the token ids"
    if kind == "plan":
        return "the plan of its method"
    if kind == "layers":
        return f"layer {int(parts[0])} ({'.'.join(parts[1:])}), of tokens 0 to {max(facts['rows']) - 1}"
    row = int(parts[0])
    if parts[1] != "segments":
        return f"the first and last tokens of row {row} ({parts[1].upper()})"
    found = {(row, number): span for row, number, *span in segments(facts["rows"], facts["segment"])}
    start, stop = found[row, int(parts[2])]
    return f"tokens {start} to {stop - 1} of row {row}"
