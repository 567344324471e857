"""entropy.py's loops compiled by numba, one number at a time; they leave the interpreter's lock.

The first call compiles for a second or two; numba keeps the result on disk. The numbers are entropy.py's own: numba
would not notice a change of them there, so a change of the format renames these functions.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from longwave.codec.entropy import lanes

BITS, LOW = 14, 1 << 16


@numba.njit(cache=True, nogil=True)
def _encode_2(symbols: Any, contexts: Any, frequency: Any, start: Any, words: Any, states: Any) -> int:
    count, last = 0, len(states) - 1  # of a power of two
    for i in range(len(symbols) - 1, -1, -1):
        x = states[i & last]
        f = np.uint64(frequency[contexts[i], symbols[i]])
        if x >= f << np.uint64(32 - BITS):
            words[count] = x & np.uint64(0xFFFF)
            count += 1
            x >>= np.uint64(16)
        states[i & last] = (x // f << np.uint64(BITS)) + x % f + np.uint64(start[contexts[i], symbols[i]])
    return count


@numba.njit(cache=True, nogil=True)
def _decode_2(words: Any, states: Any, contexts: Any, frequency: Any, start: Any, symbol: Any, out: Any) -> int:
    taken, last = 0, len(states) - 1
    for i in range(len(contexts)):
        c = contexts[i]
        x = states[i & last]
        slot = x & np.uint64((1 << BITS) - 1)
        s = symbol[c, slot]
        out[i] = s
        x = np.uint64(frequency[c, s]) * (x >> np.uint64(BITS)) + slot - np.uint64(start[c, s])
        if x < np.uint64(LOW):
            x <<= np.uint64(16)
            if taken < len(words):
                x |= np.uint64(words[taken])
            taken += 1
        states[i & last] = x & np.uint64(0xFFFFFFFF)
    return taken


def encode_words(
    symbols: NDArray[np.uint8], contexts: NDArray[np.uint8], tables: Any
) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """As entropy.encode_words."""
    words, states = np.empty(len(symbols), np.uint16), np.full(lanes(len(symbols)), LOW, np.uint64)
    count = _encode_2(symbols, contexts, tables.frequency, tables.start, words, states)
    return words[:count][::-1], states.astype(np.uint32)


def decode_words(
    words: NDArray[np.uint16], states: NDArray[np.uint32], contexts: NDArray[np.uint8], tables: Any
) -> tuple[NDArray[np.uint8], int, NDArray[np.uint32]]:
    """As entropy.decode_words."""
    out, held = np.empty(len(contexts), np.uint8), states.astype(np.uint64)
    taken = _decode_2(words.astype(np.uint16), held, contexts, tables.frequency, tables.start, tables.symbol, out)
    return out, int(taken), held.astype(np.uint32)
