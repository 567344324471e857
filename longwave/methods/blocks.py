"""Layers that keep a vector of each block of far tokens, by which it is chosen (infllm, actqkv, longheads)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from longwave.methods.scoped import Scoped, ScopedLayer
from longwave.store.state import State, demand
from longwave.store.tokens import capacity, writable


class Blocks(Scoped):
    """Options of methods whose tokens lie in blocks."""

    @abstractmethod
    def full(self, tokens: int) -> int:
        """Blocks of a row of `tokens` that have a vector."""


class BlockLayer(ScopedLayer):
    """A vector of each block, made once its tokens are all there."""

    method: Blocks

    def _clear(self) -> None:
        super()._clear()
        self.means: torch.Tensor | None = None  # [batch, heads, blocks of the capacity, head_dim]
        self._known: list[int] = []  # blocks of each row that it covers

    @abstractmethod
    def heads(self) -> int:
        """How many vectors a block has."""

    def fit(self) -> torch.Tensor:
        """`means`, with room for as many blocks as the tokens have, and writable."""
        k, old = self.dense.k, self.means
        assert k is not None
        room = self.method.full(capacity(k.shape[2]))
        if old is None or old.shape[2] != room or not writable(old):
            home = self.device if old is None else old.device
            made = k.new_zeros(k.shape[0], self.heads(), room, k.shape[3], device=home)
            if old is not None:
                both = min(room, old.shape[2])
                made[:, :, :both] = old[:, :, :both]
            self.means = made
        self._known = self._known or [0] * self.batch_size
        assert self.means is not None
        return self.means

    def parts(self) -> dict[str, list[torch.Tensor]]:
        return super().parts() | ({} if self.means is None else {"means": [self.means]})

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        if self.means is not None:
            self.means = self.means.to(device)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        if self.means is not None:
            self._known = [self._known[row] for row in rows.tolist()]
            self.means = self.means.index_select(0, rows.to(self.means.device))
            self.fit()

    def drop_last(self, counts: list[int]) -> None:
        super().drop_last(counts)
        if self.means is not None:  # a block that lost tokens is described anew
            self._known = [
                min(known, self.method.full(held)) for known, held in zip(self._known, self.dense.lengths, strict=True)
            ]
            self.fit()

    def state(self) -> State:
        made = super().state()
        means = {} if self.means is None else {"means": self.means}
        return made and {**made, **means, "known": list(self._known)}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        if state:
            self.means, self._known = state.get("means"), list(state["known"])
            if self.means is not None and self.dense.k is not None:
                shape = [self.dense.k.shape[0], self.heads(), self.dense.k.shape[3]]
                found = [*self.means.shape[:2], self.means.shape[3]]
                demand(found == shape and self.means.dtype == self.dtype, f"means are {list(self.means.shape)}")
                demand(len(self._known) == self.batch_size, f"{len(self._known)} rows of {self.batch_size} are known")

    # steps

    def reserve(self, new: int) -> None:
        super().reserve(new)
        if self.means is not None:
            self.fit()

    def release(self) -> None:
        super().release()
        if self.means is not None:
            self.fit()

    def step_state(self) -> list[torch.Tensor]:
        return [*super().step_state(), *([] if self.means is None else [self.means])]
