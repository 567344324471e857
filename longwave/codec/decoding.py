"""K and V of segments from their numbers: those that are alike side by side, a group of layers at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longwave.codec import entropy
from longwave.codec.blob import CodecError
from longwave.codec.contexts import contexts
from longwave.codec.expand import Turn, expand
from longwave.codec.opened import Opened
from longwave.codec.placed import Placed
from longwave.codec.predict import Said, Tokens
from longwave.codec.quantise import restore, step_of
from longwave.codec.rotation import Rotation
from longwave.codec.streams import Numbers, Streams
from longwave.codec.transform import along

NUMBERS = 2**25  # of K or V of a group of layers that are made at once, in some float32 each


@dataclass(frozen=True, eq=False)
class Target:
    """A segment, and what it is written into: k, v [layers, tokens, kv_heads, head_dim]. start: the position that the
    first token gets."""

    opened: Opened
    k: Tensor
    v: Tensor
    start: int


@dataclass(frozen=True, eq=False)
class Decoder:
    """What is needed beside a segment, on a device and in the type that is computed in. sides: of K and of V. groups:
    layers, of each part of a blob. cosines: whether time is transformed."""

    streams: Streams
    sides: Sequence[Placed]
    rotation: Rotation
    table: Tensor
    groups: Sequence[range]
    kv_heads: int
    cosines: bool
    device: torch.device
    dtype: torch.dtype

    def fill(self, some: Sequence[Target], wanted: Sequence[int]) -> None:
        """Write what segments stand for. Nothing is written before all of them are known to be right, else a
        CodecError says what is not."""
        todo = runs(wanted, self.groups)
        alike: dict[tuple[int, int, int, bool], list[Target]] = {}
        for one in some:
            if one.opened.header.step is not None:
                alike.setdefault(one.opened.kind, []).append(one)
        made: list[tuple[list[Target], dict[int, Numbers]]] = []
        told: list[tuple[int, Tensor]] = []
        for (step, _, n, known), same in alike.items():
            made.append((same, {}))
            for g in todo:
                sizes = tuple(side.scales(g, known) for side in self.sides)
                place = contexts(sizes, step, n, self.cosines, self.streams.place)
                try:
                    numbers, fine = self.streams.decode([one.opened.parts[g] for one in same], place)
                except entropy.Broken as error:
                    raise self._damaged(g, error) from None
                made[-1][1][g] = numbers
                told += [] if fine is None else [(g, fine)]
        if told and not bool(torch.cat([fine for _, fine in told]).all()):
            raise self._damaged(next(g for g, fine in told if not bool(fine.all())), entropy.ENDS)
        for one in some:
            if one.opened.header.raw:
                self._write_raw(one, wanted)
        for same, numbers_of in made:
            widest = max(len(group) for group in self.groups) * self.kv_heads * same[0].k.shape[3]
            count = max(1, NUMBERS // max(1, same[0].opened.coded * widest))
            for first in range(0, len(same) if same[0].opened.coded else 0, count):
                self._write(same[first : first + count], first, todo, numbers_of)

    def _damaged(self, group: int, why: object) -> CodecError:
        return CodecError(
            f"the part of layers {self.groups[group][0]} to {self.groups[group][-1]} of a segment is damaged: {why}"
        )

    def _write_raw(self, one: Target, wanted: Sequence[int]) -> None:
        header, start = one.opened.header, one.start
        shape = (2, len(self.rotation.frequency), header.raw, self.kv_heads, one.k.shape[3])
        held = torch.frombuffer(bytearray(one.opened.head), dtype=header.dtype).view(shape)[:, wanted].to(self.device)
        keys = held[0]
        if start != header.start:
            rotation, positions = self.rotation.layers(list(wanted)), torch.arange(header.raw, device=self.device)
            keys = rotation.rotate(rotation.unrotate(keys.to(self.dtype), positions + header.start), positions + start)
        one.k[:, : header.raw] = keys.to(one.k.device, one.k.dtype)
        one.v[:, : header.raw] = held[1].to(one.v.device, one.v.dtype)

    def _write(
        self,
        some: Sequence[Target],
        first: int,
        todo: dict[int, list[tuple[int, range]]],
        numbers_of: dict[int, Numbers],
    ) -> None:
        """Segments that are alike, number `first` on of those whose numbers are given, by group."""
        step, raw, n, known = some[0].opened.kind
        count, width = len(some), self.kv_heads * some[0].k.shape[3]
        ids = [one.opened.ids for one in some if one.opened.ids is not None]
        tokens = Tokens.of(self.table, np.stack(ids), raw, self.dtype) if known else None
        time = along(n, self.cosines, torch.empty(0, dtype=self.dtype, device=self.device)).mT
        positions = np.arange(n) + np.array([[one.start + raw] for one in some])
        places = torch.from_numpy(positions.reshape(-1)).to(self.device, non_blocking=True)
        joined = [behind([x[:, raw:] for x in side]) for side in ([one.k for one in some], [one.v for one in some])]
        for g, asked in todo.items():
            before = self.groups[g].start * width
            axes = [side.axes(g, step, known) for side in self.sides]
            parts = numbers_of[g](first, first + count).split([x.shape[1] * n for x in axes], 1)
            for side, x, q, targets in zip(self.sides, axes, parts, joined, strict=True):
                c = (time @ restore(q.view(count, -1, n), step_of(step), self.dtype).mT).flatten(0, 1)
                for place, layers in asked:
                    cut = slice(layers.start * width, layers.stop * width)
                    rows = x[cut.start - before : cut.stop - before] / side.weight[cut, None]
                    turn = None
                    if side is self.sides[0]:
                        turn = Turn(self.rotation.layers(slice(layers.start, layers.stop)), places)
                    into = [target[place : place + len(layers)] for target in targets]
                    self._expand(c, rows, side.said(tokens, cut), turn, into)

    def _expand(self, c: Tensor, axes: Tensor, said: Said, turn: Turn | None, into: list[Tensor]) -> None:
        """Into tensors that lie apart, or elsewhere, through one here."""
        own = into[0]
        if len(into) > 1 or own.device != self.device:
            own = own.new_empty((own.shape[0], len(c), *own.shape[2:]), device=self.device)
        expand(c, axes, said, turn, own)
        if own is not into[0]:
            for target, part in zip(into, own.split([x.shape[1] for x in into], 1), strict=True):
                target.copy_(part)


def behind(xs: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [layers, n, ...] of one storage that lie one behind the other along n, as one; the others as they are."""
    found = [xs[0]]
    for x in xs[1:]:
        last = found[-1]
        follows = (
            x.device == last.device
            and x.dtype == last.dtype
            and x.stride() == last.stride()
            and x.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
            and x.storage_offset() == last.storage_offset() + last.shape[1] * last.stride(1)
        )
        if follows:
            shape = (last.shape[0], last.shape[1] + x.shape[1], *last.shape[2:])
            found[-1] = last.as_strided(shape, last.stride(), last.storage_offset())
        else:
            found.append(x)
    return found


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
