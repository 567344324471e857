"""entropy.py in Triton: a program has one stream, its lanes side by side, and goes down the rows, or up to encode.

What a row does is a chain of operations that wait for each other, so one stream takes long and many take no longer:
whoever has many segments should code them together. A state stays below 2^32 in every step, whatever the bytes are, so
that states are uint32; words beyond the end of a stream are 0, as in the reference.

Whoever encodes goes backwards, and so do its words and escapes: they grow down from where a stream's numbers end, words
in a buffer of their own (a number emits one at most), escapes over the numbers themselves, which are behind it by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from longwave.codec import entropy
from longwave.codec.entropy import Stream, Tables
from longwave.ops.kernels import on_device

BITS, SLOTS, LOW = tl.constexpr(entropy.BITS), tl.constexpr((1 << entropy.BITS) - 1), tl.constexpr(entropy.LOW)
REACH, ESCAPE = tl.constexpr(entropy.REACH), tl.constexpr(entropy.ESCAPE)
WARP = 32
HEAD = 2 + entropy.LANES[1]  # uint32 at a stream's beginning, at most: how many words and escapes, and states


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


@triton.jit
def _looked_up(q, context, held, share_ptr):
    """(frequency and start of each number's symbol, whether that is the escape)."""
    inner = held & (q >= -REACH) & (q <= REACH)
    own = tl.load(share_ptr + context * 256 + q + REACH, mask=inner, other=0)
    apart = held & ((own & 0xFFFF) == 0)
    own = tl.where(apart, tl.load(share_ptr + context * 256 + ESCAPE, mask=apart, other=0), own)
    return own.to(tl.uint32, bitcast=True), apart


@triton.jit
def _encode_kernel(
    numbers_ptr, words_ptr, heads_ptr, contexts_ptr, first_ptr, groups_ptr, share_ptr, N,
    HEAD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    segment, group = tl.program_id(0).to(tl.int64), tl.load(groups_ptr + tl.program_id(1))
    begin, end = tl.load(first_ptr + group), tl.load(first_ptr + group + 1)
    numbers_ptr += segment * N
    words_ptr += segment * N
    lane = tl.arange(0, LANES)
    x = tl.full([LANES], LOW, tl.uint32)
    words, escapes = end, end
    rows = (end - begin + LANES - 1) // LANES
    # a row's numbers are loaded two rows ahead, what tables say of them one
    i = begin + (rows - 1) * LANES + lane
    q = tl.load(numbers_ptr + i, mask=i < end, other=0)
    context = tl.load(contexts_ptr + i, mask=i < end, other=0).to(tl.int32)
    share, apart = _looked_up(q, context, i < end, share_ptr)
    next_q = tl.load(numbers_ptr + i - LANES, mask=i - LANES >= begin, other=0)
    next_context = tl.load(contexts_ptr + i - LANES, mask=i - LANES >= begin, other=0).to(tl.int32)
    for _ in range(0, rows):
        far = i - 2 * LANES
        far_q = tl.load(numbers_ptr + far, mask=far >= begin, other=0)
        far_context = tl.load(contexts_ptr + far, mask=far >= begin, other=0).to(tl.int32)
        next_share, next_apart = _looked_up(next_q, next_context, i - LANES >= begin, share_ptr)
        held = i < end
        f = tl.where(held, share & 0xFFFF, 1)
        full = held & (x >= (f << (32 - BITS)))
        both = full.to(tl.int32) + (apart.to(tl.int32) << 16)  # one scan counts both
        rank, total = tl.cumsum(both, 0) - both, tl.sum(both, 0)
        words -= total & 0xFFFF
        escapes -= total >> 16
        tl.store(words_ptr + words + (rank & 0xFFFF), (x & 0xFFFF).to(tl.int16), mask=full)
        tl.store(numbers_ptr + escapes + (rank >> 16), q, mask=apart)
        x = tl.where(full, x >> 16, x)
        whole = x // f
        x = tl.where(held, (whole << BITS) + (x - whole * f) + (share >> 16), x)
        q, share, apart, next_q, next_context = next_q, next_share, next_apart, far_q, far_context
        i -= LANES
    heads_ptr += (segment * tl.num_programs(1) + tl.program_id(1)) * HEAD
    tl.store(heads_ptr, end - words)
    tl.store(heads_ptr + 1, end - escapes)
    tl.store(heads_ptr + 2 + lane, x.to(tl.int32, bitcast=True))


class Encoder:
    """Tables on a device. Immutable."""

    def __init__(self, tables: Tables, device: torch.device):
        self.device, self._share = device, _shares(tables, device)

    def encode(
        self, numbers: Tensor, contexts: Sequence[Tensor], fine: Tensor
    ) -> Callable[[], list[list[bytes] | None]]:
        """A function that gives the bytes that entropy.encode makes of each part of many segments' numbers int32
        [segments, N], which are overwritten; None of a segment that is not `fine` bool [segments], on the device too.

        contexts: of the parts, which lie one behind the other, uint8 [numbers]. The device begins at once. Whoever asks
        waits for it, to hear how many bytes there are, and then for these.
        """
        sizes, count = [len(part) for part in contexts], len(numbers)
        first = np.cumsum([0, *sizes]).astype(np.int32)
        alike: dict[int, list[int]] = {}
        for g, size in enumerate(sizes):
            if size:
                alike.setdefault(entropy.lanes(size), []).append(g)
        words = torch.empty(numbers.shape, dtype=torch.int16, device=self.device)
        placed, begins = torch.cat(list(contexts)), _sent(first, self.device)
        told = [fine.int()]
        for lanes, groups in alike.items():
            heads = torch.empty(count, len(groups), HEAD, dtype=torch.int32, device=self.device)
            with on_device(self.device):
                _encode_kernel[(count, len(groups))](
                    numbers, words, heads, placed, begins, _sent(np.array(groups, np.int32), self.device),
                    self._share, numbers.shape[1], HEAD=HEAD, LANES=lanes, num_warps=max(1, lanes // WARP),
                )  # fmt: skip
            told.append(heads.flatten())
        together, borders = torch.cat(told), np.cumsum([len(x) for x in told])[:-1]

        def fetch() -> list[list[bytes] | None]:
            right, *heard = np.split(together.cpu().numpy(), borders)  # the wait
            streams = [
                (s, g, head[s, j, : 2 + lanes])
                for (lanes, groups), head in zip(
                    alike.items(), (x.reshape(count, -1, HEAD) for x in heard), strict=True
                )
                for s in np.flatnonzero(right)
                for j, g in enumerate(groups)
            ]
            own = _fetched([words[s, first[g + 1] - head[0] : first[g + 1]] for s, g, head in streams])
            escapes = _fetched([numbers[s, first[g + 1] - head[1] : first[g + 1]] for s, g, head in streams])
            made = [[b""] * len(sizes) for _ in right]
            for (s, g, head), some, apart in zip(streams, own, escapes, strict=True):
                made[s][g] = entropy.joined(some.view(np.uint16), head[2:].view(np.uint32), apart)
            return [parts if ok else None for parts, ok in zip(made, right, strict=True)]

        return fetch


def _shares(tables: Tables, device: torch.device) -> Tensor:
    """int32 [CONTEXTS, 256]: frequency and, 16 bits above it, start."""
    share = tables.frequency.astype(np.uint32) | tables.start.astype(np.uint32) << 16
    return torch.from_numpy(share.view(np.int32)).to(device)


def _sent(x: np.ndarray, device: torch.device) -> Tensor:
    """On the device; nobody waits for what that does."""
    return torch.from_numpy(x).to(device, non_blocking=True)


def _fetched(parts: list[Tensor]) -> list[np.ndarray]:
    """Vectors on the host, by one copy, through memory that a GPU writes to by itself."""
    if not parts:
        return []
    joined = torch.cat(parts)
    there = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=joined.device.type == "cuda").copy_(joined)
    return np.split(there.numpy(), np.cumsum([len(part) for part in parts])[:-1])


class Decoder:
    """Tables on a device. Immutable."""

    def __init__(self, tables: Tables, device: torch.device):
        self.device = device
        self._symbol = torch.from_numpy(tables.symbol).to(device)
        self._share = _shares(tables, device)

    def decode(self, streams: Sequence[Stream], contexts: Tensor) -> Decoded:
        """Streams in the same contexts uint8 [N], N at least 1. The host waits for nothing."""
        count, numbers = len(streams), len(contexts)
        lanes = len(streams[0].states)
        words = self._joined([stream.words.view(np.int16) for stream in streams])
        first = _sent(np.cumsum([0, *(len(stream.words) for stream in streams)]), self.device)
        states = _sent(np.stack([stream.states for stream in streams]).view(np.int32), self.device)
        symbols = torch.empty(count, numbers, dtype=torch.uint8, device=self.device)
        ends = torch.empty(count, dtype=torch.bool, device=self.device)
        with on_device(self.device):
            _decode_kernel[(count,)](
                words, first, states, contexts, self._symbol, self._share, symbols, ends, numbers,
                LANES=lanes, num_warps=max(1, lanes // WARP),
            )  # fmt: skip
        escaped = np.array([len(stream.escapes) for stream in streams])
        found = (symbols == entropy.ESCAPE).sum(1)
        escapes = self._joined([stream.escapes for stream in streams])
        return Decoded(symbols, escapes, np.cumsum([0, *escaped]), ends & (found == _sent(escaped, self.device)))

    def _joined(self, parts: Sequence[np.ndarray]) -> Tensor:
        """Parts one behind the other, and one number more, so that there is something."""
        return _sent(np.concatenate([*parts, np.zeros(1, parts[0].dtype)]), self.device)


@dataclass(frozen=True, eq=False)
class Decoded:
    """Streams on a device. symbols: uint8 [streams, N]. escapes: int32, of all streams, stream s's from number first[s]
    on. fine: bool [streams], whether an encoder wrote it."""

    symbols: Tensor
    escapes: Tensor
    first: NDArray[np.int64]
    fine: Tensor

    def numbers(self, start: int, stop: int) -> Tensor:
        """int32 [stop - start, N] of some streams, all of them fine."""
        symbols = self.symbols[start:stop]
        q = symbols.int() - entropy.REACH
        own = slice(int(self.first[start]), int(self.first[stop]))
        if own.start == own.stop:
            return q
        return q.masked_scatter_(symbols == entropy.ESCAPE, self.escapes[own])
