"""K and V of whole rows as blobs of a coder, between first and last tokens in other forms; and back, some layers at a
time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch

from longwave.budget import human
from longwave.frame import LongCache, MemoryLayer
from longwave.methods.segmented import SegmentedLayer
from longwave.saved.container import SavedCacheError
from longwave.saved.ends import ends, from_ends
from longwave.store.state import State, under, within

SINKS, WINDOW = 4, 128  # first and last tokens of a row, which are not the coder's


class Coder(Protocol):
    """What codes segments: `longwave.codec.SegmentCodec`, or anything like it. Immutable, for one model.

    tokens: of a segment at most. fingerprint: of all that a blob's meaning depends on. A coder may have `group`, the
    memory layers that it decodes best together; without it that is one. It may have `decode_many`, as SegmentCodec has:
    on a GPU that is what it is fast by. One that is `lossless` gives back what it was
    given, and the ends of rows beside it stay as they are, too.
    """

    tokens: int
    fingerprint: bytes

    def bound(self, n: int, max_bytes: int | None = None) -> int:
        """A hard upper bound of a segment of n tokens."""
        ...

    def encode(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        start: int | None = None,
        out: Any = None,
        max_bytes: int | None = None,
    ) -> Any:
        """The blob of k, v [layers, n, kv_heads, head_dim], rotated, whose first token is the row's number `start`;
        ids int64 [n]. Without `out` its bytes."""
        ...

    def decode(
        self, blob: Any, k: torch.Tensor, v: torch.Tensor, *, layers: range | None = None, start: int | None = None
    ) -> None:
        """Write K and V of some memory layers, by their number among those, into k, v as above, of any strides."""
        ...


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


class Room:
    """Bytes that all segments of so many tokens have together. One takes up to twice its share, as long as half of
    theirs is left to those after it."""

    def __init__(self, room: int, tokens: int):
        self._room, self._left, self._share = room, tokens, room / max(1, tokens)

    def encode(
        self, layers: list[MemoryLayer], coder: Coder, ids: torch.Tensor, row: int, start: int, stop: int
    ) -> Any:
        """The blob of a segment of a row, with its ids [n]. ValueError where the coder takes more than it may."""
        n = stop - start
        most = int(
            max(self._room * n / self._left, min(2 * self._share * n, self._room - self._share * (self._left - n) / 2))
        )
        k, v = _gathered(layers, row, start, stop)
        blob = coder.encode(k, v, ids=ids, start=start, max_bytes=most)
        if len(blob) > most:
            raise ValueError(
                f"the codec takes {len(blob):,} bytes for tokens {start} to {stop - 1} of row {row}, which may have "
                f"{most:,} ({human(self._room)} are left for {self._left:,} tokens): give a larger size"
            )
        self._room, self._left = self._room - len(blob), self._left - n
        return blob


def encode(cache: LongCache, ids: torch.Tensor, coder: Coder, room: int) -> dict[str, torch.Tensor]:
    """Every segment as "rows.ROW.segments.NUMBER" uint8 [bytes], together in `room` bytes at most.

    ids int64 [batch, columns or more]. ValueError where the coder takes more than it is given.
    """
    layers, mask = list(cache.memory_layers()), cache.mask()
    made: dict[str, torch.Tensor] = {}
    todo = list(segments(layers[0].rows, coder.tokens))
    left = Room(room, sum(stop - start for *_, start, stop in todo))
    for row, number, start, stop in todo:
        own = ids[row, : mask.shape[1]][mask[row]][start:stop]
        made |= segment(row, number, left.encode(layers, coder, own, row, start, stop))
    return made


def segment(row: int, number: int, blob: Any) -> dict[str, torch.Tensor]:
    """A blob as a file has it."""
    return {f"rows.{row}.segments.{number}": torch.frombuffer(bytearray(blob), dtype=torch.uint8)}


def decode_all(
    coder: Coder,
    blobs: Sequence[Any],
    ks: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    layers: range,
    starts: Sequence[int],
) -> None:
    """Several segments, together where the coder can."""
    many = getattr(coder, "decode_many", None)
    if many is not None:
        many(blobs, ks, vs, layers=layers, starts=starts)
        return
    for one, k, v, start in zip(blobs, ks, vs, starts, strict=True):
        coder.decode(one, k, v, layers=layers, start=start)


def _gathered(layers: list[MemoryLayer], row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [layers, n, kv_heads, head_dim] of some tokens, on the layers' device, or the host where they differ."""
    spans = [layer.span(row, start, stop) for layer in layers]
    where = {k.device for k, _ in spans}
    device = where.pop() if len(where) == 1 else torch.device("cpu")
    k, v = (torch.stack([x.to(device).transpose(0, 1) for x in side]) for side in zip(*spans, strict=True))
    return k, v


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
        self._held: tuple[range, torch.Tensor, torch.Tensor] | None = None
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

    @property
    def _span(self) -> int:
        """Layers that are decoded together."""
        return max(1, getattr(self._coder, "group", 1))

    def layer(self, position: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [batch, kv_heads, longest, head_dim] of memory layer number `position`, zeros behind a row's end.

        Holds what the coder decodes together, until a layer of others is asked for.
        """
        if self._held is None or position not in self._held[0]:
            self._held = None
            first = position // self._span * self._span
            self._held = self._decode(
                range(first, min(first + self._span, len(self._tensors["rows.0.k.kept"]))), device
            )
        own, k, v = self._held
        if self._span == 1:
            self._held = None
        return k[position - own[0]].to(device), v[position - own[0]].to(device)

    def _decode(self, own: range, device: torch.device) -> tuple[range, torch.Tensor, torch.Tensor]:
        like = self._tensors["rows.0.k.kept"]
        shape = (len(own), len(self.rows), like.shape[1], max(self.rows), like.shape[3])
        made = torch.zeros(shape, dtype=like.dtype, device=device), torch.zeros(shape, dtype=like.dtype, device=device)
        for side, x in zip("kv", made, strict=True):
            for row, seen in enumerate(self.rows):
                kept = from_ends(within(f"rows.{row}.{side}", self._tensors), slice(own[0], own[-1] + 1)).to(device)
                first = seen if seen <= SINKS + WINDOW else SINKS
                x[:, row, :, :first] = kept[:, :, :first]
                x[:, row, :, seen - (kept.shape[2] - first) : seen] = kept[:, :, first:]
        todo = list(segments(self.rows, self._coder.tokens))
        blobs = [self._tensors[f"rows.{row}.segments.{number}"].numpy().tobytes() for row, number, *_ in todo]
        ks, vs = ([x[:, row, :, start:stop].transpose(1, 2) for row, _, start, stop in todo] for x in made)
        try:
            decode_all(self._coder, blobs, ks, vs, own, [start for _, _, start, _ in todo])
        except ValueError:
            for (row, _, start, stop), blob, k, v in zip(todo, blobs, ks, vs, strict=True):  # which one it is
                try:
                    self._coder.decode(blob, k, v, layers=own, start=start)
                except ValueError as error:
                    where = f"tokens {start} to {stop - 1} of row {row}"
                    raise SavedCacheError(f"{self._path}: {where}: {error}") from error
            raise
        return own, *made
