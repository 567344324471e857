"""Whole numbers to bytes: interleaved range asymmetric numeral systems (rANS, Duda, arXiv 1311.2540), static tables.

A number's *context* says how large such numbers are: the mean absolute size of its component and band over the step, in
quarters of an octave. A context's table gives the numbers -127..127 their frequencies, in 2^-14; what is rarer, or
larger, is the escape and follows apart. `lanes` states take turns on one string of 16-bit words, so that a machine may
run them side by side. Layout: uint32 words, uint32 escapes (how many), a uint32 state a lane, words, escapes (int16
where all fit, else int32).

`encode_words` and `decode_words` are the reference, a row of lanes at a time in numpy; entropy_numba.py does the same
one number at a time, compiled, and entropy_triton.py on a GPU, many strings side by side.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longwave.codec.quantise import OCTAVE, ROUND

LANES, PER_LANE = (
    (8, 128),
    4096,
)  # fewest and most; numbers that pay for one: it takes some 3 bytes, a thousand hold them
BITS = 14  # a table's frequencies sum to 2^BITS
LOW = 1 << 16  # states lie in [LOW, LOW * 2^16)
REACH, ESCAPE = 127, 255  # symbol q + REACH
FINEST, PER_OCTAVE, CONTEXTS = -4, 4, 49  # context c: mean size 2^(c / PER_OCTAVE + FINEST) steps
ENDS = "the states do not end where an encoder starts"


class Broken(ValueError):
    """Bytes that no encoder wrote."""


def lanes(count: int) -> int:
    """How many states take turns on so many numbers: a power of two."""
    least, most = LANES
    return min(most, max(least, 1 << (count // PER_LANE).bit_length() >> 1))


@dataclass(frozen=True, eq=False)
class Tables:
    """frequency uint16 [CONTEXTS, 256], 0 of symbols that escape. start uint16: sums of those before. symbol uint8
    [CONTEXTS, 2^BITS]: whose frequency covers a slot."""

    frequency: NDArray[np.uint16]
    start: NDArray[np.uint16]
    symbol: NDArray[np.uint8]

    @classmethod
    def of(cls, frequency: NDArray[np.uint16]) -> Tables:
        """ValueError where rows do not sum to 2^BITS or cannot escape."""
        whole = frequency.astype(np.int64)
        if whole.shape != (CONTEXTS, 256) or (whole.sum(1) != 1 << BITS).any() or (whole[:, ESCAPE] < 1).any():
            raise ValueError(f"tables are {CONTEXTS} rows of 256 frequencies that sum to {1 << BITS}, the last above 0")
        start = np.cumsum(whole, 1) - whole
        symbol = np.stack([np.repeat(np.arange(256, dtype=np.uint8), row) for row in whole])
        return cls(frequency.astype(np.uint16), start.astype(np.uint16), symbol)


def laplace() -> NDArray[np.float64]:
    """Probabilities [CONTEXTS, 256] of the quantised numbers of a Laplace density with each context's mean size."""
    size = 2.0 ** (np.arange(CONTEXTS) / PER_OCTAVE + FINEST)
    inner = np.exp(-(np.arange(REACH + 1) + 1 - ROUND) / size[:, None])  # beyond |q|
    outer = np.concatenate([np.ones((CONTEXTS, 1)), inner[:, :-1]], 1)
    both = outer - inner  # |q| = 0 .. REACH
    p = np.zeros((CONTEXTS, 256))
    p[:, REACH] = both[:, 0]
    p[:, REACH + 1 : ESCAPE] = both[:, 1:] / 2
    p[:, :REACH] = both[:, :0:-1] / 2
    p[:, ESCAPE] = inner[:, -1]
    return p


