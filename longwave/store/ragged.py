"""Tokens of heads that hold different numbers of them: of each row one head lies behind the other, without padding.

Rows are padded to the longest, as everywhere; heads are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from longwave.store.state import State, demand, under, within
from longwave.store.tokens import TokenBuffer


class RaggedBuffer:
    """K and V whose head h holds counts[b][h] tokens of row b, behind those of the heads before it.

    `slots` is a `TokenBuffer` of one head, [batch, 1, capacity, head_dim], with its side columns. ends int32 [batch,
    kv_heads] says on the device where each head ends; None while nothing is held and nothing reserved.
    """

    def __init__(self, batch: int, heads: int, columns: Mapping[str, torch.dtype] | None = None):
        self.heads, self.slots = heads, TokenBuffer(batch, columns)
        self.counts = [[0] * heads for _ in range(batch)]
        self.ends: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return any(self.slots.lengths)

    def items(self) -> dict[str, torch.Tensor]:
        """K, V and the columns by name, as they lie."""
        k, v = self.slots.k, self.slots.v
        return {} if k is None or v is None else {"k": k, "v": v, **self.slots.columns}

    def place(self, row: int, head: int) -> slice:
        """The slots of one head of one row."""
        start = sum(self.counts[row][:head])
        return slice(start, start + self.counts[row][head])

    def fill(self, items: Mapping[str, torch.Tensor], kept: torch.Tensor, counts: list[list[int]]) -> None:
        """Hold instead, of K, V and columns [batch, 1, n, ...], what is kept, bool [batch, n]: of row b counts[b][h]
        tokens of one head behind the other. They are not what is held now, but copies."""
        if not self.slots.fixed:
            self.slots = TokenBuffer(len(counts), self.slots.declared)
        elif any(self.slots.lengths):
            self.slots.crop(self.slots.lengths)
        columns = {name: x for name, x in items.items() if name in self.slots.declared}
        self.slots.append(items["k"], items["v"], kept, columns)
        self.counts = counts
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(-1, dtype=torch.int32).to(kept.device)
        if self.ends is None or not self.slots.fixed:
            self.ends = ends
        else:
            self.ends.copy_(ends)

    def drop_last(self, counts: list[int]) -> None:
        """Forget the last counts[b] tokens of every head of row b."""
        if not any(counts):
            return
        kept = torch.zeros(len(counts), self.slots.longest, dtype=torch.bool)
        for row, less in enumerate(counts):
            for head in range(self.heads):
                own = self.place(row, head)
                kept[row, own.start : own.stop - less] = True
        held = {name: x[:, :, : self.slots.longest] for name, x in self.items().items()}
        left = [[n - less for n in own] for own, less in zip(self.counts, counts, strict=True)]
        self.fill(held, kept.to(held["k"].device), left)

    def tensors(self) -> list[torch.Tensor]:
        """K and V, and what says whose they are."""
        return [*self.slots.tensors(), *([] if self.ends is None else [self.ends])]

    def reserve(self, slots: int, like: torch.Tensor) -> None:
        """Room for so many slots a row, of K as `like` [batch, kv_heads, n, head_dim], that stays where it is."""
        if self.slots.k is None:
            none = like.new_zeros(like.shape[0], 1, 0, like.shape[3])
            self.slots.append(none, none.clone(), None)
            self.ends = torch.zeros(like.shape[0], self.heads, dtype=torch.int32, device=like.device)
        assert self.ends is not None
        self.slots.reserve(slots)
        self.ends = self.ends.clone()  # steps read it, and `fill` writes to it

    def release(self) -> None:
        """Back to no more memory than is held."""
        if self:
            self.slots.release()
        else:
            self.slots, self.ends = TokenBuffer(len(self.counts), self.slots.declared), None

    def select(self, rows: torch.Tensor) -> None:
        """Replace the batch by `rows` (indices, repeats allowed)."""
        self.slots.select(rows)
        self.counts = [list(self.counts[row]) for row in rows.tolist()]
        if self.ends is not None:
            self.ends = self.ends[rows.to(self.ends.device)]
        self.release()

    def move(self, device: torch.device | str) -> None:
        self.slots.move(device)
        self.ends = None if self.ends is None else self.ends.to(device)

    def state(self) -> State:
        """Everything held, not copied."""
        if self.ends is None:
            return {}
        return {
            "counts": [n for own in self.counts for n in own],
            "ends": self.ends,
            **under("slots", self.slots.state()),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave. ValueError where it does not fit together."""
        if not state:
            return
        self.slots.load_state(within("slots", state))
        flat, batch = list(state["counts"]), len(self.counts)
        demand(
            len(flat) == batch * self.heads and min(flat) >= 0, f"{len(flat)} counts of {batch} x {self.heads} heads"
        )
        self.counts = [flat[row * self.heads : (row + 1) * self.heads] for row in range(batch)]
        demand([sum(own) for own in self.counts] == self.slots.lengths, "heads hold another number than there are")
        demand(self.slots.k is not None and self.slots.k.shape[1] == 1, "heads lie one behind the other, as one")
        self.ends = state["ends"]
        ends = torch.tensor(self.counts).cumsum(-1)
        demand(self.ends.dtype == torch.int32 and torch.equal(self.ends.cpu().long(), ends), "heads end elsewhere")
