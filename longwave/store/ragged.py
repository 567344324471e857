"""Tokens of heads that hold different numbers of them: row behind row and head behind head, without padding."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch

from longwave.store.state import State, demand


class RaggedBuffer:
    """K and V whose head h holds counts[b][h] tokens of row b, behind those of the heads and rows before it.

    items: K and V [slots, head_dim] and the columns [slots] by name, as many slots as tokens unless `reserve`d; none
    while nothing is held. ends int32 [batch, kv_heads] says on the device where in its row each head ends; None then.
    """

    def __init__(self, batch: int, heads: int, columns: Mapping[str, torch.dtype] | None = None):
        self.heads, self.declared = heads, dict(columns or {})
        self.counts = [[0] * heads for _ in range(batch)]
        self.rooms = [0] * batch  # slots of each row
        self.fixed = False  # between `reserve` and `release`
        self.items: dict[str, torch.Tensor] = {}
        self.ends: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return any(map(any, self.counts))

    @property
    def totals(self) -> list[int]:
        """Tokens of each row, of all heads together."""
        return [sum(own) for own in self.counts]

    def row(self, row: int) -> slice:
        """The slots of one row, empty ones included."""
        start = sum(self.rooms[:row])
        return slice(start, start + self.rooms[row])

    def place(self, row: int, head: int) -> slice:
        """The slots of one head of one row."""
        start = self.row(row).start + sum(self.counts[row][:head])
        return slice(start, start + self.counts[row][head])

    def fill(self, items: Mapping[str, torch.Tensor], kept: torch.Tensor, counts: list[list[int]]) -> None:
        """Hold instead, of K, V and columns [batch, 1, n, ...], what is kept, bool [batch, n]: of row b counts[b][h]
        tokens of one head behind the other. They are copied."""
        self._put({name: items[name][:, 0][kept] for name in ("k", "v", *self.declared)}, counts)

    def drop_last(self, counts: list[int]) -> None:
        """Forget the last counts[b] tokens of every head of row b."""
        if not any(counts):
            return
        left = [[n - less for n in own] for own, less in zip(self.counts, counts, strict=True)]
        starts = [[self.place(row, head).start for head in range(self.heads)] for row in range(len(counts))]
        firsts = [
            slice(start, start + n)
            for row, own in zip(starts, left, strict=True)
            for start, n in zip(row, own, strict=True)
        ]
        self._put(self._taken(firsts), left)

    def _taken(self, slots: list[slice]) -> dict[str, torch.Tensor]:
        """Copies of what lies there, one behind the other."""
        return {name: torch.cat([x[own] for own in slots]) for name, x in self.items.items()}

    def _rows(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Copies of what some rows hold."""
        starts, totals = [self.row(row).start for row in rows], self.totals
        return self._taken([slice(start, start + totals[row]) for start, row in zip(starts, rows, strict=True)])

    def _put(self, items: dict[str, torch.Tensor], counts: list[list[int]]) -> None:
        """Hold items [tokens, ...], one row behind the other."""
        self.counts, device = counts, items["k"].device
        ends = torch.tensor([list(accumulate(own)) for own in counts], dtype=torch.int32)
        if self.fixed:
            assert self.ends is not None
            self.ends.copy_(ends)
            for name, x in items.items():
                for row, own in enumerate(x.split(self.totals)):
                    start = self.row(row).start
                    self.items[name][start : start + len(own)] = own
            return
        self.rooms = self.totals
        self.items, self.ends = (items, ends.to(device)) if self else ({}, None)

    def tensors(self) -> list[torch.Tensor]:
        """K and V, and what says whose they are."""
        return [] if self.ends is None else [self.items["k"], self.items["v"], self.ends]

    def columns(self) -> list[torch.Tensor]:
        return [self.items[name] for name in self.declared if self.items]

    def reserve(self, rooms: list[int], like: torch.Tensor) -> None:
        """Room for rooms[b] slots of row b, of K as `like` [batch, kv_heads, n, head_dim], that stays where it is."""
        rooms = [max(room, held) for room, held in zip(rooms, self.totals, strict=True)]
        slots, held, old = sum(rooms), self.items, [self.row(row).start for row in range(len(rooms))]
        shapes = {"k": (like.dtype, like.shape[3:]), "v": (like.dtype, like.shape[3:])}
        shapes |= {name: (dtype, torch.Size()) for name, dtype in self.declared.items()}
        made = {name: like.new_zeros(slots, *shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
        for name, x in held.items():
            for start, own, total in zip(accumulate([0, *rooms[:-1]]), old, self.totals, strict=True):
                made[name][start : start + total] = x[own : own + total]
        if self.ends is None:
            self.ends = torch.zeros(len(rooms), self.heads, dtype=torch.int32, device=like.device)
        self.items, self.rooms, self.fixed = made, rooms, True
        self.ends = self.ends.clone()  # steps read it, and `fill` writes to it

    def release(self) -> None:
        """Back to no more memory than is held."""
        if self.fixed:
            self.fixed = False
            self._put(self._rows(list(range(len(self.counts)))), self.counts)

    def select(self, rows: torch.Tensor) -> None:
        """Replace the batch by `rows` (indices, repeats allowed)."""
        order = rows.tolist()
        counts = [list(self.counts[row]) for row in order]
        if self.items:
            self._put(self._rows(order), counts)
        self.counts, self.rooms = counts, [sum(own) for own in counts]

    def move(self, device: torch.device | str) -> None:
        self.items = {name: x.to(device) for name, x in self.items.items()}
        self.ends = None if self.ends is None else self.ends.to(device)

    def state(self) -> State:
        """Everything held, not copied."""
        if self.ends is None:
            return {}
        return {"counts": [n for own in self.counts for n in own], "ends": self.ends, **self.items}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave. ValueError where it does not fit together."""
        if not state:
            return
        flat, batch = list(state["counts"]), len(self.counts)
        demand(
            len(flat) == batch * self.heads and min(flat) >= 0, f"{len(flat)} counts of {batch} x {self.heads} heads"
        )
        names = {"k", "v", *self.declared}
        demand(set(state) == names | {"counts", "ends"}, f"ragged heads come with {sorted(state)}")
        self.counts = [flat[row * self.heads : (row + 1) * self.heads] for row in range(batch)]
        self.rooms, self.items = self.totals, {name: state[name] for name in ("k", "v", *self.declared)}
        for name, x in self.items.items():
            demand(len(x) == sum(flat), f"heads hold {sum(flat)} tokens, and of {name} there are {len(x)}")
            demand(x.ndim == (2 if name in ("k", "v") else 1), f"{name} is {list(x.shape)}")
            demand(x.dtype == self.declared.get(name, self.items["k"].dtype), f"{name} is {x.dtype}")
        self.ends = state["ends"]
        ends = torch.tensor(self.counts).cumsum(-1)
        demand(self.ends.dtype == torch.int32 and torch.equal(self.ends.cpu().long(), ends), "heads end elsewhere")
