"""Tokens in host memory or in a file on a disk, mapped: they grow at their end, and nothing that lies there is copied.

A token's numbers of all rows and heads lie together, so that a file only gets longer, and what is read of a stretch of
tokens is a stretch of the file. Files have no name: whatever ends the process gives their room back.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from longwave.store.tokens import TokenBuffer, capacity

STEP = 1 << 20  # bytes: a system reads little more of a file ahead, whatever it is asked for at once


class Growing:
    """A tensor [batch, heads, tokens, ...] of a file below the directory `where`, or of host memory if that is None."""

    def __init__(self, where: str | None, like: torch.Tensor):
        self.where, self.dtype = where, like.dtype
        self.shape = (*like.shape[:2], *like.shape[3:])  # of a token
        self.size = 0  # bytes
        if where is None:
            self.file = os.memfd_create("longwave")
        else:
            self.file, name = tempfile.mkstemp(dir=where)
            os.unlink(name)
        weakref.finalize(self, os.close, self.file)

    def fit(self, tokens: int) -> torch.Tensor:
        """It with so many tokens; new ones are 0. Where it had more, an earlier tensor's last ones must not be touched
        any more. OSError, and all is as it was, where there is no room."""
        size = self._bytes(tokens)
        if size > self.size:
            self._reserve(size)
        else:
            os.ftruncate(self.file, size)
        self.size = size
        if not size:
            return torch.empty(0, *self.shape, dtype=self.dtype).movedim(0, 2)
        shared = mmap.mmap(self.file, size)
        return torch.frombuffer(shared, dtype=self.dtype).view(tokens, *self.shape).movedim(0, 2)

    def _bytes(self, tokens: int) -> int:
        return tokens * torch.Size(self.shape).numel() * self.dtype.itemsize

    def expect(self, tokens: int) -> None:
        """Have the system read the first `tokens` from the disk by itself, where it knows how and has not done so."""
        if self.where is not None and hasattr(os, "posix_fadvise"):
            for start in range(0, self._bytes(tokens), STEP):
                os.posix_fadvise(self.file, start, STEP, os.POSIX_FADV_WILLNEED)

    def _reserve(self, size: int) -> None:
        """Have the room before anything is written: a mapped page that finds none ends the process."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file, self.size, size - self.size)
            else:
                os.ftruncate(self.file, size)
        except OSError as error:
            os.ftruncate(self.file, self.size)
            there = "host memory" if self.where is None else self.where
            raise OSError(
                error.errno, f"{there} has no room for {size - self.size:,} bytes of keys and values: {error.strerror}"
            ) from error


class MappedTokens(TokenBuffer):
    """A `TokenBuffer`, side columns included, that lies there wherever what is given to it comes from."""

    def __init__(self, batch: int, columns: Mapping[str, torch.dtype] | None = None, where: str | None = None):
        super().__init__(batch, columns)
        self.where = where
        self.files: dict[str, Growing] = {}

    def _set(self, items: Mapping[str, torch.Tensor]) -> None:
        held, made = self._items(), {}
        for name, x in items.items():
            if held.get(name) is x:
                made[name] = x
                continue
            self.files[name] = Growing(self.where, x)
            made[name] = self.files[name].fit(x.shape[2]).copy_(x)
        super()._set(made)

    def _copy(self, tokens: int) -> None:
        super()._set({name: file.fit(capacity(tokens)) for name, file in self.files.items()})

    def expect(self, tokens: int) -> None:
        """The first `tokens` keys of every row are read soon."""
        self.files["k"].expect(tokens)

    def move(self, device: torch.device | str) -> None:
        """It stays where it is."""

    def __getstate__(self) -> dict[str, Any]:  # a copy lies in files of its own
        return {"where": self.where, "declared": self.declared, "state": self.state()}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        MappedTokens.__init__(self, len(kept["state"]["lengths"]), kept["declared"], kept["where"])
        self.load_state(kept["state"])
