"""pyramidkv: snapkv with more tokens in the first layers and few in the last.

Source: PyramidKV, arXiv 2406.02069: of a mean budget m the last layer keeps m / beta, the first 2 m - m / beta, and
those between lie on a line. Where the first would be given more than there is, it keeps all and the line is flatter, so
that the mean holds. Window and sinks come on top in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longwave.methods.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Tokens that the window's queries attend to, fewer from layer to layer (PyramidKV).

    beta: the mean number of tokens over the last layer's, at least 1 (all layers alike).
    """

    name: ClassVar[str] = "pyramidkv"

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not 1 <= self.beta < float("inf"):
            raise ValueError(
                f"beta is how many times the last layer's tokens the mean layer keeps, at least 1; got {self.beta!r}"
            )
        if self.store is not None:
            raise ValueError(
                "pyramidkv keeps another number of tokens in every layer, and pages take as many in all: leave store "
                "out, or use snapkv with it"
            )

    def spread(self, mean: float, most: float, layers: int) -> tuple[float, ...]:
        first = min(most, 2 * mean - mean / self.beta)
        last = 2 * mean - first
        return tuple(first + (last - first) * (i / (layers - 1) if layers > 1 else 0.5) for i in range(layers))
