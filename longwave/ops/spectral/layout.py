"""The layout of a page: where a segment of T tokens of one layer keeps what.

A page is one run of bytes. K's fields come first, then V's; a field is the part of one head group, aligned to 16 bytes.
Heads whose channels are stored alike form a group and lie side by side in its fields, the channels of a head
contiguous. Shapes, with h heads in the group:

    values   [h, T, n]             channels kept at 16 bits or the model's own type
    codes    [h, n, T * bits / 8]  channels in few bits, axis "time": one scale and zero a channel
             [h, T, n * bits / 8]  axis "token": one scale, and a zero if asked for, a token (and `group` channels)
    scales   [h, 2, n]             float16, axis "time": scale, zero
             [h, 1 or 2, T, n / group]  float16, axis "token"
    states   [h, S, c]             coefficients along time of the channels that have them; int8, 16 bits, or own type
    gains    [h, S]                float16, for int8 states: state = gain * int8
    bias     [h]                   float16, K's merged heads: what is added to all scores of the segment
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from longwave.ops.codes import BITS, packed_bytes

ALIGN = 16  # bytes
OWN = 0  # "bits" of channels stored in the model's own type


@dataclass(frozen=True)
class Code:
    """How one head's K or V is stored in a segment.

    runs: (bits, channels) by falling importance; bits is 8, 4, 3, 2, 1, 16 (a 16-bit float) or `OWN`. Channels in no
        run are compressed: `states` coefficients along time.
    axis: whether a scale serves a channel along time, or the channels of a token.
    residual: all channels have states, and the run codes what these leave, rotated across channels (one run only).
    state_bits: 8, 16 or `OWN`.
    zero, fit: see `ops.codes.quantize`; on the time axis a zero is always stored.
    group: channels that share a token's scale; 0 means all of the run.
    merged: the one state is a weighted mean of the segment's tokens, and K's side has a bias (ops/merge.py).
    """

    runs: tuple[tuple[int, int], ...] = ()
    states: int = 1
    axis: str = "time"
    residual: bool = False
    state_bits: int = OWN
    zero: bool = True
    fit: bool = True
    group: int = 0
    merged: bool = False

    @property
    def kept(self) -> int:
        """Channels stored as values or codes."""
        return sum(n for _, n in self.runs)

    def smooth(self, dim: int) -> int:
        """Channels stored as states."""
        return dim if self.residual else dim - self.kept

    def check(self, dim: int, segment: int) -> None:
        if self.kept > dim:
            raise ValueError(f"{self.kept} channels are kept of a head of {dim}")
        if self.merged and (self.runs or self.states != 1):
            raise ValueError("a merged head keeps one state of every channel, and nothing else")
        if self.residual and self.runs and (len(self.runs) > 1 or self.kept != dim):
            raise ValueError("residuals are coded for all channels of a head at once")
        for bits, n in self.runs:
            if bits not in (*BITS, 16, OWN):
                raise ValueError(f"channels are kept at 16, 8, 4, 3, 2 or 1 bits, got {bits}")
            if bits in BITS and bits < 8 and (segment if self.axis == "time" else n) % 8:
                what = f"segments of {segment} tokens" if self.axis == "time" else f"{n} channels"
                raise ValueError(f"codes of {bits} bits are packed by eights: {what} do not fit")


@dataclass(frozen=True)
class Field:
    """A tensor inside a page."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def at(self, i: int) -> int:
        """Byte of a page where the part of the group's i-th head starts."""
        return self.offset + i * (self.nbytes // self.shape[0])

    def view(self, pages: torch.Tensor) -> torch.Tensor:
        """pages [..., page bytes] uint8 -> [..., *shape], the same memory."""
        part = pages[..., self.offset : self.offset + self.nbytes].view(self.dtype)
        return part.unflatten(-1, self.shape) if self.nbytes else part.reshape(*pages.shape[:-1], *self.shape)


@dataclass
class Group:
    """Heads of one side with the same `Code`: their fields, and each head's channels by falling importance."""

    code: Code
    heads: torch.Tensor  # int64 [h]
    order: torch.Tensor  # int16 [h, D]: runs first, then the rest
    values: list[Field] = field(default_factory=list)  # a run each: values, or packed codes
    scales: list[Field | None] = field(default_factory=list)
    states: Field | None = None
    gains: Field | None = None
    bias: Field | None = None


class Layout:
    """Pages of one layer: K's and V's groups, and the page's size in bytes."""

    def __init__(
        self,
        k: Sequence[Code],
        v: Sequence[Code],
        order_k: torch.Tensor,
        order_v: torch.Tensor,
        segment: int,
        dtype: torch.dtype,
    ):
        """k, v: a code for each head. order_k, order_v [H, D]: channels by falling importance."""
        self.segment, self.dtype = segment, dtype
        self.heads, self.dim = order_k.shape
        self.tables: dict[str, Any] = {}  # what kernels made of it, by their module, or why they cannot
        self._by_device: dict[torch.device, Layout] = {}
        self._end = 0
        self.k = self._side(k, order_k, True)
        self.v = self._side(v, order_v, False)
        self.page_bytes = self._end

    def on(self, device: torch.device) -> Layout:
        """This layout with what names heads and channels on a device: the same one whenever it is asked for."""
        if device == self.k[0].heads.device:
            return self
        if device not in self._by_device:
            made = object.__new__(Layout)
            vars(made).update(vars(self), tables={})
            for side in ("k", "v"):
                groups = (replace(g, heads=g.heads.to(device), order=g.order.to(device)) for g in getattr(self, side))
                setattr(made, side, list(groups))
            self._by_device |= {self.k[0].heads.device: self, device: made}
        return self._by_device[device]

    def __deepcopy__(self, memo: object) -> Layout:
        return self  # nothing in it changes

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"tables": {}, "_by_device": {}}

    def _side(self, codes: Sequence[Code], order: torch.Tensor, keys: bool) -> list[Group]:
        groups = []
        for code in dict.fromkeys(codes):
            code.check(self.dim, self.segment)
            heads = torch.tensor([i for i, other in enumerate(codes) if other == code])
            group = Group(code, heads, order[heads].to(torch.int16))
            h, t = len(heads), self.segment
            for bits, n in code.runs:
                if bits in (16, OWN):
                    group.values.append(self._field((h, t, n), self._float(bits)))
                    group.scales.append(None)
                elif code.axis == "time":
                    group.values.append(self._field((h, n, packed_bytes(t, bits)), torch.uint8))
                    group.scales.append(self._field((h, 2, n), torch.float16))
                else:
                    shared = code.group or n
                    if n % shared:
                        raise ValueError(f"{n} channels do not divide into groups of {shared}")
                    group.values.append(self._field((h, t, packed_bytes(n, bits)), torch.uint8))
                    group.scales.append(self._field((h, 2 if code.zero else 1, t, n // shared), torch.float16))
            smooth = code.smooth(self.dim)
            if smooth and code.states:
                eight = code.state_bits == 8
                kind = torch.int8 if eight else self._float(code.state_bits)
                group.states = self._field((h, code.states, smooth), kind)
                raised = code.merged and keys
                if eight:  # the bias lies behind the gains, in what fills them up to whole 16 bytes
                    both = self._field((h * (code.states + raised),), torch.float16)
                    group.gains = Field(both.offset, (h, code.states), torch.float16)
                    group.bias = Field(both.offset + group.gains.nbytes, (h,), torch.float16) if raised else None
                elif raised:
                    group.bias = self._field((h,), torch.float16)
            elif smooth and not code.residual:
                raise ValueError("channels that are not kept need at least one state")
            groups.append(group)
        return groups

    @property
    def index_bytes(self) -> int:
        """Bytes of what says which channel is where, once a layer."""
        return sum(x.nbytes for group in (*self.k, *self.v) for x in (group.heads, group.order))

    def bits(self) -> tuple[list[float], list[float]]:
        """Bits a number of each head of K and of V, with its scales, states and bias, without what aligns fields."""
        sides = []
        for groups in (self.k, self.v):
            heads = [0.0] * self.heads
            for g in groups:
                fields = [f for f in (*g.values, *g.scales, g.states, g.gains, g.bias) if f is not None]
                for head in g.heads.tolist():
                    heads[head] = 8 * sum(f.nbytes for f in fields) / len(g.heads) / (self.segment * self.dim)
            sides.append(heads)
        return sides[0], sides[1]

    def _float(self, bits: int) -> torch.dtype:
        return torch.float16 if bits == 16 and self.dtype.itemsize > 2 else self.dtype

    def _field(self, shape: tuple[int, ...], dtype: torch.dtype) -> Field:
        made = Field(self._end, shape, dtype)
        self._end += -(-made.nbytes // ALIGN) * ALIGN
        return made

    def fields(self) -> dict[str, list[Field]]:
        """All fields by what they are for: "kept" and "coefficients"."""
        kept = [f for g in (*self.k, *self.v) for f in (*g.values, *g.scales) if f is not None]
        smooth = [f for g in (*self.k, *self.v) for f in (g.states, g.gains, g.bias) if f is not None]
        return {"kept": kept, "coefficients": smooth}
