"""A blob in its parts: read and checked once, decoded as often as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longwave.codec import blob as form
from longwave.codec.blob import CodecError, Header
from longwave.threads import side_by_side


@dataclass(frozen=True, eq=False)
class Opened:
    """ids int64 [tokens], None where they are not known. head: raw K and V. parts: of each group of layers, none where
    all is raw."""

    header: Header
    ids: NDArray[np.int64] | None
    head: memoryview
    parts: list[memoryview]

    @property
    def coded(self) -> int:
        """Tokens that are not raw."""
        return self.header.tokens - self.header.raw

    @property
    def kind(self) -> tuple[int, int, int, bool]:
        """(step, raw tokens, coded tokens, whether its ids are known): segments that are alike in it have one form."""
        assert self.header.step is not None
        return self.header.step, self.header.raw, self.coded, self.ids is not None


@dataclass(frozen=True)
class Opener:
    """Opens blobs of one codec. fingerprint: its. tokens: of a segment at most. channels: of K in all layers."""

    fingerprint: bytes
    tokens: int
    vocabulary: int
    channels: int
    groups: int

    def all(self, blobs: Sequence[Any]) -> list[Opened]:
        """Those that are not open yet are opened."""
        return side_by_side(self.one, blobs)

    def one(self, blob: Any) -> Opened:
        """CodecError for whatever is wrong with it that can be known without decoding its parts."""
        if isinstance(blob, Opened):
            return blob
        header, rest = form.parse(blob)
        if header.fingerprint != self.fingerprint[:8]:
            raise CodecError(
                f"this segment was coded by another codec ({header.fingerprint.hex()}, this one is "
                f"{self.fingerprint[:8].hex()}): another model's, or one fitted again"
            )
        ids = None if header.ids is None else np.array(header.ids, np.int64)
        if header.tokens > self.tokens or (ids is not None and ids.max() >= self.vocabulary):
            raise CodecError(f"this segment's header is wrong: {header.tokens} tokens, or ids that the model has not")
        raw = 2 * self.channels * header.raw * header.dtype.itemsize
        return Opened(header, ids, *form.split(rest, raw, 0 if header.step is None else self.groups))
