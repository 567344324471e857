"""Stored tokens [B, H, L, D] one stretch after the other, on the device that computes with them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Made:
    """Tokens of shape [B, H, L, D] that are made as they are read: made(start, stop) is those, on the device that
    computes with them."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    made: Callable[[int, int], torch.Tensor]


def pieces(x: torch.Tensor | Made, size: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """Where each `size` tokens of x begin, and they themselves on `device`, the last ones fewer.

    Where x lies in host memory and the device is a GPU, the next piece is on its way while one is computed with: so the
    device has room for two of them, whatever x is.
    """
    starts = range(0, x.shape[2], size)
    if isinstance(x, Made):
        for start in starts:
            yield start, x.made(start, min(start + size, x.shape[2]))
        return
    if x.device == device or device.type != "cuda":
        for start in starts:
            yield start, x[:, :, start : start + size].to(device)
        return
    beside = torch.cuda.Stream(device)
    for start in starts:  # what was yielded before is queued by now, and runs while this one is copied
        part = x[:, :, start : start + size]
        pinned = torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part)
        with torch.cuda.stream(beside):
            there = pinned.to(device, non_blocking=True)
        now = torch.cuda.current_stream(device)
        now.wait_stream(beside)
        there.record_stream(now)
        yield start, there
