"""A blob that is about to be decoded: its parts, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from longwave.codec.blob import Header


@dataclass(frozen=True, eq=False)
class Opened:
    """head: raw K and V. parts: of each group of layers, none where all is raw. k, v: what is written into. start: the
    position that the first token gets."""

    header: Header
    head: memoryview
    parts: list[memoryview]
    k: Tensor
    v: Tensor
    start: int

    @property
    def coded(self) -> int:
        """Tokens that are not raw."""
        return self.header.tokens - self.header.raw

    @property
    def kind(self) -> tuple[int, int, bool]:
        """(step, coded tokens, whether its ids are known): segments that are alike in it have one form."""
        assert self.header.step is not None
        return self.header.step, self.coded, self.header.ids is not None


def runs(wanted: Sequence[int], groups: Sequence[range]) -> dict[int, list[tuple[int, range]]]:
    """By group of layers, (place of the first, layers) of those wanted that lie side by side in both: they are made at
    once, and of a group that nobody wants nothing is."""
    found: dict[int, list[tuple[int, range]]] = {}
    for place, layer in enumerate(wanted):
        own = found.setdefault(next(g for g, group in enumerate(groups) if layer in group), [])
        if own and own[-1][0] + len(own[-1][1]) == place and own[-1][1].stop == layer:
            own[-1] = own[-1][0], range(own[-1][1].start, layer + 1)
        else:
            own.append((place, range(layer, layer + 1)))
    return found
