"""`Report`: what a cache holds, and what a dense one would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

OTHERS = "other layers"  # a part of its own: sliding and linear layers of a hybrid


@dataclass(frozen=True)
class Report:
    """What a cache holds. Bytes are those of real storages; `ratio` is nbytes / dense_nbytes, of the whole cache.

    tokens: seen; held: in the longest row of the layer that holds most. parts: bytes by what they are for. scratch:
    bytes that a pass took at most for the time that it ran. answers: what attends over what is stored, kernel or plain
    torch, and why (empty before it did). host: of nbytes, those in host memory, where the model is elsewhere or the
    cache is parked. mapped: of nbytes, those in files that are mapped into memory. Of a cache that holds nothing there
    is none: ValueError.
    """

    method: str
    tokens: int
    held: int
    batch: int
    nbytes: int
    dense_nbytes: int
    parts: dict[str, int]
    scratch: int = 0
    host: int = 0
    mapped: int = 0
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError(
                f"no token was read into this cache of {self.method}: give it to a model first, and if you did, the "
                "model has not used it"
            )

    @property
    def ratio(self) -> float:
        return self.nbytes / self.dense_nbytes

    @property
    def device(self) -> int:
        """Bytes that lie where the model does, and in no file."""
        return self.nbytes - self.host - self.mapped

    @property
    def others(self) -> int:
        """Bytes of layers that are not the method's (sliding, linear): a dense cache holds the same there."""
        return self.parts.get(OTHERS, 0)

    @property
    def memory_ratio(self) -> float:
        """`ratio` of the method's own layers."""
        return (self.nbytes - self.others) / (self.dense_nbytes - self.others)

    def as_dict(self) -> dict[str, Any]:
        own = {"ratio": self.ratio, "memory_ratio": self.memory_ratio}
        return {**self.__dict__, "answers": list(self.answers), **own}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size:,}" for name, size in self.parts.items() if size)
        held = "" if self.held == self.tokens else f" ({self.held:,} held)"
        others = (
            f"; {self.memory_ratio:.3f} without the other layers, which hold {self.others:,} bytes in a dense cache too"
        )
        scratch = f"; a pass took {self.scratch:,} more" if self.scratch else ""
        host = f"; {self.host:,} of the bytes in host memory" if self.host else ""
        mapped = f"; {self.mapped:,} of the bytes in mapped files" if self.mapped else ""
        answers = f"; answered by {', '.join(self.answers)}" if self.answers else ""
        return (
            f"ratio {self.ratio:.3f}: {self.nbytes:,} bytes held, {self.dense_nbytes:,} in a dense cache; "
            f"{self.method}, {self.tokens:,} tokens{held} x {self.batch} rows [{parts}]"
            f"{others if self.others else ''}{scratch}{host}{mapped}{answers}"
        )


def tensors_in(held: Any) -> Iterator[torch.Tensor]:
    """Every tensor in an object's attributes, lists and dicts: linear layers keep their states in any of them."""
    met: set[int] = set()
    found = [held]
    while found:
        held = found.pop()
        if isinstance(held, torch.Tensor):
            yield held
        elif id(held) not in met and not isinstance(held, type):
            met.add(id(held))
            if isinstance(held, (list, tuple, set)):
                found += held
            else:
                found += (held if isinstance(held, dict) else getattr(held, "__dict__", {})).values()
