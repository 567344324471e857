"""What the rows of a layer were told to read by a question that was looked through (longcache's `look`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from longwave.store.state import State, demand

NEVER = -2  # in the place of a span's number: nobody asked for this row
KEPT = 8  # questions that can be taken back one after the other


@dataclass(frozen=True, eq=False)
class Asked:
    """The last question of each row. found int64 [batch, spans]: spans by number, -1 where it found no more, NEVER in a
    row that has no question; since int64 [batch]: tokens before it; who: which rows have one."""

    found: torch.Tensor
    since: torch.Tensor
    who: list[bool]

    @classmethod
    def nobody(cls, batch: int, spans: int, device: torch.device) -> Asked:
        return cls(
            torch.full((batch, spans), NEVER, device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
            [False] * batch,
        )

    def tensors(self, change: Callable[[torch.Tensor], torch.Tensor], who: list[bool] | None = None) -> Asked:
        return Asked(change(self.found), change(self.since), self.who if who is None else who)


class Told:
    """The last question of each row, and those before it."""

    def __init__(self, batch: int, spans: int, device: torch.device):
        self._now = Asked.nobody(batch, spans, device)
        self._before: list[tuple[list[int], Asked]] = []  # tokens of rows, and what was asked by then

    @property
    def found(self) -> torch.Tensor:
        return self._now.found

    @property
    def since(self) -> torch.Tensor:
        return self._now.since

    @property
    def asked(self) -> list[bool]:
        return self._now.who

    def tell(self, found: torch.Tensor, rows: list[int], who: list[bool]) -> None:
        """The rows `who` have a new question, behind rows[b] tokens."""
        old, device = self._remember(rows), self.found.device
        own, since = torch.tensor(who, device=device), torch.tensor(rows, device=device)
        self._now = Asked(
            found.to(device).where(own[:, None], old.found),
            since.where(own, old.since),
            [a or new for a, new in zip(old.who, who, strict=True)],
        )

    def forget(self, rows: list[int], who: list[bool]) -> None:
        """Something else than a question came behind rows[b] tokens of the rows `who`."""
        old = self._remember(rows)
        gone = torch.tensor(who, device=old.found.device)[:, None]
        left = [a and not away for a, away in zip(old.who, who, strict=True)]
        self._now = Asked(old.found.masked_fill(gone, NEVER), old.since, left)

    def take_back(self, rows: list[int]) -> None:
        """Rows have rows[b] tokens left: questions behind those were never asked."""
        while self._before and all(left <= then for left, then in zip(rows, self._before[-1][0], strict=True)):
            _, self._now = self._before.pop()

    def move(self, device: torch.device | str) -> None:
        self._change(lambda asked: asked.tensors(lambda x: x.to(device)))

    def select(self, rows: torch.Tensor) -> None:
        order = rows.tolist()
        self._change(
            lambda asked: asked.tensors(lambda x: x.index_select(0, rows.to(x.device)), [asked.who[r] for r in order])
        )
        self._before = [([n[row] for row in order], asked) for n, asked in self._before]

    def state(self) -> State:
        behind = self._before[-1][0] if self._before else None
        return {"found": self.found, "since": self.since, "asked": list(self.asked), "behind": behind}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], batch: int, spans: int) -> Told:
        """ValueError where it is of another number of rows or spans. What was before the last question is not kept: who
        takes that back has none."""
        found, since = state["found"], state["since"]
        shapes = (tuple(found.shape), tuple(since.shape)) == ((batch, spans), (batch,))
        fits = shapes and found.dtype == since.dtype == torch.int64 and len(state["asked"]) == batch
        demand(fits, f"spans found are {list(found.shape)}, not of {batch} rows and {spans} spans")
        made = cls(batch, spans, found.device)
        made._now = Asked(found, since, list(state["asked"]))
        if state["behind"] is not None:
            made._before = [(list(state["behind"]), Asked.nobody(batch, spans, found.device))]
        return made

    def _change(self, change: Callable[[Asked], Asked]) -> None:
        self._now = change(self._now)
        self._before = [(rows, change(asked)) for rows, asked in self._before]

    def _remember(self, rows: list[int]) -> Asked:
        """What was asked so far, which a question behind rows[b] tokens replaces."""
        self._before.append((list(rows), self._now))
        if len(self._before) > KEPT:
            del self._before[0]
            rows, asked = self._before[0]
            self._before[0] = rows, Asked.nobody(asked.found.shape[0], asked.found.shape[1], asked.found.device)
        return self._now
