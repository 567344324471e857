"""K and V of whole rows as blobs of a coder, between first and last tokens in other forms; and back, some layers at a
time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from longwave.codec.coder import SINKS, WINDOW, Coder, Room, decode_all, encode_all, opened, run_of, together
from longwave.codec.latest import Latest
from longwave.codec.middle import gathered
from longwave.frame import LongCache
from longwave.methods.segmented import SegmentedLayer
from longwave.saved.container import SavedCacheError
from longwave.saved.ends import ends, from_ends
from longwave.store.state import State, under, within


def whole(cache: LongCache) -> None:
    """ValueError where a cache cannot give K and V of every token back."""
    for layer in cache.memory_layers():
        if layer.held() != layer.rows:
            raise ValueError(
                f"{cache.method} has dropped tokens, whose K and V are not to be had: save with exact=True"
            )
        if getattr(layer, "slots", False):
            raise ValueError(f"{cache.method} turns keys to their place in the cache: save with exact=True")
        if isinstance(layer, SegmentedLayer) and layer.merged and layer.store is not None and any(layer.store.tokens):
            raise ValueError(f"{cache.method} has merged tokens, which K and V alone do not say: save with exact=True")


def segments(rows: Sequence[int], tokens: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, number, start, stop) of each coded segment of rows of so many tokens; the last of a row may be short."""
    for row, seen in enumerate(rows):
        for number, start in enumerate(range(SINKS, seen - WINDOW, tokens)):
            yield row, number, start, min(start + tokens, seen - WINDOW)


def ends_of(cache: LongCache, coder: Coder) -> State:
    """What is not the coder's of each row, under "rows.ROW.k" and "rows.ROW.v" its parts (ends.py), on the host."""
    layers, made = list(cache.memory_layers()), State()
    for row, seen in enumerate(layers[0].rows):
        short = seen <= SINKS + WINDOW
        parts = [(0, seen)] if short else [(0, SINKS), (seen - WINDOW, seen)]
        sides: list[list[torch.Tensor]] = [[], []]
        for layer in layers:
            spans = [layer.span(row, *part) for part in parts]
            for side, found in zip(sides, zip(*spans, strict=True), strict=True):
                side.append(torch.cat(found, 1).cpu())
        for name, side in zip("kv", sides, strict=True):
            kept = ends(torch.stack(side), SINKS, exact=short or getattr(coder, "lossless", False))
            made |= under(f"rows.{row}.{name}", kept)
    return made


def encode(cache: LongCache, ids: torch.Tensor, coder: Coder, room: int) -> dict[str, torch.Tensor]:
    """Every segment as "rows.ROW.segments.NUMBER" uint8 [bytes], together in `room` bytes at most.

    ids int64 [batch, columns or more]. ValueError where the coder takes more than it is given.
    """
    layers, mask = list(cache.memory_layers()), cache.mask()
    made: dict[str, torch.Tensor] = {}
    rows, run = layers[0].rows, run_of(coder)
    middles = [range(SINKS, max(SINKS, seen - WINDOW)) for seen in rows]
    left = Room(room, sum(map(len, middles)))
    for row, middle in enumerate(middles):
        own, blobs = ids[row, : mask.shape[1]][mask[row]], []
        for start in middle[::run]:
            stop = min(start + run, middle.stop)
            blobs += encode_all(coder, left, *gathered(layers, row, start, stop), own[start:stop], start, row)
        for number, blob in enumerate(blobs):
            made[segment(row, number)] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return made


def segment(row: int, number: int) -> str:
    """What a file calls a blob."""
    return f"rows.{row}.segments.{number}"


class Coded:
    """Coded rows of a file. rows: tokens of each. coder: what coded them; None: `fit` makes it, when the first layer is
    asked for. SavedCacheError where it is not the same."""

    def __init__(
        self,
        facts: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        coder: Coder | None,
        fit: Callable[[], Coder],
        path: Any,
    ):
        self.rows: list[int] = list(facts["rows"])
        self._facts, self._tensors, self._path = facts, tensors, path
        self._given, self._fit = coder, fit
        self._latest = Latest(self._decode)
        if coder is not None:
            self._checked(coder)

    def _checked(self, coder: Coder) -> Coder:
        if self._facts["coder"] != coder.fingerprint.hex():
            raise SavedCacheError(
                f"{self._path} was coded by another codec, or one fitted otherwise, than this model's here: copy "
                "codec-*.safetensors from the folder `profiles` of longwave's cache where it was saved, or give coder="
            )
        return coder

    @cached_property
    def _coder(self) -> Coder:
        return self._checked(self._fit()) if self._given is None else self._given

    @cached_property
    def _todo(self) -> list[tuple[int, int, int, int]]:
        return list(segments(self.rows, self._coder.tokens))

    @cached_property
    def _blobs(self) -> Sequence[Any]:
        blobs = [self._tensors[segment(row, number)].numpy().data for row, number, *_ in self._todo]
        try:
            return opened(self._coder, blobs)
        except ValueError:
            self._accuse(lambda i: opened(self._coder, blobs[i : i + 1]))
            raise

    def _accuse(self, work: Callable[[int], Any]) -> None:
        """Say which segment it is that cannot be read."""
        for i, (row, _, start, stop) in enumerate(self._todo):
            try:
                work(i)
            except ValueError as error:
                where = f"tokens {start} to {stop - 1} of row {row}"
                raise SavedCacheError(f"{self._path}: {where}: {error}") from error

    def layer(self, position: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [batch, kv_heads, longest, head_dim] of memory layer number `position`, zeros behind a row's end.

        Holds what the coder decodes together, until its last layer was asked for, or one of others.
        """
        layers = len(self._tensors["rows.0.k.kept"])
        own = next(group for group in together(self._coder, layers) if position in group)
        k, v = self._latest.get((own, device))
        if position == own[-1]:
            self._latest.forget()
        return k[position - own[0]], v[position - own[0]]

    def _decode(self, key: tuple[range, torch.device]) -> tuple[torch.Tensor, torch.Tensor]:
        own, device = key
        like = self._tensors["rows.0.k.kept"]
        shape = (len(own), len(self.rows), like.shape[1], max(self.rows), like.shape[3])
        made = torch.zeros(shape, dtype=like.dtype, device=device), torch.zeros(shape, dtype=like.dtype, device=device)
        for side, x in zip("kv", made, strict=True):
            for row, seen in enumerate(self.rows):
                kept = from_ends(within(f"rows.{row}.{side}", self._tensors), slice(own[0], own[-1] + 1)).to(device)
                first = seen if seen <= SINKS + WINDOW else SINKS
                x[:, row, :, :first] = kept[:, :, :first]
                x[:, row, :, seen - (kept.shape[2] - first) : seen] = kept[:, :, first:]
        todo = self._todo
        ks, vs = ([x[:, row, :, start:stop].transpose(1, 2) for row, _, start, stop in todo] for x in made)
        try:
            decode_all(self._coder, self._blobs, ks, vs, own, [start for _, _, start, _ in todo])
        except ValueError:
            self._accuse(lambda i: self._coder.decode(self._blobs[i], ks[i], vs[i], layers=own, start=todo[i][2]))
            raise
        return made
