"""The middle of one row as segments of a coder, in host memory, for all memory layers.

Full segments are coded as soon as all layers that are coded together hold them. A pass expands the middle of as many
layers as the coder decodes together when the first of them attends, has that of the next ones expanded meanwhile (on a
GPU), and lets go of it behind the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from longwave.codec.coder import SINKS, WINDOW, Coder, Share, decode_all, encode_all, run_of, together
from longwave.codec.latest import Latest
from longwave.frame import MemoryLayer
from longwave.frame.attention import own_arithmetic
from longwave.store.state import State, demand, under, within


@dataclass(eq=False)
class Part:
    """Memory layers that are coded together, by number, in bytes of `room`. blobs: uint8 [bytes] of each segment.
    tokens: how many these are, from the row's number SINKS on."""

    layers: range
    coder: Coder
    room: Share
    blobs: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0

    @property
    def end(self) -> int:
        """The first token that is not coded, where any is."""
        return SINKS + self.tokens

    @property
    def starts(self) -> list[int]:
        """The first token of each segment."""
        return list(range(SINKS, self.end, self.coder.tokens))


class Middle:
    """parts: of all memory layers, in order. ahead: whether a pass expands the next group of layers meanwhile; None:
    where the layers are not on the CPU, which has nothing else to expand with."""

    def __init__(self, parts: Sequence[Part], layers: Sequence[MemoryLayer], ahead: bool | None):
        self.parts = [replace(part, blobs=[], tokens=0) for part in parts]
        self.layers, self.ahead = list(layers), ahead
        self.groups = [
            (part, range(part.layers[group[0]], part.layers[group[-1]] + 1))
            for part in self.parts
            for group in together(part.coder, len(part.layers))
        ]
        self._latest = Latest(self._expanded)

    def part(self, position: int) -> Part:
        """Of memory layer number `position`."""
        return next(part for part in self.parts if position in part.layers)

    def goes_ahead(self, device: torch.device) -> bool:
        return device.type != "cpu" if self.ahead is None else self.ahead

    def _group(self, position: int) -> int:
        return next(number for number, (_, group) in enumerate(self.groups) if position in group)

    # coding

    def settled(self, position: int) -> None:
        """Memory layer number `position` is done with a pass."""
        self.let_go(position)
        part = self.part(position)
        if position == part.layers[-1]:
            self.code(part)

    def code(self, part: Part, rest: bool = False) -> None:
        """Code the segments that are full, but for the last WINDOW tokens, and have the layers forget these tokens.
        rest: and the one that is not full, of a row that ends here."""
        layers = [self.layers[position] for position in part.layers]
        first, end, every = part.end, layers[0].rows[0] - WINDOW, part.coder.tokens
        ends = list(range(first + every, end + 1, every))
        if rest and end > (ends or [first])[-1]:
            ends.append(end)
        if not ends:
            return
        column, run = layers[0].dense.column("token")[0, 0], run_of(part.coder)
        ids = column[first - part.tokens : ends[-1] - part.tokens].long().cpu()
        blobs = []
        for start in range(first, ends[-1], run):
            stop = min(start + run, ends[-1])
            k, v = gathered(layers, 0, start, stop)
            with own_arithmetic(k.device.type):
                made = encode_all(part.coder, part.room, k, v, ids[start - first : stop - first], start)
            blobs += [torch.frombuffer(bytearray(blob), dtype=torch.uint8) for blob in made]
        part.blobs, part.tokens = [*part.blobs, *blobs], ends[-1] - SINKS
        for layer in layers:
            layer.dense.drop(SINKS, [ends[-1] - first])

    # expanding

    def of(
        self, position: int, like: torch.Tensor, start: int = SINKS, stop: int | None = None, ahead: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [1, kv_heads, tokens, head_dim] of a layer's coded tokens from `start` on, up to `stop`, as `like`
        [1, kv_heads, .., head_dim]. What comes with them is held: of their group of layers, of their segments. ahead:
        they are of a pass, which goes on to the next group."""
        number = self._group(position)
        part, group = self.groups[number]
        stop = part.end if stop is None else stop
        every = part.coder.tokens
        first, last = (start - SINKS) // every, min(-(-(stop - SINKS) // every), len(part.blobs))
        form = like.shape[1], like.shape[3], like.dtype, like.device
        then = None
        if ahead and self.goes_ahead(like.device) and number + 1 < len(self.groups):
            blobs = self.groups[number + 1][0].blobs
            then = (number + 1, 0, len(blobs), form) if blobs else None
        k, v = self._latest.get((number, first, last, form), then, like.device)
        own = slice(start - SINKS - first * every, stop - SINKS - first * every)
        k, v = (x[position - group[0], own].transpose(0, 1)[None] for x in (k, v))
        return k, v

    def _expanded(self, key: tuple[int, int, int, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Segments `first` to `last` of a group of layers: [layers, tokens, kv_heads, head_dim] each."""
        number, first, last, (heads, dim, dtype, device) = key
        part, group = self.groups[number]
        starts, before = part.starts[first:last], part.starts[first]
        ends = [min(start + part.coder.tokens, part.end) for start in starts]
        k, v = (torch.empty(len(group), ends[-1] - before, heads, dim, dtype=dtype, device=device) for _ in "kv")
        cuts = [slice(start - before, stop - before) for start, stop in zip(starts, ends, strict=True)]
        own = range(group[0] - part.layers[0], group[-1] + 1 - part.layers[0])
        blobs = [blob.numpy().data for blob in part.blobs[first:last]]
        with own_arithmetic(device.type):
            decode_all(part.coder, blobs, [k[:, cut] for cut in cuts], [v[:, cut] for cut in cuts], own, starts)
        return k, v

    def let_go(self, position: int) -> None:
        """Forget what is expanded if a layer is the last that it is of."""
        if position == self.groups[self._group(position)][1][-1]:
            self._latest.let_go()

    def expanded(self) -> list[torch.Tensor]:
        return self._latest.tensors()

    # what the first layer of a part keeps for all of them

    def state(self, position: int) -> State:
        part = self.part(position)
        if position != part.layers[0]:
            return {}
        return under("coded", {"tokens": part.tokens, **{str(i): blob for i, blob in enumerate(part.blobs)}})

    def load_state(self, position: int, state: Mapping[str, Any]) -> None:
        part = self.part(position)
        if position == part.layers[0]:
            kept = within("coded", state)
            self._latest.forget()
            part.tokens, part.blobs = kept["tokens"], [kept[str(i)] for i in range(len(kept) - 1)]
            demand(len(part.starts) == len(part.blobs), f"{part.tokens} coded tokens lie in {len(part.blobs)} segments")

    def clear(self, position: int) -> None:
        part = self.part(position)
        if position == part.layers[0]:
            self._latest.forget()
            part.blobs, part.tokens = [], 0


def gathered(layers: Sequence[MemoryLayer], row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [layers, n, kv_heads, head_dim] of some tokens, on the layers' device, or the host where they differ."""
    spans = [layer.span(row, start, stop) for layer in layers]
    where = {k.device for k, _ in spans}
    device = where.pop() if len(where) == 1 else torch.device("cpu")
    k, v = (torch.stack([x.to(device).transpose(0, 1) for x in side]) for side in zip(*spans, strict=True))
    return k, v
