"""Runs tasks: what a folder of results does not hold yet is measured batch by batch and written pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from longwave.evals.batches import Batch, batches
from longwave.evals.results import Results
from longwave.evals.task import LossTask, Sample, Task

Take = Callable[[str], bool]  # a method's label -> whether it is to be measured here


class Measure(Protocol):
    """Methods of a model. Called: result rows of samples that share a pass, a list for each method that is named and
    may be taken, which is asked before it is begun.

    equal: whether samples of a pass have to have equal lengths, as those of tasks that score tokens always have.
    """

    model: Any
    methods: Mapping[str, Any]
    equal: bool

    def __call__(
        self, task: Task, samples: Sequence[Sample], labels: Sequence[str], take: Take
    ) -> Iterator[list[dict[str, Any]]]: ...


def run(
    measure: Measure,
    tasks: Mapping[str, tuple[Task, Sequence[Sample]]],
    results: Results,
    batch: Batch = Batch(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure what `results` does not hold yet. Samples and methods are done in a fixed order, written pass by pass.

    What another process measures meanwhile is left to it, and waited for at the end: that is taken over where it dies.
    """
    methods = list(measure.methods)
    keys = [(name, m, s.id) for name, (_, samples) in tasks.items() for s in samples for m in methods]

    def tell() -> None:
        progress(sum(key in results.done for key in keys), len(keys))

    tell()
    for name, (_, samples) in tasks.items():
        for sample in samples:
            results.check_prompt((name, methods[0], sample.id), sample.prompt_sha256)
    for wait in (False, True):
        for name, (task, samples) in tasks.items():
            missing = [s for s in samples if any((name, m, s.id) not in results.done for m in methods)]
            if not missing:
                continue
            for group in batches(missing, batch, measure.equal or isinstance(task, LossTask)):
                results.refresh()
                ids = [s.id for s in group]
                left = [m for m in methods if any((name, m, i) not in results.done for i in ids)]
                try:
                    for rows in measure(task, group, left, partial(results.take, name, ids, wait)):
                        results.append([{"task": name, **row} for row in rows])
                        tell()
                except torch.OutOfMemoryError as error:
                    longest = max(len(s.ids) for s in group)
                    raise ValueError(
                        f"{measure.model.device} has too little memory for {len(group)} prompts of up to {longest} "
                        f"tokens: lower --batch or --batch-tokens and run again, what was measured is kept ({error})"
                    ) from None
                finally:
                    results.let_go()
