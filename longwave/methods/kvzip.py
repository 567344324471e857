"""kvzip: the tokens that the model attends to while it repeats its context.

Source: KVzip, arXiv 2505.23416: after a prompt was read the model is made to say it again, chunk by chunk, and a pair
of key and value is worth the most attention that it gets (frame/again.py). No question has a part in it, so the cache
serves all that come later; reading takes twice as long, and all of the prompt is held until it was repeated. There
heads and layers compete for one budget and nothing goes once answers are written; here every head keeps as many, so
that the bytes are known beforehand, and what is written was never repeated: it is worth nothing, and goes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.frame import Needs
from longwave.frame.observe import Repeat
from longwave.methods.base import CacheShape
from longwave.methods.evicting import Evicting, EvictingBound, Held
from longwave.plan.profile import Profile


@dataclass(frozen=True)
class KVzip(Evicting):
    """Tokens that the model attends to while it repeats its context (KVzip).

    chunk: tokens that are repeated at a time. lead: tokens before a chunk that it is continued from. ask: token ids
    of a request that comes first, such as those of "\\n\\nRepeat the previous context:".
    """

    name: ClassVar[str] = "kvzip"
    every: ClassVar[int] = 64

    chunk: int = 2048
    lead: int = 8
    ask: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("chunk", self.chunk, 1, "tokens")
        whole("lead", self.lead, 0, "tokens")
        if not isinstance(self.ask, (tuple, list)):
            raise ValueError(f"ask is a tuple of token ids, such as tokenizer(text).input_ids; got {self.ask!r}")
        object.__setattr__(self, "ask", tuple(whole("a token of ask", token, 0) for token in self.ask))
        if self.positions == "slots":
            raise ValueError('kvzip repeats a text where it stands, which slots would turn: positions="true"')
        if self.store is not None:
            raise ValueError("kvzip repeats a text that is held token by token, and pages are not: leave store out")

    @property
    def repeat(self) -> Repeat:
        return Repeat(self.chunk, self.lead, self.sinks, self.ask)

    def needs(self) -> Needs:
        return super().needs() | Needs(again=(self.repeat,))

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        raise ValueError(
            "kvzip holds all of a prompt until the model has repeated it, so a size that does not hold it bounds "
            'nothing: give the budget as a fraction, or use "snapkv"'
        )

    @property
    def bound(self) -> type[KVzipBound]:
        return KVzipBound

    def score(self, held: Held) -> torch.Tensor:
        return held.columns[self.repeat.column]


class KVzipBound(EvictingBound):
    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        """Before it was read again nothing of a prompt is gone."""
        layers = len(self.shape.memory_layers) * self._bytes(tokens)
        return batch * (layers + self.shape.sliding_bytes(tokens))
