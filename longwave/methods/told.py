"""What the rows of a layer were told to read by a question that was looked through (longcache's `look`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from longwave.store.state import State, demand

NEVER = -2  # in the place of a span's number: nobody asked for this row
KEPT = 8  # questions that can be taken back one after the other


class Told:
    """Spans by number, row by row, and what they were before.

    found int64 [batch, spans]: -1 where a question found no more, NEVER in a row that has no question. asked: which
    rows have one.
    """

    def __init__(self, batch: int, spans: int, device: torch.device):
        self.found = torch.full((batch, spans), NEVER, device=device)
        self.asked = [False] * batch
        self._before: list[tuple[list[int], torch.Tensor | None, list[bool]]] = []  # tokens of rows, and those two

    def tell(self, found: torch.Tensor, rows: list[int], who: list[bool]) -> None:
        """The rows `who` have a new question, behind rows[b] tokens."""
        self._remember(rows)
        own = torch.tensor(who, device=self.found.device)[:, None]
        self.found = found.to(self.found.device).where(own, self.found)
        self.asked = [a or new for a, new in zip(self.asked, who, strict=True)]

    def forget(self, rows: list[int], who: list[bool]) -> None:
        """Something else than a question came behind rows[b] tokens of the rows `who`."""
        self._remember(rows)
        self.found = self.found.masked_fill(torch.tensor(who, device=self.found.device)[:, None], NEVER)
        self.asked = [a and not gone for a, gone in zip(self.asked, who, strict=True)]

    def take_back(self, rows: list[int]) -> None:
        """Rows have rows[b] tokens left: questions behind those were never asked."""
        while self._before and all(left <= then for left, then in zip(rows, self._before[-1][0], strict=True)):
            _, found, self.asked = self._before.pop()
            self.found = torch.full_like(self.found, NEVER) if found is None else found

    def move(self, device: torch.device | str) -> None:
        self.found = self.found.to(device)
        self._before = [(n, x if x is None else x.to(device), asked) for n, x, asked in self._before]

    def select(self, rows: torch.Tensor) -> None:
        order = rows.tolist()

        def of(x: torch.Tensor) -> torch.Tensor:
            return x.index_select(0, rows.to(x.device))

        self.found, self.asked = of(self.found), [self.asked[row] for row in order]
        self._before = [
            ([n[row] for row in order], x if x is None else of(x), [asked[row] for row in order])
            for n, x, asked in self._before
        ]

    def state(self) -> State:
        behind = self._before[-1][0] if self._before else None
        return {"found": self.found, "asked": list(self.asked), "behind": behind}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], batch: int, spans: int) -> Told:
        """ValueError where it is of another number of rows or spans. What was before the last question is not kept: who
        takes that back has none."""
        found = state["found"]
        fits = tuple(found.shape) == (batch, spans) and found.dtype == torch.int64 and len(state["asked"]) == batch
        demand(fits, f"spans found are {list(found.shape)}, not of {batch} rows and {spans} spans")
        made = cls(batch, spans, found.device)
        made.found, made.asked = found, list(state["asked"])
        if state["behind"] is not None:
            made._before = [(list(state["behind"]), None, [False] * batch)]
        return made

    def _remember(self, rows: list[int]) -> None:
        self._before.append((list(rows), self.found, self.asked))
        if len(self._before) > KEPT:
            del self._before[0]
            rows, _, asked = self._before[0]
            self._before[0] = rows, None, [False] * len(asked)
