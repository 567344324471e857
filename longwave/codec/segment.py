"""Coding one segment: tensors, ids and a position in, bytes out, and back. No model, no cache, no engine."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from longwave.codec import blob as form
from longwave.codec.blob import Header
from longwave.codec.contexts import contexts
from longwave.codec.decoding import Decoder, Target
from longwave.codec.fitted import Fitted
from longwave.codec.given import Given
from longwave.codec.opened import Opened, Opener
from longwave.codec.placed import Placed
from longwave.codec.predict import Tokens
from longwave.codec.quantise import OCTAVE, quantise, step_of
from longwave.codec.streams import Parts, Streams
from longwave.codec.transform import TOKENS, along
from longwave.threads import side_by_side

RAW = 4  # first tokens of a text: nothing like the others, and attended to by all
BATCHES = 4  # given at once: bytes of one are finished while the device makes the next's
FINER = OCTAVE // 4  # steps are tried so far apart where a segment must fit


class SegmentCodec:
    """Codes segments of up to 128 consecutive tokens of one row, all memory layers together, with one quantiser step.

    tokens: of a whole segment. fingerprint: 16 bytes, of all that was fitted; blobs carry the first 8. layers,
    kv_heads: what it covers, memory layers counted from 0. size: bytes aimed at over those of K and V in 16 bits.
    step: of the quantiser, 2^(step / 32) in weighted units.
    groups: layers that are best decoded together, those that one part of a blob holds.
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
        self._width, self._places, self._tables = fitted.width, fitted.places, fitted.entropy
        self._cosines = fitted.cosines
        self._table = fitted.table.to(self.device)
        self._streams = Streams(self._tables, self.device)
        self._rotation = fitted.rotation.to(self.device)
        cuts = [fitted.columns(g) for g in range(len(self.groups))]
        self._sides = [Placed(side, cuts, self.device, dtype, step) for side in (fitted.k, fitted.v)]

    def __deepcopy__(self, memo: object) -> SegmentCodec:
        return self

    # sizes

    def parts(self) -> list[SegmentCodec]:
        """A codec of each of its groups of layers alone, layers counted from the group's first: what these hold can be
        coded before others are there, and lie by itself. At the same step the numbers decoded are the same."""
        return [self._part(g) for g in range(len(self.groups))]

    def _part(self, group: int) -> SegmentCodec:
        own, part = self.groups[group], copy.copy(self)
        part.fingerprint = hashlib.blake2b(self.fingerprint + group.to_bytes(4, "little"), digest_size=16).digest()
        part.layers, part.groups = range(len(own)), [range(len(own))]
        part._places = self._places if own.start == 0 else None
        part._rotation = self._rotation.layers(slice(own.start, own.stop))
        part._sides = [side.part(group) for side in self._sides]
        vars(part).pop("_decoder", None)
        return part

    def bound(self, n: int, max_bytes: int | None = None, *, start: int | None = None) -> int:
        """The most bytes that `encode` makes of n tokens, whatever they are; start: of the first, where it is known.
        ValueError where max_bytes is less than it needs for its header, ids and raw tokens."""
        self._check_count(n)
        each = 2 * len(self.layers) * self._width * 4
        fixed = form.SIZE + self._id_bytes(n)
        if max_bytes is None:
            return fixed + n * each
        least = fixed + (0 if start else min(RAW, n) * each) + 4 * len(self.groups)
        if max_bytes < least:
            raise ValueError(f"max_bytes={max_bytes} is too few for {n} tokens of this model: at least {least} bytes")
        return min(max_bytes, fixed + n * each)

    def typical(self, n: int) -> int:
        """The bytes to expect of n tokens of running text."""
        return round(self.size * 2 * 2 * n * len(self.layers) * self._width)

    @property
    def together(self) -> int:
        """Segments that are best given to `encode_many` in one call: 1 where they are coded one by one."""
        batch = self._batch
        return BATCHES * batch if batch > 1 else 1

    @property
    def _batch(self) -> int:
        return self._streams.encoded_together(2 * self.tokens * len(self.layers) * self._width)

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
        made = self.encode_many([k], [v], ids=[ids], starts=[start], max_bytes=max_bytes)[0]
        if out is None:
            return made
        given: Any = out.numpy() if isinstance(out, Tensor) else out
        target = memoryview(given).cast("B")
        if len(target) < len(made):
            most = self.bound(k.shape[1], max_bytes)
            raise ValueError(f"out has {len(target)} bytes and {len(made)} are needed: give it bound(n) = {most}")
        target[: len(made)] = made
        return len(made)

    def decode(
        self, blob: Any, k: Tensor, v: Tensor, *, layers: Sequence[int] | None = None, start: int | None = None
    ) -> None:
        """Write what a blob stands for into k and v [layers, n, kv_heads, head_dim], K rotated, in their own type.

        layers: those wanted, in the order of k's first dimension; None: all. start: another position for the first
        token. CodecError for whatever is wrong with the blob, ValueError for arguments; then nothing was written.
        """
        self.decode_many([blob], [k], [v], layers=layers, starts=[start])

    @torch.no_grad()
    def encode_many(
        self, ks: Sequence[Tensor], vs: Sequence[Tensor], *, ids: Sequence[Any] | None = None,
        starts: Sequence[int | None] | None = None, max_bytes: int | Sequence[int | None] | None = None,
    ) -> list[bytes]:  # fmt: skip
        """The bytes of several segments, those that `encode` makes of each. max_bytes: of all alike, or of each.

        On a GPU many are coded side by side, the host waits once for these, and finishes them while the next are under
        way. The last bit of products depends there on how many they are, so a number that lies on the border of two may
        become the other.
        """
        known, places = (x if x is not None else [None] * len(ks) for x in (ids, starts))
        limits = max_bytes if isinstance(max_bytes, Sequence) else [max_bytes] * len(ks)
        given = [self._given(*one) for one in zip(ks, vs, known, places, limits, strict=True)]
        alike: dict[Any, list[int]] = {}
        for i, one in enumerate(given):
            alike.setdefault(one.kind, []).append(i)
        made, most = [b""] * len(given), self._batch
        behind: Iterator[None] = iter(())
        for same in alike.values():
            for some in (same[first : first + most] for first in range(0, len(same), most)):
                coming = self._fitting(given, some, made)
                next(coming)  # the device has begun
                next(behind, None)
                next(coming)  # its bytes are there
                behind = coming
        next(behind, None)
        return made

    def open(self, blobs: Sequence[Any]) -> list[Opened]:
        """Blobs, read and checked once, as `decode` and `decode_many` take them in place of the bytes: for whoever
        decodes them more than once, some layers at a time. CodecError as there; the bytes must stay as they are."""
        return self._opener.all(blobs)

    @torch.no_grad()
    def decode_many(
        self, blobs: Sequence[Any], ks: Sequence[Tensor], vs: Sequence[Tensor], *,
        layers: Sequence[int] | None = None, starts: Sequence[int | None] | None = None,
    ) -> None:  # fmt: skip
        """`decode` of several segments, in any order. An error says nothing of those before it.

        On a GPU many are decoded side by side, and the host waits for it once in 256 segments: to hear whether all are
        what an encoder wrote. The last bit of products depends there on how many they are. Targets that lie one behind
        the other in one tensor are written at once.
        """
        wanted = list(self.layers) if layers is None else [int(layer) for layer in layers]
        if any(layer not in self.layers for layer in wanted):
            raise ValueError(f"layers {wanted} are not all among this codec's 0 to {len(self.layers) - 1}")
        opened = self._opener.all(blobs)
        places = starts if starts is not None else [None] * len(opened)
        todo = [self._target(*one, len(wanted)) for one in zip(opened, ks, vs, places, strict=True)]
        for first in range(0, len(todo), self._streams.together):
            self._decoder.fill(todo[first : first + self._streams.together], wanted)

    def find(self, k0: Tensor, v0: Tensor) -> tuple[list[int], int] | None:
        """(ids, position of the first) of consecutive tokens by layer 0's k0, v0 [n, kv_heads, head_dim]; None where
        layer 0 is none of this codec's, or these are no tokens of the model.

        Tokens whose embeddings are equal cannot be told apart; any of them predicts the same.
        """
        if self._places is None:
            return None
        found = self._places.find(k0.to(self.device), v0.to(self.device), self._rotation.layers([0]))
        return None if found is None else (found[0].tolist(), found[1])

    @staticmethod
    def peek(blob: Any) -> Header:
        """What a blob says of itself, whichever codec made it. CodecError where it is damaged."""
        return form.peek(blob)

    # encoding

    def _placed(self, k: Tensor, v: Tensor, ids: Any, start: int | None) -> tuple[np.ndarray | None, int]:
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

    def _given(self, k: Tensor, v: Tensor, ids: Any, start: int | None, max_bytes: int | None) -> Given:
        n = self._check(k, v)
        known, start = self._placed(k, v, ids, start)
        return Given(k, v, known, start, min(RAW, n) if start == 0 else 0, self.bound(n, max_bytes, start=start))

    def _fitting(self, given: list[Given], some: list[int], made: list[bytes]) -> Iterator[None]:
        """Have `made` hold the bytes of some segments that are alike, each with the least step from this codec's own on
        that fits. Stops when the device has begun, and when what it made is there."""
        left, step, known = some, self.step, given[some[0]].ids is not None
        coefficients, finite = self._coefficients([given[i] for i in some])
        begun = self._parts(coefficients, step, known, finite)
        yield
        parts = begun()
        yield
        while True:
            for i, own in zip(left, parts, strict=True):
                if own is None and step == self.step:
                    _check_finite(given[i])
            packed = side_by_side(lambda i, own, step=step: self._packed(given[i], step, own), left, parts)
            for i, blob in zip(left, packed, strict=True):
                made[i] = blob
            again = [place for place, i in enumerate(left) if not made[i]]
            if not again:
                return
            if len(again) < len(left):
                left, index = [left[place] for place in again], self._sent(np.array(again, np.int64))
                coefficients, finite = coefficients[index], finite[index]
            step += FINER
            parts = self._parts(coefficients, step, known, finite)()

    def _packed(self, one: Given, step: int, parts: list[bytes] | None) -> bytes:
        """A segment's bytes at a step; as K and V are where that takes less, or parts are none since it has numbers
        too large for them; none where it takes more than it may."""
        kind = form.TYPES[form.code_of(one.k.dtype)]
        fixed = form.SIZE + (0 if one.ids is None else self._id_bytes(one.tokens))
        whole = fixed + 2 * one.k.numel() * kind.itemsize
        coded = whole + 1
        if parts is not None:
            raw = 2 * one.k[:, : one.raw].numel() * kind.itemsize
            coded = fixed + raw + 4 * len(parts) + sum(map(len, parts))
        common: dict[str, Any] = dict(
            fingerprint=self.fingerprint[:8],
            tokens=one.tokens,
            start=one.start,
            ids=one.ids,
            bits=form.id_bits(self.vocabulary),
            dtype=kind,
        )
        if coded > whole and whole <= one.most:
            return form.pack(**common, step=None, raw=0, head=form.raw_bytes(one.k, one.v, kind), parts=[])
        if parts is None or coded > one.most:
            return b""
        head = form.raw_bytes(one.k[:, : one.raw], one.v[:, : one.raw], kind)
        return form.pack(**common, step=step, raw=one.raw, head=head, parts=parts)

    def _coefficients(self, some: list[Given]) -> tuple[Tensor, Tensor]:
        """Of segments that are alike, [s, components coded at this codec's own step, coded tokens], group by group, K's
        before V's; and bool [s], False of one that may hold what is not finite."""
        raw, known, count = some[0].raw, some[0].ids is not None, len(some)
        n = some[0].tokens - raw
        sizes = [len(side.coded(g, self.step, known)) for g in range(len(self.groups)) for side in self._sides]
        made = torch.empty(count, sum(sizes), n, dtype=self.dtype, device=self.device)
        sums = [torch.stack([_sum(x[:, :raw]) for one in some for x in (one.k, one.v)]).view(count, 2)] if raw else []
        if n:
            tokens = self._tokens([one.ids for one in some], raw)
            time, targets = along(n, self._cosines, made), iter(made.split(sizes, 1))
            positions = self._sent(np.concatenate([np.arange(n) + one.start + raw for one in some]))
            for g, layers in enumerate(self.groups):
                own = slice(layers.start, layers.stop)
                for side, xs in zip(self._sides, ([one.k for one in some], [one.v for one in some]), strict=True):
                    given = torch.cat([x[own, raw:] for x in xs], 1)
                    sums.append(_sum(given.unflatten(1, (count, n)), 0, 2, 3, 4)[:, None])
                    x = given.to(self.device, self.dtype)
                    if side is self._sides[0]:
                        x = self._rotation.layers(own).unrotate(x, positions)
                    c = side.coefficients(g, x.transpose(0, 1).reshape(count * n, -1), tokens)
                    next(targets).copy_((time @ c.unflatten(0, (count, n))).mT)
        return made, torch.cat(sums, 1).isfinite().all(1).to(self.device)

    def _parts(self, coefficients: Tensor, step: int, known: bool, finite: Tensor) -> Callable[[], Parts]:
        """A function that gives each segment's parts at this codec's own step or a larger one, of `_coefficients`; None
        where they cannot be. A GPU begins at once."""
        numbers, right = self._numbers(coefficients, step, known)
        n = coefficients.shape[2]
        contexts = [self._contexts(g, step, n, known) for g in range(len(self.groups))]
        return self._streams.encode(numbers.flatten(1), contexts, right & finite)

    def _numbers(self, coefficients: Tensor, step: int, known: bool) -> tuple[Tensor, Tensor]:
        """int32 [s, components coded at `step`, n], and bool [s], as `quantise` says it."""
        if step != self.step:
            chosen, first = [], 0
            for g in range(len(self.groups)):
                for side in self._sides:
                    chosen.append(first + side.chosen(g, step, known))
                    first += len(side.coded(g, self.step, known))
            coefficients = coefficients[:, self._sent(np.concatenate(chosen))]
        return quantise(coefficients, step_of(step))

    def _contexts(self, group: int, step: int, n: int, known: bool) -> Tensor:
        """uint8 [numbers of K's and V's components in a group]."""
        sizes = tuple(side.scales(group, known) for side in self._sides)
        return contexts(sizes, step, n, self._cosines, self._streams.place)

    # decoding

    @property
    def _opener(self) -> Opener:
        return Opener(self.fingerprint, self.tokens, self.vocabulary, len(self.layers) * self._width, len(self.groups))

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(
            self._streams, self._sides, self._rotation, self._table, self.groups, len(self.kv_heads), self._cosines,
            self.device, self.dtype,
        )  # fmt: skip

    def _target(self, opened: Opened, k: Tensor, v: Tensor, start: int | None, layers: int) -> Target:
        for name, x in (("k", k), ("v", v)):
            expected = (layers, opened.header.tokens, len(self.kv_heads), self.head_dim)
            if tuple(x.shape) != expected:
                raise ValueError(f"{name} is {list(x.shape)}, this segment and these layers make {list(expected)}")
        begin = opened.header.start if start is None else int(start)
        _check_start(begin)
        return Target(opened, k, v, begin)

    # what both need

    def _tokens(self, ids: list[np.ndarray | None], raw: int) -> Tokens | None:
        """What predicts tokens raw to n of segments, None without ids."""
        known = [x for x in ids if x is not None]
        return Tokens.of(self._table, np.stack(known), raw, self.dtype) if known else None

    def _sent(self, x: np.ndarray) -> Tensor:
        """On the device; nobody waits for what that does."""
        return torch.from_numpy(x).to(self.device, non_blocking=True)

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


def _check_start(start: int) -> None:
    if not 0 <= start <= form.FARTHEST:
        raise ValueError(f"start is a position, 0 to {form.FARTHEST}; got {start}")


def _sum(x: Tensor, *dims: int) -> Tensor:
    """Finite only where all numbers are, and seldom not then."""
    return x.sum(dims or None, dtype=torch.promote_types(x.dtype, torch.float32))


def _check_finite(one: Given) -> None:
    if not (bool(one.k.isfinite().all()) and bool(one.v.isfinite().all())):
        raise ValueError("K or V holds a number that is not finite: there is nothing to code of such a segment")
