"""What codes segments, as the rest of the package asks it, and the bytes that it may take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

SINKS, WINDOW = 4, 128  # first and last tokens of a row, which are not the coder's


class Coder(Protocol):
    """What codes segments: `longwave.codec.SegmentCodec`, or anything like it. Immutable, for one model.

    tokens: of a segment at most. fingerprint: of all that a blob's meaning depends on. A coder may have `groups`, the
    memory layers that it decodes best together; without them that is each alone. It may have `parts`, coders of these
    groups alone, in order. It may have `decode_many`, as SegmentCodec has, and `encode_many`, for as many segments as
    its `together` says: on a GPU that is what it is fast by. It may have `open`, from blobs to what `decode` and
    `decode_many` take in their place, when they are decoded more than once. One that is `lossless` gives back what it
    was given, and the ends of rows beside it stay as they are, too.
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


def together(coder: Coder, layers: int) -> list[range]:
    """So many layers, in the groups that a coder of them decodes together."""
    return list(getattr(coder, "groups", [range(layer, layer + 1) for layer in range(layers)]))


class Share:
    """Bytes that segments may have where nobody knows how many will come: each up to twice its tokens' share."""

    def __init__(self, share: float):
        """share: bytes a token."""
        self.share = share

    def most(self, n: int) -> int:
        """Bytes that the next n tokens may take."""
        return int(2 * self.share * n)

    def take(self, n: int, nbytes: int) -> None:
        """The next n tokens took so many."""

    def __str__(self) -> str:
        return f"twice {self.share:,.0f} a token"


class Room(Share):
    """Bytes that all segments of so many tokens have together. One takes up to twice its share, as long as half of
    theirs is left to those after it."""

    def __init__(self, room: int, tokens: int):
        super().__init__(room / max(1, tokens))
        self._room, self._left = room, tokens

    def most(self, n: int) -> int:
        spared = self._room - self.share * (self._left - n) / 2
        return int(max(self._room * n / self._left, min(2 * self.share * n, spared)))

    def take(self, n: int, nbytes: int) -> None:
        self._room, self._left = self._room - nbytes, self._left - n

    def __str__(self) -> str:
        return f"{self._room:,} are left for {self._left:,} tokens"


def run_of(coder: Coder) -> int:
    """Tokens that follow each other and are best given to `encode_all` at once."""
    return coder.tokens * int(getattr(coder, "together", 1))


def encode_all(
    coder: Coder, room: Share, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, start: int, row: int = 0
) -> list[Any]:
    """The blobs of a row's tokens k, v [layers, n, kv_heads, head_dim], ids [n], segment by segment. ValueError where
    the coder takes more than it may.

    Side by side, where the coder can, each may take what it might if it were the first; what then is too much for a
    later one is coded again.
    """
    starts = list(range(start, start + k.shape[1], coder.tokens))
    ks, vs, own = (x.split(coder.tokens, dim) for x, dim in ((k, 1), (v, 1), (ids, 0)))
    blobs: list[Any] = [None] * len(starts)
    many = getattr(coder, "encode_many", None)
    if many is not None and len(starts) > 1:
        blobs = many(ks, vs, ids=own, starts=starts, max_bytes=[room.most(x.shape[1]) for x in ks])
    for i, first in enumerate(starts):
        n = ks[i].shape[1]
        most = room.most(n)
        if blobs[i] is None or len(blobs[i]) > most:
            blobs[i] = coder.encode(ks[i], vs[i], ids=own[i], start=first, max_bytes=most)
        if len(blobs[i]) > most:
            raise ValueError(
                f"the codec takes {len(blobs[i]):,} bytes for tokens {first} to {first + n - 1} of row {row}, which "
                f"may have {most:,} ({room}): give a larger size"
            )
        room.take(n, len(blobs[i]))
    return blobs


def opened(coder: Coder, blobs: Sequence[Any]) -> Sequence[Any]:
    """Blobs as the coder decodes them again and again."""
    found = getattr(coder, "open", None)
    return blobs if found is None else list(found(blobs))


def decode_all(
    coder: Coder,
    blobs: Sequence[Any],
    ks: Sequence[torch.Tensor],
    vs: Sequence[torch.Tensor],
    layers: range,
    starts: Sequence[int],
) -> None:
    """Several segments, side by side where the coder can."""
    many = getattr(coder, "decode_many", None)
    if many is not None:
        many(blobs, ks, vs, layers=layers, starts=starts)
        return
    for one, k, v, start in zip(blobs, ks, vs, starts, strict=True):
        coder.decode(one, k, v, layers=layers, start=start)
