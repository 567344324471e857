"""How far a method's next-token distributions are from the dense model's, on text after a compressed context.

Each window is read once, exactly; every method compresses it and scores the same tokens after it in one pass. Score:
mean KL(dense || method) in nats. Rows also have the loss, dense's loss, and the share of positions with the same most
likely token; `curve` has all of them by position, in means of 64 tokens.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from typing import Any, ClassVar

from longwave.checks import whole
from longwave.evals import data
from longwave.evals.task import LossTask, Sample, Setting, listed


@dataclass(frozen=True)
class Divergence(LossTask):
    """KL from the dense model, loss over dense and top-1 agreement after a compressed context."""

    name: ClassVar[str] = "divergence"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "context"
    unit: ClassVar[str] = "KL from dense, nats"
    compares: ClassVar[bool] = True
    metric: ClassVar[str] = "kl"

    contexts: Any = (3000, 7000)  # tokens read and compressed
    scored: int = 256
    windows: int = 24  # of every context, texts taken in turn
    text: str = "mixed"
    step: int | None = None  # tokens fed at a time, all in one pass unless given: 1 for methods that choose by step

    def __post_init__(self) -> None:
        object.__setattr__(self, "contexts", listed(self.contexts, int, "contexts"))
        for name in ("scored", "windows"):
            whole(name, getattr(self, name), 1)
        if self.step is not None:
            whole("step", self.step, 1, "tokens")
        if min(self.contexts) < 1:
            raise ValueError(f"contexts are at least 1 token, got {min(self.contexts)}")

    @property
    def feed(self) -> int | None:
        return self.step

    def samples(self, setting: Setting) -> list[Sample]:
        texts = data.texts(self.text, setting.data)
        ids = {
            name: setting.tokenizer(t, add_special_tokens=False, verbose=False).input_ids for name, t in texts.items()
        }
        opening = setting.opening
        made: list[Sample] = []
        for context in self.contexts:
            need = context + self.scored
            setting.check_fits(need, 0, f"divergence at {context}")
            long = {name: tokens for name, tokens in ids.items() if len(tokens) > need + 1}
            if not long:
                raise ValueError(f"no text of {self.text} has {need + 2} tokens: choose a shorter context")
            draw = random.Random(setting.seed)
            cells = []
            for number in range(self.windows):
                name = list(long)[number % len(long)]
                start = draw.randrange(len(long[name]) - need)
                part = long[name][start : start + need + 1]
                meta = {"context": context, "text": name, "start": start}
                fed = array("i", [*opening, *part[len(opening) :]])
                cells.append(Sample(f"{context}/{number}", fed, context, meta=meta))
            made += setting.limited(cells)
        return made
