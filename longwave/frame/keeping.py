"""Everything that a layer holds, taken out and put back as it was: for files, and for host memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from longwave.frame.counting import Counting
from longwave.frame.observe import Needs, Queries
from longwave.store.state import State, demand, under, within
from longwave.store.tokens import TokenBuffer


class Keeping(Counting):
    """The part of a memory layer that gives its state and takes it back. Methods add what they hold beside."""

    needs: Needs
    scaling: float

    def empty(self) -> TokenBuffer:
        """Where its tokens will lie."""
        return TokenBuffer(self.batch_size, self.needs.columns())

    def mapped(self) -> list[torch.Tensor]:
        """Of what it holds, what lies in files."""
        return []

    def state(self) -> State:
        """Everything held and counted, tensors not copied; {} of a layer that nothing was given to."""
        if self._new is not None:
            self._flush()
        if not self.is_initialized:
            return {}
        made: State = {
            "columns": self.columns,
            "rows": list(self.rows),
            "run": list(self._run),
            "scaling": float(self.scaling),
            "came": None if self._came is None else list(self._came),
            "beyond": self._beyond,
            "unsettled": self._unsettled,
            "record_past": self.record_past,
            "dtype": str(self.dtype).removeprefix("torch."),
            **under("dense", self.dense.state()),
        }
        for name, remembered in (("queries", self.queries), ("heard", self.heard)):
            made |= {} if remembered is None else under(name, remembered.state())
        return made

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Hold what `state` gave, the tensors where they lie, as a layer of a model on `device`.

        ValueError where it does not fit together or is not what this layer keeps; the layer is to be reset then.
        """
        self._clear()
        if not state:
            return
        self.dtype, self.device = getattr(torch, state["dtype"]), device
        self.rows, self._run = list(state["rows"]), list(state["run"])
        self.batch_size, self.columns = len(self.rows), state["columns"]
        self._check_rows(self.batch_size)
        self.scaling, self._beyond, self._unsettled = state["scaling"], state["beyond"], state["unsettled"]
        self._came = None if state["came"] is None else (state["came"][0], state["came"][1])
        self.record_past = state["record_past"]
        demand(
            bool(self.rows) and 0 <= max(self.rows) <= self.columns, f"{self.rows} of {self.columns} tokens are seen"
        )
        demand(len(self._run) == self.batch_size, f"{len(self._run)} runs of {self.batch_size} rows")
        self.dense = self.empty()
        self.dense.load_state(within("dense", state))
        kept = within("queries", state)
        demand(bool(kept) == bool(self.needs.queries), "remembered queries are what this method does not ask for")
        if kept:
            self.queries = Queries.of_state(kept)
            asked = self.needs.queries, self.needs.every, self.batch_size
            found = self.queries.width, self.queries.every, len(self.queries.seen)
            demand(found == asked, f"(width, every, rows) of the queries are {found}, not {asked}")
        heard = within("heard", state)
        if heard:
            self.heard = Queries.of_state(heard)
            found = self.heard.width, self.heard.every, len(self.heard.seen)
            demand(found == (self.needs.surprise, 1, self.batch_size), f"(width, every, rows) heard are {found}")
        self._before = list(self.dense.lengths)
        self.is_initialized = True

    def check_kept(self, kv_heads: int, head_dim: int) -> None:
        """ValueError where dense tokens are not of so many heads and channels, in the type that was planned."""
        shape = self._shape
        if shape is not None:
            demand(
                shape[:3] == (kv_heads, head_dim, head_dim), f"K and V are of (heads, channels, channels) {shape[:3]}"
            )
            demand(self.planned in (None, self.dtype) and self.dense.k.dtype == self.dtype, f"K is {self.dtype}")  # type: ignore[union-attr]
