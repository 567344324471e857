"""A memory layer whose middle lies coded with that of others.

It holds the first SINKS tokens, at least the last WINDOW and an open segment dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from longwave.codec.coder import SINKS
from longwave.codec.middle import Middle, Part
from longwave.frame import MemoryLayer, Needs
from longwave.frame.observe import Pass
from longwave.ops import mass as attention_mass
from longwave.ops.attention.reference import dense_attention
from longwave.store.state import State


class CodedLayer(MemoryLayer):
    """One row, without padding."""

    middle: Middle | None = None  # once it is part of a cache

    def __init__(
        self, index: int, position: int, parts: Sequence[Part], needs: Needs | None = None, ahead: bool | None = None
    ):
        """position: its number among the memory layers. parts: of all of these, as they begin. ahead: as `Middle`."""
        needs = needs or Needs()
        if any(position == part.layers[0] for part in parts):
            needs = needs | Needs(ids=True)
        super().__init__(index, needs)
        self.position, self._parts, self._ahead = position, parts, ahead

    def join(self, peers: list[MemoryLayer]) -> None:
        if self is peers[0]:
            made = Middle(self._parts, peers, self._ahead)
            for peer in peers:
                assert isinstance(peer, CodedLayer)
                peer.middle = made

    @property
    def _coded(self) -> int:
        """Tokens that lie coded."""
        return 0 if self.middle is None else self.middle.part(self.position).tokens

    # a pass

    def refuse(self, p: Pass) -> None:
        if p.mask is not None or not p.causal:
            raise NotImplementedError(
                "layers that lie coded read causal text, and this pass has a 4D mask or looks ahead: hold it dense"
            )
        if p.valid is not None:
            raise NotImplementedError("layers that lie coded hold one row without padding: leave the padding out")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._check_rows(key_states.shape[0])
        super().lazy_initialization(key_states, value_states)

    def _check_rows(self, rows: int) -> None:
        super()._check_rows(rows)
        if rows != 1:
            raise NotImplementedError(
                f"layers that lie coded hold one row, not {rows} (beams and returned sequences count as rows): give "
                "each row a cache of its own"
            )

    def settle(self) -> None:
        super().settle()
        if self.middle is not None:
            self.middle.settled(self.position)

    def attend(self, p: Pass) -> torch.Tensor:
        if not self._coded:
            return super().attend(p)
        k, v = self._whole()
        return dense_attention(p.q, k, v, p.scaling, self._seen(p))

    def log_sum_exp(self, p: Pass) -> torch.Tensor | None:
        if not self._coded:
            return None
        return attention_mass.log_sum_exp(p.q, self._whole()[0], p.scaling, self._seen(p))

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all tokens, in order, in storage that the layers of a pass share."""
        assert self.middle is not None
        dense, scratch = self.dense.view(), self.progress.scratch
        coded = self.middle.of(self.position, dense[0], ahead=True)
        made = scratch.take(dense[0], self.rows[0])
        scratch.beside((1 + self.middle.goes_ahead(dense[0].device)) * sum(x.nbytes for x in self.middle.expanded()))
        for x, kept, middle in zip(made, dense, coded, strict=True):
            torch.cat([kept[:, :, :SINKS], middle, kept[:, :, SINKS:]], 2, out=x)
        return made

    def _seen(self, p: Pass) -> torch.Tensor:
        """Columns that each query sees: all up to its own."""
        count = p.q.shape[2]
        return torch.arange(self.rows[0] - count + 1, self.rows[0] + 1, device=p.q.device)[None]

    # what it stands for

    def span(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        gone = self._coded
        end = SINKS + gone
        if not gone or stop <= SINKS or start >= end:
            moved = gone if start >= end else 0
            return super().span(row, start - moved, stop - moved)
        assert self.middle is not None
        first = max(start, SINKS)
        coded = self.middle.of(self.position, self.dense.view()[0], first, min(stop, end))
        before, after = super().span(row, start, first), super().span(row, SINKS, max(stop, end) - gone)
        self.middle.let_go(self.position)
        k, v = (torch.cat([a, x[0], b], 1) for a, x, b in zip(before, coded, after, strict=True))
        return k, v

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        dense = super().materialize()
        if not self._coded:
            return dense
        k, v = self.span(0, 0, self.rows[0])
        return k[None], v[None]

    def held(self) -> list[int]:
        return [length + self._coded for length in self.dense.lengths]

    def answers(self) -> list[str]:
        return ["plain torch (what lies coded is expanded in every pass)"] if self._coded else []

    def can_drop(self, counts: list[int]) -> None:
        free = self.dense.lengths[0] - SINKS
        if self._coded and counts[0] > free:
            raise ValueError(
                f"cannot remove the last {counts[0]} tokens: those before the last {free} lie coded. Keep a "
                "copy.deepcopy of the cache to go back to"
            )
        super().can_drop(counts)

    def unsteady(self) -> str | None:
        return "what lies coded is expanded by the host in every step"

    def parts(self) -> dict[str, list[torch.Tensor]]:
        parts = super().parts()
        if self.middle is None:
            return parts
        part = self.middle.part(self.position)
        coded = part.blobs if self.position == part.layers[0] else []
        return parts | {"coded": coded, "expanded": self.middle.expanded() if self.position == 0 else []}

    # what it keeps

    def state(self) -> State:
        made = super().state()
        return made and {**made, **(self.middle.state(self.position) if self.middle else {})}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        if state and self.middle is not None:
            self.middle.load_state(self.position, state)

    def _clear(self) -> None:
        super()._clear()
        if self.middle is not None:
            self.middle.clear(self.position)
