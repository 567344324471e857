"""Which samples share a pass: those of one setting and of about the same length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longwave.evals.task import Sample

EVEN = 0.9  # rows of a pass are at least this share of the longest: little padding, and bytes can be shared out


@dataclass(frozen=True)
class Batch:
    """How many prompts share a pass: at most `rows`, and at most `tokens` of rows x the longest prompt."""

    rows: int = 8
    tokens: int = 16384

    def __post_init__(self) -> None:
        if self.rows < 1 or self.tokens < 1:
            raise ValueError(f"a batch has at least one row and one token, got {self.rows} and {self.tokens}")


def batches(samples: Sequence[Sample], batch: Batch, equal: bool = False) -> Iterator[list[Sample]]:
    """Samples that can share a pass, short answers and long prompts first; those with the same context lie together.

    equal: only samples of the same lengths share one. Loss tasks need it, and caches that take no gaps.
    """
    alike: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        lengths = (len(sample.ids), sample.context) if equal else ()
        alike.setdefault((sample.max_new_tokens, sample.stop_at_newline, lengths), []).append(sample)
    for same in sorted(alike.values(), key=lambda same: same[0].max_new_tokens):
        families: dict[bytes, list[Sample]] = {}
        for sample in same:
            families.setdefault(context_of(sample), []).append(sample)
        ordered = sorted(families.values(), key=lambda family: -max(len(s.ids) for s in family))
        group: list[Sample] = []
        for sample in (sample for family in ordered for sample in family):
            longest = max(len(s.ids) for s in [*group, sample])
            deepest = max(s.context for s in [*group, sample])  # what is stored before the questions come
            uneven = len(sample.ids) < EVEN * longest or sample.context < EVEN * deepest
            if group and (uneven or len(group) == batch.rows or longest * (len(group) + 1) > batch.tokens):
                yield group
                group = []
            group.append(sample)
        if group:
            yield group


def context_of(sample: Sample) -> bytes:
    return sample.ids[: sample.context].tobytes()