def tabled(p: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Frequencies uint16 that stand for probabilities [CONTEXTS, 256]; what is rarer than half of one escapes."""
    whole = p / p.sum(1, keepdims=True) * (1 << BITS)
    found = np.where(whole < 0.5, 0, np.maximum(np.rint(whole), 1)).astype(np.int64)
    rare = np.where(found == 0, whole, 0).sum(1)
    found[:, ESCAPE] = np.maximum(1, np.rint(rare + whole[:, ESCAPE] * (found[:, ESCAPE] > 0)))
    found[np.arange(len(found)), found.argmax(1)] += (1 << BITS) - found.sum(1)
    return found.astype(np.uint16)


def learned(counts: NDArray[np.int64], prior: float = 64.0) -> NDArray[np.uint16]:
    """Frequencies by counts [CONTEXTS, 256] of what was seen, either sign counted for both, and by the Laplace density
    as if it had been seen `prior` times."""
    seen = counts.astype(np.float64)
    seen[:, :ESCAPE] = (seen[:, :ESCAPE] + seen[:, ESCAPE - 1 :: -1]) / 2
    return tabled(seen + prior * laplace())


def context(size: NDArray[np.int64], step: int) -> NDArray[np.uint8]:
    """Contexts of mean sizes 2^(size / OCTAVE) at the step that j = `step` stands for: whole numbers alone."""
    per = OCTAVE // PER_OCTAVE
    return np.clip((size - step + per // 2) // per - FINEST * PER_OCTAVE, 0, CONTEXTS - 1).astype(np.uint8)


def encode(q: NDArray[np.int32], contexts: NDArray[np.uint8], tables: Tables, compiled: bool = True) -> bytes:
    """The bytes of numbers int32 [N] in their contexts uint8 [N]; none for none. compiled: by numba where it is."""
    if not len(q):
        return b""
    symbols = np.where(np.abs(q) <= REACH, q + REACH, ESCAPE)
    symbols[tables.frequency[contexts, symbols] == 0] = ESCAPE
    work = _compiled() if compiled else None
    words, states = (work.encode_words if work else encode_words)(symbols.astype(np.uint8), contexts, tables)
    return joined(words, states, q[symbols == ESCAPE])


def joined(words: NDArray[np.uint16], states: NDArray[np.uint32], escapes: NDArray[np.int32]) -> bytes:
    """A string of its parts, as `Stream` has them."""
    head = np.array([len(words), len(escapes), *states], dtype="<u4").tobytes()
    narrow = escapes.astype("<i2")
    tail = narrow if (narrow == escapes).all() else escapes.astype("<i4")
    return b"".join((head, np.ascontiguousarray(words, "<u2").data, np.ascontiguousarray(tail).data))


@dataclass(frozen=True, eq=False)
class Stream:
    """The parts of `encode`'s bytes: words uint16, states uint32 [lanes], and the numbers that escaped, int32."""

    words: NDArray[np.uint16]
    states: NDArray[np.uint32]
    escapes: NDArray[np.int32]

    @classmethod
    def of(cls, data: bytes | memoryview, count: int) -> Stream:
        """Of so many numbers, at least one. Broken where the bytes are too few or too many."""
        side = lanes(count)
        head = 8 + 4 * side
        if len(data) < head:
            raise Broken(f"{len(data)} bytes, at least {head} are needed")
        words, escapes = struct.unpack_from("<2I", data)
        last = head + 2 * words
        width = (len(data) - last) // escapes if escapes else 0
        if last + width * escapes != len(data) or (escapes and width not in (2, 4)):
            raise Broken(f"{len(data)} bytes for {words} words and {escapes} escapes")
        return cls(
            np.frombuffer(data, "<u2", words, head),
            np.frombuffer(data, "<u4", side, 8),
            np.frombuffer(data, "<i2" if width == 2 else "<i4", escapes, last).astype(np.int32),
        )


def decode(
    data: bytes | memoryview, contexts: NDArray[np.uint8], tables: Tables, compiled: bool = True
) -> NDArray[np.int32]:
    """The numbers int32 [N] that `encode` was given in these contexts. Broken where it was not."""
    if not len(contexts):
        if len(data):
            raise Broken(f"{len(data)} bytes for no numbers")
        return np.zeros(0, np.int32)
    stream = Stream.of(data, len(contexts))
    work = _compiled() if compiled else None
    decoded = (work.decode_words if work else decode_words)(stream.words, stream.states, contexts, tables)
    symbols, taken, ended = decoded
    apart = symbols == ESCAPE
    if taken != len(stream.words) or (ended != LOW).any() or apart.sum() != len(stream.escapes):
        raise Broken(ENDS)
    q = symbols.astype(np.int32) - REACH
    q[apart] = stream.escapes
    return q


def encode_words(
    symbols: NDArray[np.uint8], contexts: NDArray[np.uint8], tables: Tables
) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """(words in the order in which they are read, final states). Number i is lane i % lanes's."""
    side = lanes(len(symbols))
    states = np.full(side, LOW, dtype=np.uint64)
    frequency = tables.frequency[contexts, symbols].astype(np.uint64)
    start = tables.start[contexts, symbols].astype(np.uint64)
    words: list[NDArray[np.uint64]] = []
    for row in range((len(symbols) - 1) // side, -1, -1):
        f, s = (x[row * side : (row + 1) * side] for x in (frequency, start))
        x = states[: len(f)]
        full = x >= f << np.uint64(32 - BITS)
        words.append((x[full] & np.uint64(0xFFFF))[::-1])
        x = np.where(full, x >> np.uint64(16), x)
        states[: len(f)] = (x // f << np.uint64(BITS)) + x % f + s
    return np.concatenate(words)[::-1].astype(np.uint16), states.astype(np.uint32)


def decode_words(
    words: NDArray[np.uint16], states: NDArray[np.uint32], contexts: NDArray[np.uint8], tables: Tables
) -> tuple[NDArray[np.uint8], int, NDArray[np.uint32]]:
    """(symbols, words taken, states at the end); fewer words than are needed are as if zeros followed."""
    x64, symbols, taken = states.astype(np.uint64), np.empty(len(contexts), np.uint8), 0
    given = words.astype(np.uint64)
    for first in range(0, len(contexts), len(states)):
        c = contexts[first : first + len(states)]
        x = x64[: len(c)]
        slot = x & np.uint64((1 << BITS) - 1)
        found = tables.symbol[c, slot]
        symbols[first : first + len(c)] = found
        x = tables.frequency[c, found].astype(np.uint64) * (x >> np.uint64(BITS)) + slot
        x = x - tables.start[c, found].astype(np.uint64)
        low = x < LOW
        need = int(low.sum())
        new = np.zeros(need, np.uint64)
        got = given[taken : taken + need]
        new[: len(got)] = got
        x[low] = (x[low] << np.uint64(16)) | new
        taken += need
        x64[: len(c)] = x & np.uint64(0xFFFFFFFF)
    return symbols, taken, x64.astype(np.uint32)


def _compiled():  # type: ignore[no-untyped-def]
    """entropy_numba, or None where numba is not."""
    try:
        from longwave.codec import entropy_numba
    except ImportError:
        return None
    return entropy_numba
