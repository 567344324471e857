"""Coding one segment: tensors, ids and a position in, bytes out, and back. No model, no cache, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from longwave.codec import blob as form
from longwave.codec import entropy
from longwave.codec.blob import CodecError, Header
from longwave.codec.fitted import Fitted
from longwave.codec.placed import Placed
from longwave.codec.predict import features
from longwave.codec.quantise import OCTAVE, quantise, restore, step_of
from longwave.codec.transform import TOKENS, bands, cosines

RAW = 4  # first tokens of a text: nothing like the others, and attended to by all
FINER = OCTAVE // 4  # steps are tried so far apart where a segment must fit


class SegmentCodec:
    """Codes segments of up to 128 consecutive tokens of one row, all memory layers together, with one quantiser step.

    tokens: of a whole segment. fingerprint: 16 bytes, of all that was fitted; blobs carry the first 8. layers,
    kv_heads: what it covers, memory layers counted from 0. size: bytes aimed at over those of K and V in 16 bits.
    step: of the quantiser, 2^(step / 32) in weighted units.
    Immutable, so threads may share it; synchronous, without threads of its own. Tensors may be on any device and of any
    strides, of float16, bfloat16, float32 or float64; dtype is what is computed in, on `device`.
    """

    tokens = TOKENS

    def __init__(
        self,
        fitted: Fitted,
        step: int,
        size: float = float("nan"),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.size, self.step = size, step
        self.device, self.dtype = torch.device(device), dtype
        self.fingerprint, self.head_dim = fitted.fingerprint, fitted.head_dim
        self.layers, self.kv_heads = range(fitted.layers), range(fitted.kv_heads)
        self.groups = [range(*group) for group in fitted.groups]
        self.vocabulary = len(fitted.table)
        self._fitted, self._tables = fitted, fitted.entropy
        self._table = fitted.table.to(self.device)
        self._rotation = fitted.rotation.to(self.device)
        self._sides = [Placed(side, self.device, dtype, step) for side in (fitted.k, fitted.v)]

    # sizes

    @property
    def group(self) -> int:
        """Memory layers that are best decoded together: those that one part of a blob holds."""
        return max(len(group) for group in self.groups)

    def bound(self, n: int, max_bytes: int | None = None, *, start: int | None = None) -> int:
        """The most bytes that `encode` makes of n tokens, whatever they are; start: of the first, where it is known.
        ValueError where max_bytes is less than it needs for its header, ids and raw tokens."""
        self._check_count(n)
        each = 2 * len(self.layers) * self._fitted.width * 4
        fixed = form.SIZE + self._id_bytes(n)
        if max_bytes is None:
            return fixed + n * each
        least = fixed + (0 if start else min(RAW, n) * each) + 4 * len(self.groups)
        if max_bytes < least:
            raise ValueError(f"max_bytes={max_bytes} is too few for {n} tokens of this model: at least {least} bytes")
        return min(max_bytes, fixed + n * each)

    def typical(self, n: int) -> int:
        """The bytes to expect of n tokens of running text."""
        return round(self.size * 2 * 2 * n * len(self.layers) * self._fitted.width)

    # a segment

    @overload
    def encode(
        self, k: Tensor, v: Tensor, *, ids: Any = None, start: int | None = None, out: None = None,
        max_bytes: int | None = None,
    ) -> bytes: ...  # fmt: skip

    @overload
    def encode(
        self, k: Tensor, v: Tensor, *, ids: Any = None, start: int | None = None, out: Any, max_bytes: int | None = None
    ) -> int: ...

    @torch.no_grad()
    def encode(
        self,
        k: Tensor,
        v: Tensor,
        *,
        ids: Sequence[int] | Tensor | None = None,
        start: int | None = None,
        out: Any = None,
        max_bytes: int | None = None,
    ) -> bytes | int:
        """Code k and v [layers, n, kv_heads, head_dim], n <= 128 real tokens in a row, K rotated as caches hold it.

        ids [n]: the tokens. start: position of the first. Either is found from layer 0 where it is not given and layer
        0 tells; without ids there is no prediction, which takes more bytes. max_bytes: the most there may be; what
        takes more is coded with a larger step. out: a writable buffer of `bound` bytes.
        Returns the bytes, or how many were written to `out`. ValueError for arguments that do not fit.
        """
        n = self._check(k, v)
        if not bool(torch.isfinite(k).all() & torch.isfinite(v).all()):
            raise ValueError("K or V holds a number that is not finite: there is nothing to code of such a segment")
        known, start = self._places(k, v, ids, start)
        most = self.bound(n, max_bytes, start=start)
        made = self._fitting(k, v, known, start, most)
        if out is None:
            return made
        given: Any = out.numpy() if isinstance(out, Tensor) else out
        target = memoryview(given).cast("B")
        if len(target) < len(made):
            raise ValueError(f"out has {len(target)} bytes and {len(made)} are needed: give it bound(n) = {most}")
        target[: len(made)] = made
        return len(made)

    @torch.no_grad()
    def decode(
        self, blob: Any, k: Tensor, v: Tensor, *, layers: Sequence[int] | None = None, start: int | None = None
    ) -> None:
        """Write what a blob stands for into k and v [layers, n, kv_heads, head_dim], K rotated, in their own type.

        layers: those wanted, in the order of k's first dimension; None: all. start: another position for the first
        token. CodecError for whatever is wrong with the blob, ValueError for arguments; then nothing was written.
        """
        header, rest = form.parse(blob)
        wanted = list(self.layers) if layers is None else [int(layer) for layer in layers]
        if any(layer not in self.layers for layer in wanted):
            raise ValueError(f"layers {wanted} are not all among this codec's 0 to {len(self.layers) - 1}")
        self._check_blob(header)
        n, raw = header.tokens, header.raw
        for name, x in (("k", k), ("v", v)):
            expected = (len(wanted), n, len(self.kv_heads), self.head_dim)
            if tuple(x.shape) != expected:
                raise ValueError(f"{name} is {list(x.shape)}, this segment and these layers make {list(expected)}")
        begin = header.start if start is None else int(start)
        _check_start(begin)
        itemsize = header.dtype.itemsize
        whole = header.step is None
        head, parts = form.split(
            rest, 2 * len(self.layers) * raw * self._fitted.width * itemsize, 0 if whole else len(self.groups)
        )
        symbols = {g: self._symbols(header, g, parts[g]) for g, group in enumerate(self.groups) if not whole}
        if raw:
            self._write_raw(header, head, k, v, wanted, begin)
        if raw < n:
            self._write(header, symbols, k, v, wanted, begin)

    def encode_many(
        self, ks: Sequence[Tensor], vs: Sequence[Tensor], *, ids: Sequence[Any] | None = None,
        starts: Sequence[int | None] | None = None, max_bytes: int | None = None,
    ) -> list[bytes]:  # fmt: skip
        """The bytes of several segments, those that `encode` makes of each."""
        count = range(len(ks))
        known, places = (x if x is not None else [None] * len(ks) for x in (ids, starts))
        return [self.encode(ks[i], vs[i], ids=known[i], start=places[i], max_bytes=max_bytes) for i in count]

    def decode_many(
        self, blobs: Sequence[Any], ks: Sequence[Tensor], vs: Sequence[Tensor], *,
        layers: Sequence[int] | None = None, starts: Sequence[int | None] | None = None,
    ) -> None:  # fmt: skip
        """`decode` of several segments, in any order. An error says nothing of those before it."""
        for i, one in enumerate(blobs):
            self.decode(one, ks[i], vs[i], layers=layers, start=None if starts is None else starts[i])

    def find(self, k0: Tensor, v0: Tensor) -> tuple[list[int], int] | None:
        """(ids, position of the first) of consecutive tokens by layer 0's k0, v0 [n, kv_heads, head_dim]; None where
        layer 0 is none of this codec's, or these are no tokens of the model.

        Tokens whose embeddings are equal cannot be told apart; any of them predicts the same.
        """
        if self._fitted.places is None:
            return None
        found = self._fitted.places.find(k0.to(self.device), v0.to(self.device), self._rotation.layers([0]))
        return None if found is None else (found[0].tolist(), found[1])

    @staticmethod
    def peek(blob: Any) -> Header:
        """What a blob says of itself, whichever codec made it. CodecError where it is damaged."""
        return form.peek(blob)

    # encoding

    def _places(self, k: Tensor, v: Tensor, ids: Any, start: int | None) -> tuple[np.ndarray | None, int]:
        known = None
        if ids is not None:
            known = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids).reshape(-1)
            if len(known) != k.shape[1] or known.dtype.kind not in "iu":
                raise ValueError(
                    f"ids are a whole number a token, {k.shape[1]} of them; got {len(known)} {known.dtype}"
                )
            if known.min() < 0 or known.max() >= self.vocabulary:
                raise ValueError(f"ids are between 0 and {self.vocabulary - 1}; got {known.min()} to {known.max()}")
        if start is not None:
            _check_start(start)
        if known is None or start is None:
            found = self.find(k[0], v[0])
            if found is not None and start in (None, found[1]):
                return (np.array(found[0]) if known is None else known), found[1]
            if start is None:
                raise ValueError("layer 0 does not say where these tokens are: give start=, the position of the first")
        return known, int(start)

    def _fitting(self, k: Tensor, v: Tensor, ids: np.ndarray | None, start: int, most: int) -> bytes:
        """A segment's bytes, with the least step from this codec's own on that fits into `most`."""
        n = k.shape[1]
        raw = min(RAW, n) if start == 0 else 0
        kind = form.TYPES[form.code_of(k.dtype)]
        common: dict[str, Any] = dict(
            fingerprint=self.fingerprint[:8],
            tokens=n,
            start=start,
            ids=ids,
            bits=form.id_bits(self.vocabulary),
            dtype=kind,
        )
        head = form.raw_bytes(k[:, :raw], v[:, :raw], kind)
        coefficients = self._coefficients(k, v, ids, start, raw) if raw < n else []
        whole = form.SIZE + (self._id_bytes(n) if ids is not None else 0) + 2 * k.numel() * kind.itemsize
        step = self.step
        while True:
            try:
                parts = self._parts(coefficients, step, n - raw, ids is not None)
                made = form.pack(**common, step=step, raw=raw, head=head, parts=parts)
            except OverflowError:
                made = b""
            if (not made or len(made) > whole) and whole <= most:
                return form.pack(**common, step=None, raw=0, head=form.raw_bytes(k, v, kind), parts=[])
            if made and len(made) <= most:
                return made
            step += FINER

    def _coefficients(
        self, k: Tensor, v: Tensor, ids: np.ndarray | None, start: int, raw: int
    ) -> list[tuple[Tensor, Tensor]]:
        """K's and V's of every group: those of the components coded at this codec's own step, [m, n - raw]."""
        n = k.shape[1]
        f = self._features(ids, raw)
        positions = torch.arange(start + raw, start + n, device=self.device)
        pair = [x[:, raw:].to(self.device, self.dtype) for x in (k, v)]
        pair[0] = self._rotation.unrotate(pair[0], positions)
        left = []
        for side, x in zip(self._sides, pair, strict=True):
            x = x.transpose(0, 1).reshape(n - raw, -1)
            left.append((x - side.predicted(f)) * side.weight)
        along = self._along(n - raw)
        made = []
        for g in range(len(self.groups)):
            cut = self._fitted.columns(g)
            one, two = (
                (along @ (x[:, cut] @ side.axes(g, self.step, ids is not None))).mT
                for side, x in zip(self._sides, left, strict=True)
            )
            made.append((one, two))
        return made

    def _parts(self, coefficients: list[tuple[Tensor, Tensor]], step: int, n: int, known: bool) -> list[bytes]:
        parts = []
        for g in range(len(self.groups)):
            if not coefficients:
                parts.append(b"")
                continue
            numbers = []
            for side, c in zip(self._sides, coefficients[g], strict=True):
                chosen = np.searchsorted(side.coded(g, self.step, known), side.coded(g, step, known))
                some = c if len(chosen) == len(c) else c[torch.from_numpy(chosen).to(c.device)]
                numbers.append(quantise(some, step_of(step)).flatten().cpu().numpy())
            q = np.concatenate(numbers)
            parts.append(entropy.encode(q, self._contexts(g, step, n, known), self._tables))
        return parts

    def _contexts(self, group: int, step: int, n: int, known: bool) -> np.ndarray:
        """uint8 [numbers of K's and V's components in a group]."""
        band = bands(n).numpy() if self._fitted.cosines else np.zeros(n, np.int64)
        found = []
        for side in self._sides:
            size = side.scales(group, known).band.numpy().astype(np.int64)[side.coded(group, step, known)]
            found.append(entropy.context(size, step)[:, band].reshape(-1))
        return np.concatenate(found)

    # decoding

    def _symbols(self, header: Header, group: int, part: memoryview) -> np.ndarray:
        assert header.step is not None
        n, known = header.tokens - header.raw, header.ids is not None
        contexts = self._contexts(group, header.step, n, known) if n else np.zeros(0, np.uint8)
        try:
            return entropy.decode(part, contexts, self._tables)
        except entropy.Broken as error:
            raise CodecError(f"the part of layers {self.groups[group]} of this segment is damaged: {error}") from None

    def _write_raw(self, header: Header, head: memoryview, k: Tensor, v: Tensor, wanted: list[int], start: int) -> None:
        shape = (2, len(self.layers), header.raw, len(self.kv_heads), self.head_dim)
        held = torch.frombuffer(bytearray(head), dtype=header.dtype).view(shape)[:, wanted].to(self.device)
        keys = held[0]
        if start != header.start:
            rotation, positions = self._rotation.layers(wanted), torch.arange(header.raw, device=self.device)
            keys = rotation.rotate(rotation.unrotate(keys.to(self.dtype), positions + header.start), positions + start)
        k[:, : header.raw] = keys.to(k.device, k.dtype)
        v[:, : header.raw] = held[1].to(v.device, v.dtype)

    def _write(
        self, header: Header, symbols: dict[int, np.ndarray], k: Tensor, v: Tensor, wanted: list[int], start: int
    ) -> None:
        assert header.step is not None
        raw, n, known = header.raw, header.tokens - header.raw, header.ids is not None
        f = self._features(None if header.ids is None else np.array(header.ids), raw)
        along, step = self._along(n), step_of(header.step)
        positions = torch.arange(start + raw, start + raw + n, device=self.device)
        for g, group in enumerate(self.groups):
            asked = [place for place, layer in enumerate(wanted) if layer in group]
            if not asked:
                continue
            cut, taken = self._fitted.columns(g), 0
            inner = [wanted[place] - group.start for place in asked]
            for number, (side, target) in enumerate(zip(self._sides, (k, v), strict=True)):
                axes = side.axes(g, header.step, known)
                q = symbols[g][taken : taken + axes.shape[1] * n].reshape(axes.shape[1], n)
                taken += q.size
                c = restore(torch.from_numpy(q).to(self.device), step, self.dtype)
                x = (along.mT @ c.mT) @ axes.mT / side.weight[cut] + side.predicted(f, cut)
                x = x.view(n, len(group), len(self.kv_heads), self.head_dim).transpose(0, 1)[inner]
                if number == 0:
                    x = self._rotation.layers([wanted[place] for place in asked]).rotate(x, positions)
                target[asked, raw:] = x.to(target.device, target.dtype)

    # what both need

    def _features(self, ids: np.ndarray | None, raw: int) -> Tensor | None:
        """[n - raw, features], None without ids."""
        if ids is None:
            return None
        return features(self._table, torch.from_numpy(ids.astype(np.int64)).to(self.device), dtype=self.dtype)[raw:]

    def _along(self, n: int) -> Tensor:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return cosines(n, like) if self._fitted.cosines else torch.eye(n, dtype=self.dtype, device=self.device)

    def _id_bytes(self, n: int) -> int:
        return -(-n * form.id_bits(self.vocabulary) // 8)

    def _check_count(self, n: int) -> None:
        if not 1 <= n <= self.tokens:
            raise ValueError(f"a segment has 1 to {self.tokens} tokens, got {n}")

    def _check(self, k: Tensor, v: Tensor) -> int:
        for name, x in (("k", k), ("v", v)):
            heads = (len(self.layers), len(self.kv_heads), self.head_dim)
            if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != heads or not x.is_floating_point():
                raise ValueError(
                    f"{name} is [layers, n, kv_heads, head_dim] = [{heads[0]}, n, {heads[1]}, {heads[2]}] of a "
                    f"floating type; got {list(x.shape)} of {x.dtype}"
                )
        if k.shape != v.shape or k.dtype != v.dtype:
            raise ValueError(
                f"k is {list(k.shape)} of {k.dtype}, v is {list(v.shape)} of {v.dtype}: they must be alike"
            )
        self._check_count(k.shape[1])
        return k.shape[1]

    def _check_blob(self, header: Header) -> None:
        if header.fingerprint != self.fingerprint[:8]:
            raise CodecError(
                f"this segment was coded by another codec ({header.fingerprint.hex()}, this one is "
                f"{self.fingerprint[:8].hex()}): another model's, or one fitted again"
            )
        if header.tokens > self.tokens or (header.ids is not None and max(header.ids) >= self.vocabulary):
            raise CodecError(f"this segment's header is wrong: {header.tokens} tokens, or ids that the model has not")


def _check_start(start: int) -> None:
    if not 0 <= start <= form.FARTHEST:
        raise ValueError(f"start is a position, 0 to {form.FARTHEST}; got {start}")
