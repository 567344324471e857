"""Tokens as their coordinates on a few axes of K before rotation and of V: rebuilt where attention asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from longwave.store.state import State, demand

BLOCK = 4096  # tokens whose keys are rebuilt at once


class LatentStore:
    """The middle of a batch: k [batch, room, groups, rank of K], v alike, and positions int32 [batch, room].

    axes_k [groups, rank, heads * head_dim] and axes_v: orthonormal rows. Tokens join by `segment`. Answers to what
    `PageStore` does. rotation: turns x [batch, heads, n, head_dim] to positions [batch, n] (`on`); it belongs to the
    layer, which lends it as long as something is rebuilt.
    """

    def __init__(self, batch: int, axes_k: torch.Tensor, axes_v: torch.Tensor, head_dim: int, segment: int):
        self.axes_k, self.axes_v, self.head_dim, self.segment = axes_k, axes_v, head_dim, segment
        self.tokens = [0] * batch
        self.k = self._room(batch, axes_k, 0)
        self.v = self._room(batch, axes_v, 0)
        self.positions = torch.zeros(batch, 0, dtype=torch.int32, device=axes_k.device)
        self.fixed = False
        self.rotation: Any = None

    def _room(self, batch: int, axes: torch.Tensor, tokens: int) -> torch.Tensor:
        return axes.new_zeros(batch, tokens, axes.shape[0], axes.shape[1])

    @property
    def counts(self) -> list[int]:
        return [tokens // self.segment for tokens in self.tokens]

    @property
    def room(self) -> int:
        """Tokens that there is room for."""
        return self.positions.shape[1]

    def due(self, row: int, waiting: int) -> int:
        return waiting // self.segment * self.segment

    def append(self, row: int | None, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> None:
        """K before rotation and V [b, H, n, D] at positions [b, n] join a row, or all of them alike."""
        rows = range(len(self.tokens)) if row is None else [row]
        ends = [self.tokens[r] + k.shape[2] for r in rows]
        if max(ends) > self.room or not self._writable():
            self._resize(max(self.room, *ends))
        new_k, new_v = _onto(k, self.axes_k), _onto(v, self.axes_v)
        for i, (r, end) in enumerate(zip(rows, ends, strict=True)):
            own = slice(self.tokens[r], end)
            self.k[r, own], self.v[r, own], self.positions[r, own] = new_k[i], new_v[i], positions[i].int()
            self.tokens[r] = end

    def _writable(self) -> bool:
        return torch.is_inference_mode_enabled() or not self.k.is_inference()

    def _resize(self, room: int) -> None:
        for name in ("k", "v", "positions"):
            old = getattr(self, name)
            new = old.new_zeros(old.shape[0], room, *old.shape[2:])
            count = min(room, old.shape[1])
            new[:, :count] = old[:, :count]
            setattr(self, name, new)

    def reserve(self, segments: int) -> None:
        self.fixed = True
        self._resize(max(self.room, segments * self.segment))

    def release(self) -> None:
        self.fixed = False
        if self.room > max(self.tokens):
            self._resize(max(self.tokens))

    # attention

    def expands(self, q: torch.Tensor) -> bool:
        return q.shape[2] > 1

    def attend(self, *args: object) -> None:
        """No kernel knows latents."""

    def answers(self) -> list[str]:
        return ["plain torch (latents have no kernel)"]

    def keys(self, rows: slice, tokens: slice, kind: torch.dtype) -> torch.Tensor:
        """Rebuilt and rotated: [rows, H, tokens, D] of `kind`."""
        plain = _back(self.k[rows, tokens].to(kind), self.axes_k.to(kind), self.head_dim)
        return self.rotation.on(plain, self.positions[rows, tokens].long())

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """q [B, H, R, D] -> unscaled scores [B, H, R, room]."""
        spans = [slice(start, min(start + BLOCK, self.room)) for start in range(0, self.room, BLOCK)]
        return torch.cat([q @ self.keys(slice(None), span, q.dtype).mT for span in spans], -1)

    def mix(self, p: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, H, R, room] -> their share of the output [B, H, R, D]: mixed as latents, then rebuilt."""
        groups, rank, _ = self.axes_v.shape
        grouped = p.unflatten(1, (groups, -1))  # [B, groups, g, R, room]
        mixed = grouped @ self.v.to(p.dtype).permute(0, 2, 1, 3)[:, :, None]  # [B, groups, g, R, rank]
        axes = self.axes_v.to(p.dtype).view(groups, rank, -1, self.head_dim).transpose(1, 2)  # [groups, g, rank, D]
        return (mixed @ axes).flatten(1, 2)

    def expand(self, row: int, out_k: torch.Tensor, out_v: torch.Tensor) -> None:
        """K and V of a row into [1, H, tokens, D] each."""
        k, v = self.span(row, 0, self.tokens[row])
        out_k[0], out_v[0] = k, v

    # what it holds

    def span(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        kind = torch.float64 if self.k.dtype == torch.float64 else torch.float32
        rows, own = slice(row, row + 1), slice(start, stop)
        k = self.keys(rows, own, kind)
        v = _back(self.v[rows, own].to(kind), self.axes_v.to(kind), self.head_dim)
        return k[0].to(self.k.dtype), v[0].to(self.k.dtype)

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        heads, longest = self.axes_k.shape[0] * self.axes_k.shape[2] // self.head_dim, max(self.tokens)
        sides = [self.k.new_zeros(len(self.tokens), heads, longest, self.head_dim) for _ in range(2)]
        for row, tokens in enumerate(self.tokens):
            for side, own in zip(sides, self.span(row, 0, tokens), strict=True):
                side[row, :, :tokens] = own
        return sides[0], sides[1]

    def index(self) -> Iterator[torch.Tensor]:
        yield self.axes_k
        yield self.axes_v

    def parts(self) -> dict[str, list[torch.Tensor]]:
        return {"latents": [self.k, self.v], "positions": [self.positions]}

    def state(self) -> State:
        return {"tokens": list(self.tokens), "k": self.k, "v": self.v, "positions": self.positions}

    def load_state(self, state: Mapping[str, Any]) -> None:
        tokens, room = list(state["tokens"]), state["positions"].shape[1]
        demand(len(tokens) == len(self.tokens) and max(tokens) <= room, f"{tokens} tokens in room for {room}")
        for name, axes in (("k", self.axes_k), ("v", self.axes_v)):
            want, got = [len(tokens), room, *axes.shape[:2]], state[name]
            demand(list(got.shape) == want and got.dtype == axes.dtype, f"latents are {list(got.shape)}, not {want}")
        demand(state["positions"].dtype == torch.int32, "positions are whole numbers")
        self.tokens, self.k, self.v, self.positions = tokens, state["k"], state["v"], state["positions"]
        self.axes_k, self.axes_v = (x.to(self.k.device) for x in (self.axes_k, self.axes_v))

    def move(self, device: torch.device | str) -> None:
        for name in ("k", "v", "positions", "axes_k", "axes_v"):
            setattr(self, name, getattr(self, name).to(device))

    def select(self, rows: torch.Tensor) -> None:
        index = rows.to(self.k.device)
        self.k, self.v, self.positions = (x.index_select(0, index) for x in (self.k, self.v, self.positions))
        self.tokens = [self.tokens[row] for row in rows.tolist()]
        if not self.fixed:
            self.release()


def _onto(x: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """x [b, H, n, D] -> its coordinates [b, n, groups, rank] on axes [groups, rank, heads * D], in their dtype."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(kind).unflatten(1, (axes.shape[0], -1)).transpose(2, 3).flatten(3)  # [b, groups, n, heads * D]
    return (wide @ axes.to(kind).mT).transpose(1, 2).to(axes.dtype)


def _back(x: torch.Tensor, axes: torch.Tensor, dim: int) -> torch.Tensor:
    """Coordinates [b, n, groups, rank] -> [b, H, n, D]."""
    return (x.transpose(1, 2) @ axes).unflatten(3, (-1, dim)).transpose(2, 3).flatten(1, 2)
