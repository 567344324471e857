"""Where keys and values lie that are not on the device: host=True is host memory, a directory files there, mapped.

A budget given as a size is one of the device then: what fits stays there, and what does not lies where host says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from longwave.methods.base import Bound
from longwave.store.mapped import MappedTokens
from longwave.store.tokens import TokenBuffer, capacity


@dataclass(frozen=True, eq=False)
class HostBound(Bound):
    """Of a method with the option `host`."""

    method: Any

    def stays(self, index: int, tokens: int) -> int:
        """Of `layer_bytes`, what lies on the device wherever keys and values do."""
        return self.layer_bytes(index, tokens) - capacity(tokens) * self.shape.token_bytes

    def brings(self, tokens: int) -> int:
        """Bytes of one row's keys and values that a layer has brought to the device at a time, at most."""
        return capacity(tokens) * self.shape.token_bytes

    def device_bytes(self, tokens: int, batch: int = 1) -> int:
        if not self.method.host:
            return super().device_bytes(tokens, batch)
        held = sum(self.stays(index, tokens) for index in self.shape.memory_layers)
        return batch * (held + self.shape.sliding_bytes(tokens) + self.brings(tokens))


def check_option(host: object) -> None:
    """Raise ValueError for an option that is neither."""
    if not isinstance(host, bool | str):
        raise ValueError(f"host is True, False or a directory for files of keys and values, got {host!r}")


def check_host(host: bool | str, device: torch.device) -> None:
    """Raise ValueError where keys and values are to lie in host memory and do so already, or in a directory that takes
    no files."""
    if host is True and device.type == "cpu":
        raise ValueError(
            "host=True moves keys and values to host memory, and this model is on the CPU already: leave it out, or "
            'name a directory for files of them, host="DIR"'
        )
    if host is True and not hasattr(os, "memfd_create"):
        raise ValueError('host=True grows in a way that this system does not know: name a directory, host="DIR"')
    if isinstance(host, str) and not (os.path.isdir(host) and os.access(host, os.W_OK)):
        raise ValueError(f"host={host!r} is to hold files of keys and values, and is no directory that takes any")


def where(host: bool | str) -> str:
    """In words; nothing where they lie on the device."""
    return "mapped files" if isinstance(host, str) else "host memory" if host else ""


def tokens(host: bool | str, batch: int, columns: Mapping[str, torch.dtype]) -> TokenBuffer:
    """An empty store that lies there."""
    if not host:
        return TokenBuffer(batch, columns)
    return MappedTokens(batch, columns, host if isinstance(host, str) else None)


def mapped(host: bool | str, dense: TokenBuffer) -> list[torch.Tensor]:
    """Of such a store, what lies in files."""
    return [*dense.tensors(), *dense.columns.values()] if isinstance(host, str) else []
