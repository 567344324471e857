"""Parts of blobs to numbers and back: many at once in Triton where tensors lie on a GPU, elsewhere one by one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longwave.codec import entropy
from longwave.codec.entropy import Stream, Tables
from longwave.ops.kernels import choice, wants_triton

TOGETHER = 256  # segments decoded: enough for a GPU to have something to do while one waits for its loads
NUMBERS = 2**27  # encoded: 16 segments of an 8B model

Parts = list[list[bytes] | None]  # of each of some segments
Numbers = Callable[[int, int], Tensor]


class Streams:
    """An entropy coder for one device. together: segments that it decodes best in one call. place: where it wants
    contexts."""

    def __init__(self, tables: Tables, device: torch.device):
        self._tables, self._device = tables, device
        module = _triton(device)
        self._module, self._decoder = module, module and module.Decoder(tables, device)
        self._encoder = module and module.Encoder(tables, device)
        self.together = TOGETHER if module else 1
        self.place = device if module else torch.device("cpu")

    def encoded_together(self, numbers: int) -> int:
        """Segments of so many numbers that it encodes side by side."""
        return max(1, NUMBERS // numbers) if self._module else 1

    def encode(self, numbers: Tensor, contexts: Sequence[Tensor], fine: Tensor) -> Callable[[], Parts]:
        """A function that gives the parts of each of some segments, whose numbers int32 [segments, N] lie one part
        behind the other and are overwritten; None of one that is not `fine` bool [segments]. contexts: of the parts,
        uint8 [numbers]. A GPU begins at once; whoever asks waits."""
        if self._encoder is not None:
            begun: Callable[[], Parts] = self._encoder.encode(numbers, contexts, fine)
            return begun
        return lambda: self._encoded(numbers, contexts, fine)

    def _encoded(self, numbers: Tensor, contexts: Sequence[Tensor], fine: Tensor) -> Parts:
        found: Parts = []
        for row, ok in zip(numbers.cpu(), fine.tolist(), strict=True):
            parts = zip(row.split([len(part) for part in contexts]), contexts, strict=True)
            found.append([entropy.encode(q.numpy(), c.numpy(), self._tables) for q, c in parts] if ok else None)
        return found

    def decode(self, parts: Sequence[memoryview], contexts: Tensor) -> tuple[Numbers, Tensor | None]:
        """A function from (first, stop) of some parts, all in the same contexts uint8 [N], to their numbers int32
        [stop - first, N] on the device, which is to be asked only if all are right; and bool [parts], on the device as
        well, whether an encoder wrote them. None: all. Broken where it is known at once that none did."""
        if not len(contexts) or self._decoder is None:
            made = [torch.from_numpy(entropy.decode(part, contexts.cpu().numpy(), self._tables)) for part in parts]
            return (lambda first, stop: torch.stack(made[first:stop]).to(self._device)), None
        decoded = self._decoder.decode([Stream.of(part, len(contexts)) for part in parts], contexts)
        return decoded.numbers, decoded.fine


def _triton(device: torch.device) -> Any:
    """The module that answers, None where numba or numpy does."""
    if not wants_triton(device):
        return None
    try:
        return importlib.import_module("longwave.codec.entropy_triton")
    except ImportError:
        if choice() == "triton":
            raise
        return None
