"""One coded segment as bytes: a header that can be read without the codec, and a part for each group of layers.

    magic 4 | version u8, flags u8, type u8, bits of an id u8 | tokens u16, raw tokens u8, groups u8 | step i16 |
    2 unused | start i64 | fingerprint 8 | length u32 | checksum 8 | ids, packed | raw K and V |
    bytes of each part u32 | parts

All little-endian. The checksum is BLAKE2b-64 of everything but itself. Whatever is wrong with a blob is a CodecError.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

MAGIC, VERSION = b"lwsg", 2
FIXED = struct.Struct("<4sBBBBHBBhHq8sI")
CHECK = 8
SIZE = FIXED.size + CHECK
IDS, WHOLE = 1, 2  # flags: coded with its ids; all of K and V as they were
TYPES = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16}
LONGEST = 2**32 - 1
FARTHEST = 2**40  # position


class CodecError(ValueError):
    """What is wrong with a coded segment, or with a codec's file."""


@dataclass(frozen=True)
class Header:
    """What a segment says of itself.

    version: of the format. fingerprint: 8 bytes of the codec's. tokens, start: how many, and the first's position. ids:
    of the tokens, None where it was coded without. step: the quantiser's, None where K and V are stored as they were.
    length: bytes of the blob. checksum: 8 bytes. dtype: of K and V as given (float64 counts as float32). raw: first
    tokens stored as they were.
    """

    version: int
    fingerprint: bytes
    tokens: int
    start: int
    ids: tuple[int, ...] | None
    step: int | None
    length: int
    checksum: bytes
    dtype: torch.dtype
    raw: int


def code_of(dtype: torch.dtype) -> int:
    """The number of the type in which K and V of `dtype` are stored raw."""
    return next((code for code, kind in TYPES.items() if kind == dtype), 0)


def id_bits(vocabulary: int) -> int:
    return max(1, (vocabulary - 1).bit_length())


def packed_ids(ids: Sequence[int] | np.ndarray, bits: int) -> bytes:
    whole = np.asarray(ids, dtype="<u4")
    return np.packbits(
        np.unpackbits(whole.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")[:, :bits], bitorder="little"
    ).tobytes()


def unpacked_ids(data: bytes | memoryview, count: int, bits: int) -> np.ndarray:
    each = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    return (each.astype(np.int64) << np.arange(bits)).sum(1)


def pack(
    *,
    fingerprint: bytes,
    tokens: int,
    start: int,
    ids: np.ndarray | None,
    bits: int,
    step: int | None,
    dtype: torch.dtype,
    raw: int,
    head: bytes,
    parts: Sequence[bytes],
) -> bytes:
    """The bytes of a segment. head: raw K and V. parts: of each group of layers; none where all is raw."""
    flags = (IDS if ids is not None else 0) | (WHOLE if step is None else 0)
    sizes = np.array([len(part) for part in parts], "<u4").tobytes()
    tail = [b"" if ids is None else packed_ids(ids, bits), head, sizes, *parts]
    length = SIZE + sum(map(len, tail))
    if length > LONGEST:
        raise ValueError(
            f"a segment of {length} bytes is too long for its format, at most {LONGEST}: code fewer layers"
        )
    fixed = FIXED.pack(
        MAGIC, VERSION, flags, code_of(dtype), bits, tokens, raw, len(parts), step or 0, 0, start, fingerprint, length
    )
    checksum = hashlib.blake2b(fixed, digest_size=CHECK)
    for piece in tail:
        checksum.update(piece)
    return b"".join((fixed, checksum.digest(), *tail))


def peek(blob: bytes | memoryview) -> Header:
    """The header of a blob whose checksum holds, whoever coded it. CodecError where it does not."""
    return parse(blob)[0]


def parse(blob: bytes | memoryview) -> tuple[Header, memoryview]:
    """(header, what follows the ids). Checks everything that needs no codec."""
    data = memoryview(blob).cast("B")
    if len(data) < SIZE:
        raise CodecError(f"a coded segment has at least {SIZE} bytes, this one has {len(data)}: was the file cut?")
    magic, version, flags, kind, bits, tokens, raw, _, step, _, start, fingerprint, length = FIXED.unpack(
        data[: FIXED.size]
    )
    if magic != MAGIC:
        raise CodecError(f"this is no coded segment: it starts with {bytes(magic)!r}, not {MAGIC!r}")
    if version != VERSION:
        raise CodecError(
            f"this segment is of format {version}, this longwave reads {VERSION}: use the one that wrote it"
        )
    if length != len(data):
        raise CodecError(f"this segment should have {length} bytes and has {len(data)}: was the file cut?")
    checksum = bytes(data[FIXED.size : SIZE])
    found = hashlib.blake2b(data[: FIXED.size], digest_size=CHECK)
    found.update(data[SIZE:])
    if found.digest() != checksum:
        raise CodecError(
            f"this segment (by its header, tokens {start} to {start + tokens - 1}) is damaged: bad checksum"
        )
    ids, end = None, SIZE
    if flags & IDS:
        end = SIZE + -(-tokens * bits // 8)
        if not 1 <= bits <= 32 or end > length:
            raise CodecError(f"this segment's header is wrong: {tokens} ids of {bits} bits do not fit {length} bytes")
        ids = tuple(unpacked_ids(data[SIZE:end], tokens, bits).tolist())
    if kind not in TYPES or flags & ~(IDS | WHOLE) or raw > tokens or not tokens or not 0 <= start <= FARTHEST:
        raise CodecError(
            f"this segment's header is wrong: type {kind}, flags {flags}, {raw} of {tokens} tokens raw, start {start}"
        )
    given = None if flags & WHOLE else step
    header = Header(
        version, fingerprint, tokens, start, ids, given, length, checksum, TYPES[kind], tokens if given is None else raw
    )
    return header, data[end:]


def split(rest: memoryview, head: int, groups: int) -> tuple[memoryview, list[memoryview]]:
    """Raw K and V of `head` bytes, and the parts of `groups` groups. CodecError where they do not fill `rest`."""
    table = head + 4 * groups
    if len(rest) < table:
        raise CodecError(f"this segment has {len(rest)} bytes after its ids, at least {table} are needed")
    sizes = np.frombuffer(rest[head:table], "<u4").astype(np.int64).tolist()
    if table + sum(sizes) != len(rest):
        raise CodecError(f"this segment's parts have {sum(sizes)} bytes, and {len(rest) - table} are there")
    parts, at = [], table
    for size in sizes:
        parts.append(rest[at : at + size])
        at += size
    return rest[:head], parts


def raw_bytes(k: torch.Tensor, v: torch.Tensor, kind: torch.dtype) -> bytes:
    """K and V one after the other, in the type that they are stored raw in."""
    if not k.numel():
        return b""  # and nobody waits for a GPU
    return torch.stack([k, v]).to("cpu", kind).contiguous().view(torch.uint8).numpy().tobytes()
