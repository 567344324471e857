"""entropy.py's decoding in Triton: a program has one stream, its lanes side by side, and goes down the rows.

What a row does is a chain of loads that wait for each other, so one stream takes long and many take no longer: whoever
has many segments should decode them together. A state stays below 2^32 in every step, whatever the bytes are, so that
states are uint32; words beyond the end of a stream are 0, as in the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.codec import entropy
from longwave.codec.entropy import Stream, Tables
from longwave.ops.kernels import on_device

BITS, SLOTS, LOW = tl.constexpr(entropy.BITS), tl.constexpr((1 << entropy.BITS) - 1), tl.constexpr(entropy.LOW)
WARP = 32


@triton.jit
def _decode_kernel(
    words_ptr, first_ptr, states_ptr, contexts_ptr, symbol_ptr, share_ptr, out_ptr, ends_ptr, N, LANES: tl.constexpr
):  # fmt: skip
    stream = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    x = tl.load(states_ptr + stream * LANES + lane).to(tl.uint32, bitcast=True)
    at, end = tl.load(first_ptr + stream), tl.load(first_ptr + stream + 1)
    context = tl.load(contexts_ptr + lane, mask=lane < N, other=0).to(tl.int32)
    for row in range(0, N, LANES):
        i = row + lane
        held = i < N
        following = tl.load(contexts_ptr + i + LANES, mask=i + LANES < N, other=0).to(tl.int32)
        slot = x & SLOTS
        symbol = tl.load(symbol_ptr + (context << BITS) + slot.to(tl.int32)).to(tl.int32)
        share = tl.load(share_ptr + context * 256 + symbol).to(tl.uint32, bitcast=True)
        grown = (share & 0xFFFF) * (x >> BITS) + slot - (share >> 16)
        low = held & (grown < LOW)
        rank = at + tl.cumsum(low.to(tl.int32), 0) - 1
        word = tl.load(words_ptr + rank, mask=low & (rank < end), other=0).to(tl.uint32) & 0xFFFF
        x = tl.where(held, tl.where(low, (grown << 16) | word, grown), x)
        at += tl.sum(low.to(tl.int32), 0)
        tl.store(out_ptr + stream * N + i, symbol.to(tl.uint8), mask=held)
        context = following
    wrong = tl.sum((x != LOW).to(tl.int32), 0)
    tl.store(ends_ptr + stream, (wrong == 0) & (at == end))


class Decoder:
    """Tables on a device. Immutable."""

    def __init__(self, tables: Tables, device: torch.device):
        self.device = device
        self._symbol = torch.from_numpy(tables.symbol).to(device)
        share = tables.frequency.astype(np.uint32) | tables.start.astype(np.uint32) << 16
        self._share = torch.from_numpy(share.view(np.int32)).to(device)

    def decode(self, streams: Sequence[Stream], contexts: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """(symbols uint8 [streams, N], each stream's escapes, bool [streams]: whether an encoder wrote it), on the
        device; of streams in the same contexts uint8 [N], N at least 1. The host waits for nothing."""
        count, numbers = len(streams), len(contexts)
        lanes = len(streams[0].states)
        words = self._joined([stream.words.view(np.int16) for stream in streams])
        first = torch.from_numpy(np.cumsum([0, *(len(stream.words) for stream in streams)])).to(self.device)
        states = torch.from_numpy(np.stack([stream.states for stream in streams]).view(np.int32)).to(self.device)
        symbols = torch.empty(count, numbers, dtype=torch.uint8, device=self.device)
        ends = torch.empty(count, dtype=torch.bool, device=self.device)
        with on_device(self.device):
            _decode_kernel[(count,)](
                words, first, states, contexts, self._symbol, self._share, symbols, ends, numbers,
                LANES=lanes, num_warps=max(1, lanes // WARP),
            )  # fmt: skip
        escaped = [len(stream.escapes) for stream in streams]
        escapes = self._joined([stream.escapes for stream in streams])[:-1].split(escaped)
        found = (symbols == entropy.ESCAPE).sum(1)
        return symbols, list(escapes), ends & (found == torch.tensor(escaped).to(self.device))

    def _joined(self, parts: Sequence[np.ndarray]) -> Tensor:
        """Parts one behind the other, and one number more, so that there is something."""
        return torch.from_numpy(np.concatenate([*parts, np.zeros(1, parts[0].dtype)])).to(self.device)


def numbers(symbols: Tensor, escapes: Tensor) -> Tensor:
    """int32 [N] of one stream's symbols and escapes."""
    q = symbols.int() - entropy.REACH
    if not len(escapes):
        return q
    apart = symbols == entropy.ESCAPE
    rank = apart.cumsum(0) - 1
    return torch.where(apart, escapes[rank.clamp(0, len(escapes) - 1)], q)
