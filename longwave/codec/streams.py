"""Parts of blobs to numbers: many at once in Triton where tensors lie on a GPU, elsewhere one by one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from longwave.codec import entropy
from longwave.codec.entropy import Stream, Tables
from longwave.ops.kernels import choice, wants_triton

TOGETHER = 256  # segments: enough for a GPU to have something to do while one waits for its loads


class Streams:
    """An entropy decoder for one device. together: segments that it decodes best in one call."""

    def __init__(self, tables: Tables, device: torch.device):
        self._tables, self._device = tables, device
        module = _triton(device)
        self._module, self._decoder = module, module and module.Decoder(tables, device)
        self.together = TOGETHER if module else 1

    def decode(self, parts: Sequence[memoryview], contexts: NDArray[Any]) -> tuple[Iterator[Tensor], Tensor | None]:
        """The numbers of each of some parts, all in the same contexts uint8 [N], int32 [N] on the device, made as they
        are asked for; and bool [parts], on the device as well, whether an encoder wrote them. None: all. Broken where
        it is known at once that none did."""
        if not len(contexts) or self._decoder is None:
            made = [entropy.decode(part, contexts, self._tables) for part in parts]
            return (torch.from_numpy(one).to(self._device) for one in made), None
        streams = [Stream.of(part, len(contexts)) for part in parts]
        placed = torch.from_numpy(contexts).to(self._device)
        symbols, escapes, fine = self._decoder.decode(streams, placed)
        return (self._module.numbers(*one) for one in zip(symbols, escapes, strict=True)), fine


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
