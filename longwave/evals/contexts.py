"""Contexts that are read once, and forked to every method that can take what was read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from longwave.evals.batches import context_of
from longwave.evals.fork import can_fork, fork, pad_left, passes_of, prefill, read
from longwave.evals.rows import Clock
from longwave.evals.task import Sample
from longwave.frame import LongCache, Needs

Make = Callable[[int], LongCache]  # rows -> an empty cache


class Contexts:
    """The contexts of some samples, read once and handed to each method. needs: what methods ask of that reading."""

    def __init__(
        self, model: Any, samples: Sequence[Sample], pad: int, question: str = "after", needs: Needs | None = None
    ):
        self.model, self.needs = model, needs
        self.rows: list[int] = []  # which context each sample has
        self.ids, self.mask = torch.zeros(len(samples), 0, dtype=torch.long), None
        self.seconds = 0.0
        self._dense: LongCache | None = None
        if question == "with":
            return
        unique: dict[bytes, int] = {}
        contexts = []
        for sample in samples:
            if context_of(sample) not in unique:
                unique[context_of(sample)] = len(unique)
                contexts.append(sample.ids[: sample.context])
            self.rows.append(unique[context_of(sample)])
        self.count = len(unique)
        self.ids, self.mask = pad_left(contexts, pad)

    def give(self, make: Make) -> tuple[LongCache, float]:
        """A method's cache that has read them, a row a sample, and the seconds that reading takes."""
        if not self.rows:  # the whole prompt is read by `generate`
            return make(len(self.ids)), 0.0
        clock = Clock(self.model.device)
        memory = make(max(len(self.rows), self.count))
        passes = passes_of(self.model, memory, self.ids.shape[1])
        if passes is None and can_fork(memory):
            shared = self._read_once(clock)
            fork(self._dense, memory)  # type: ignore[arg-type]
        else:
            shared = 0.0
            read(self.model, memory, self.ids, self.mask, passes)
        if self.rows != list(range(self.count)):
            memory.batch_select_indices(torch.tensor(self.rows))
        return memory, shared + clock.look()

    def _read_once(self, clock: Clock) -> float:
        if self._dense is None:
            self._dense = prefill(self.model, self.ids, self.mask, self.needs)
            self.seconds = clock.look()
        return self.seconds

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Their ids and mask as the first columns of a batch, a row a sample."""
        if not self.rows:
            return self.ids, torch.zeros_like(self.ids)
        assert self.mask is not None
        index = torch.tensor(self.rows)
        return self.ids[index], self.mask[index]
