"""Stored tokens [B, H, L, D] one stretch after the other, on the device that computes with them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from longwave.ops.ahead import Ahead, side_stream


@dataclass(frozen=True)
class Made:
    """Tokens of shape [B, H, L, D] that are made as they are read: made(start, stop) is those, on the device that
    computes with them."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    made: Callable[[int, int], torch.Tensor]


class Coming:
    """Stored tokens [B, H, L, D] in host memory, the first of which are on their way to the device already."""

    def __init__(self, x: torch.Tensor, first: Ahead):
        """first: of `on_its_way`."""
        self.x, self.first, self.shape, self.dtype = x, first, x.shape, x.dtype


def fetched(x: torch.Tensor, device: torch.device) -> bool:
    """Whether stored tokens are copied to the device, which computes meanwhile."""
    return x.device != device and device.type == "cuda"


def on_its_way(x: torch.Tensor, device: torch.device) -> Ahead:
    """x, for which a copy to the device has begun."""
    return Ahead(partial(_brought, device=device), x, device)


def _brought(x: torch.Tensor, device: torch.device) -> tuple[torch.Tensor]:
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=device.type == "cuda").copy_(x)
    return (pinned.to(device, non_blocking=True),)


def pieces(x: torch.Tensor | Made | Coming, size: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """Where each `size` tokens of x begin, and they themselves on `device`, the last ones fewer.

    Where x lies in host memory and the device is a GPU, the next piece is on its way while one is computed with: so the
    device has room for two of them, whatever x is. Of what is coming no more than `size` tokens may be on their way.
    """
    starts = range(0, x.shape[2], size)
    if isinstance(x, Made):
        for start in starts:
            yield start, x.made(start, min(start + size, x.shape[2]))
        return
    if isinstance(x, Coming):
        (there,) = x.first.result()
        rest = x.x[:, :, there.shape[2] : size]
        yield 0, torch.cat([there, rest.to(device)], 2) if rest.shape[2] else there
        for start, part in pieces(x.x[:, :, size:], size, device):
            yield size + start, part
        return
    if not fetched(x, device):
        for start in starts:
            yield start, x[:, :, start : start + size].to(device)
        return
    beside = side_stream(device, "pieces")
    for start in starts:  # what was yielded before is queued by now, and runs while this one is copied
        with torch.cuda.stream(beside):
            (there,) = _brought(x[:, :, start : start + size], device)
        now = torch.cuda.current_stream(device)
        now.wait_stream(beside)
        there.record_stream(now)
        yield start, there
