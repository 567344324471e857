"""Perplexity of long text read through a compressed cache.

- "strided": windows of `length` tokens; all but the last `scored` are read in one pass and compressed, then the last
  `scored` are fed in one pass and scored. Every length scores the same tokens, only their context grows.
- "stream": token by token through the cache, as StreamingLLM does: every token but the first is scored, and the curve
  shows the loss by position. `step` feeds that many tokens at a time, which is faster and compresses as much later.

Books are not joined. The tokenizer's first token, where it wants one, opens each window. Bits per byte = loss in nats
x tokens / (ln 2 x UTF-8 bytes) compare tokenizers.
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
class Perplexity(LossTask):
    """Perplexity of a text: strided windows, or token by token through the cache."""

    name: ClassVar[str] = "perplexity"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "length"
    unit: ClassVar[str] = "perplexity"

    lengths: Any = (2048, 4096, 8192)  # tokens fed in all
    mode: str = "strided"
    scored: int = 512  # tokens (strided)
    windows: int = 4  # of every text
    step: int = 1  # tokens fed at a time (stream)
    text: str = "pg19"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", listed(self.lengths, int, "lengths"))
        if self.mode not in ("strided", "stream"):
            raise ValueError(f'mode is "strided" or "stream", got {self.mode!r}')
        for name in ("scored", "windows", "step"):
            whole(name, getattr(self, name), 1)
        if self.mode == "strided" and min(self.lengths) <= self.scored:
            raise ValueError(f"a length of {min(self.lengths)} leaves no context before {self.scored} scored tokens")
        if min(self.lengths) < 2:
            raise ValueError(f"lengths are at least 2 tokens, got {min(self.lengths)}")

    @property
    def feed(self) -> int | None:
        return self.step if self.mode == "stream" else None

    def samples(self, setting: Setting) -> list[Sample]:
        longest = max(self.lengths)
        setting.check_fits(longest, 0, f"perplexity at {longest}")
        opening = setting.opening
        scored = self.scored if self.mode == "strided" else longest
        ids = {}
        for name, text in data.texts(self.text, setting.data).items():
            tokens = setting.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if len(tokens) > longest:
                ids[name] = tokens
        if not ids:
            raise ValueError(f"no text of {self.text} has more than {longest} tokens: choose a shorter length")
        made: list[Sample] = []
        for length in self.lengths:
            cells = []
            for number in range(self.windows):
                for name, tokens in ids.items():
                    end = longest + 1 + number * scored
                    if end > len(tokens):
                        continue
                    part = tokens[end - length - 1 : end]
                    fed = array("i", [*opening, *part[len(opening) :]])
                    count = self.scored if self.mode == "strided" else length - 1
                    size = len(setting.tokenizer.decode(part[-count:]).encode("utf-8"))
                    meta = {"length": length, "text": name, "window": number, "utf8_bytes": size}
                    cells.append(Sample(f"{length}/{name}/{number}", fed, length - count, meta=meta))
            made += setting.limited(cells)
        return made

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return math.exp(sum(row["score"] * row["scored"] for row in rows) / sum(row["scored"] for row in rows))
