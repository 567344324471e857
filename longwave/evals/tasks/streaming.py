"""Perplexity of a book that streams through one cache, as StreamingLLM, TreeKV and WeightedKV measure it.

Windows of `length` tokens start with an empty cache; their tokens are fed `chunk` at a time, and each is predicted from
what the method holds by then. Windows follow each other in steps of `stride` tokens; of all but a book's first the last
`stride` tokens count, so that each token of the book is scored once. Windows of a length run in lockstep, a row each.

A length may be beyond what the model was trained for: its column says so. Methods that leave keys rotated where they
were cannot answer there, the full cache included; positions="slots" can. Columns name the chunk too: a method evicts
after each, so longer ones see more than its budget, and figures of two chunks do not compare. Papers feed single
tokens.

Books are not joined. The tokenizer's first token, where it wants one, opens each window.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from longwave.checks import whole
from longwave.evals import data
from longwave.evals.task import LossTask, Sample, Setting, listed


@dataclass(frozen=True)
class Streaming(LossTask):
    """Perplexity of books that stream through one cache, also beyond the trained length."""

    name: ClassVar[str] = "streaming"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "stream"
    unit: ClassVar[str] = "perplexity"

    lengths: Any = (4096, 8192, 16384)  # tokens of a window
    stride: int | None = None  # tokens from a window to the next, and scored of it; None: its length, all are scored
    chunk: int = 1  # tokens fed at a time
    windows: int = 2  # of every book, at each length
    text: str = "pg19"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", listed(self.lengths, int, "lengths"))
        for name in ("chunk", "windows"):
            whole(name, getattr(self, name), 1)
        if min(self.lengths) < 2:
            raise ValueError(f"lengths are at least 2 tokens, got {min(self.lengths)}")
        if self.stride is not None:
            whole("stride", self.stride, 1, "tokens")
            if self.stride > min(self.lengths):
                raise ValueError(
                    f"a stride of {self.stride} tokens leaves some between windows of {min(self.lengths)} unscored: "
                    "give the shortest length or less"
                )

    @property
    def feed(self) -> int | None:
        return self.chunk

    def samples(self, setting: Setting) -> list[Sample]:
        texts = data.texts(self.text, setting.data)
        ids = {
            name: setting.tokenizer(t, add_special_tokens=False, verbose=False).input_ids for name, t in texts.items()
        }
        made: list[Sample] = []
        for length in self.lengths:
            cells = [
                self._window(setting, name, tokens, length, number)
                for number in range(self.windows)
                for name, tokens in ids.items()
                if number * (self.stride or length) + length < len(tokens)
            ]
            if not cells:
                raise ValueError(f"no text of {self.text} has more than {length} tokens: choose a shorter length")
            made += setting.limited(cells)
        return made

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return math.exp(sum(row["score"] * row["scored"] for row in rows) / sum(row["scored"] for row in rows))

    def _window(self, setting: Setting, name: str, tokens: Sequence[int], length: int, number: int) -> Sample:
        stride = self.stride or length
        start = number * stride
        part = tokens[start : start + length + 1]  # the last one is only predicted
        fed = array("i", [*setting.opening, *part[len(setting.opening) :]])
        count = length - 1 if number == 0 else min(stride, length - 1)
        beyond = setting.window is not None and length > setting.window
        stream = f"{length:,} tokens by {self.chunk}"
        meta = {
            "stream": stream + (f", beyond the model's {setting.window:,}" if beyond else ""),
            "length": length,
            "chunk": self.chunk,
            "beyond": beyond,
            "text": name,
            "start": start,
            "utf8_bytes": len(setting.tokenizer.decode(part[-count:]).encode("utf-8")),
        }
        scored = tuple(range(length + 1 - count, length + 1))
        return Sample(f"{length}/{name}/{number}", fed, 1, meta=meta, scored=scored)
