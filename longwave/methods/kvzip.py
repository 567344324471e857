"""kvzip: the tokens that the model attends to while it repeats its context.

Source: KVzip, arXiv 2505.23416: after a prompt was read the model is made to say it again, chunk by chunk, and a pair
of key and value is worth the most attention that it gets (frame/again.py). No question has a part in it, so the cache
serves all that come later; reading takes twice as long, and all of the prompt is held until it was repeated. All heads
of all layers compete for one budget, as there; `uniform`, of its authors' code, gives each head the same. There nothing
goes once answers are written; here the budget holds: between two prompts a layer keeps what it was given, and of what
is written its even share. That was never repeated: it is worth nothing, and goes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch

from longwave.checks import whole
from longwave.frame import MemoryLayer, Needs
from longwave.frame.observe import Repeat
from longwave.methods.base import CacheShape
from longwave.methods.evicting import Evicting, EvictingBound, Held
from longwave.methods.ragged import Judged, RaggedBound, RaggedLayer, best_of_all
from longwave.plan.profile import Profile
from longwave.store.state import State, demand
from longwave.store.tokens import BLOCK


@dataclass(frozen=True)
class KVzip(Evicting):
    """Tokens that the model attends to while it repeats its context, of all heads and layers together (KVzip).

    tokens: how many a head keeps in the mean of all. chunk: tokens that are repeated at a time. lead: tokens before a
    chunk that it is continued from. ask: token ids of a request that comes first, such as those of "\\n\\nRepeat the
    previous context:". uniform: every head keeps as many.
    """

    name: ClassVar[str] = "kvzip"
    every: ClassVar[int] = 64

    chunk: int = 2048
    lead: int = 8
    ask: tuple[int, ...] = ()
    uniform: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("chunk", self.chunk, 1, "tokens")
        whole("lead", self.lead, 0, "tokens")
        if not isinstance(self.ask, (tuple, list)):
            raise ValueError(f"ask is a tuple of token ids, such as tokenizer(text).input_ids; got {self.ask!r}")
        object.__setattr__(self, "ask", tuple(whole("a token of ask", token, 0) for token in self.ask))
        if not isinstance(self.uniform, bool):
            raise ValueError(f"uniform is True or False, got {self.uniform!r}")
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
    def bound(self) -> type[EvictingBound]:
        return UniformBound if self.uniform else SharedBound

    def score(self, held: Held) -> torch.Tensor:
        return held.columns[self.repeat.column]

    def share_out(self, heads: list[Judged], keep: torch.Tensor) -> list[torch.Tensor]:
        """Which of the free tokens stay in each head: bool [batch, n] each, keep[b] of them in all."""
        return best_of_all([head.score for head in heads], heads, keep)


class UniformBound(EvictingBound):
    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        """Before it was read again nothing of a prompt is gone."""
        layers = len(self.shape.memory_layers) * self._bytes(tokens)
        return batch * (layers + self.shape.sliding_bytes(tokens))


class SharedBound(RaggedBound):
    """shares and kept are those of all heads in the mean: one layer's bytes hang on the text, all layers' do not."""

    def layer(self, index: int) -> MemoryLayer:
        return SharedLayer(index, self)

    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        """Of a prompt nothing is gone before it was read again; beside what is kept it takes blocks of its own."""
        ends = 0 if self.whole else 4 * self.shape.kv_heads
        each = self._bytes(tokens if self.whole else tokens + BLOCK) + ends
        return batch * (len(self.shape.memory_layers) * each + self.shape.sliding_bytes(tokens))


class SharedLayer(RaggedLayer):
    """`more[b]` tokens of row b, negative ones too, are what this layer's heads got beyond an even share when layers
    last shared: those of all layers are 0 together."""

    def _clear(self) -> None:
        super()._clear()
        self.more: list[int] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.more = [0] * self.batch_size

    def even(self, row: int, undecided: int = 0) -> int:
        """Tokens that a row's heads might hold together if all layers held as many."""
        return super().room(row, undecided)

    def room(self, row: int, undecided: int = 0) -> int:
        return self.even(row, undecided) + self.more[row]

    def _most(self, row: int, seen: int) -> int:
        return max(0, super()._most(row, seen) + self.more[row])

    def conclude(self) -> None:
        """The last layer shares out what all may keep; then each settles for itself."""
        waiting = self.progress.concluding
        waiting.append(self)
        if self.index != self.progress.last_memory:
            return
        self.progress.concluding = []
        if not self.bound.whole:
            share(waiting)
        for layer in waiting:
            layer.settle()

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self.more = [self.more[row] for row in rows.tolist()]

    def state(self) -> State:
        made = super().state()
        return made and made | {"more": list(self.more)}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        if state:
            self.more = list(state["more"])
            demand(len(self.more) == self.batch_size, "rows differ in number")


def share(layers: list[SharedLayer]) -> None:
    """Give each layer's rows that brought more than one token room for as many as are among the best of all layers."""
    first, method = layers[0], cast(KVzip, layers[0].bound.method)
    undecided, many = first.undecided(), len(layers)
    ends = [min(n, method.window + undecided) for n in first.dense.lengths]
    even = [first.even(row, undecided) for row in range(first.batch_size)]
    totals = [min(many * own, sum(layer.total(row) for layer in layers)) for row, own in enumerate(even)]
    judged = [layer.judge(ends) for layer in layers]
    every = [head.on(judged[0][0].free.device) for heads in judged for head in heads]
    chosen = iter(method.share_out(every, first.sharing(every, totals, ends)))
    for layer, heads in zip(layers, judged, strict=True):
        stay = torch.stack([next(chosen).sum(-1).cpu() + head.always.sum(-1).cpu() for head in heads]).sum(0)
        for row, count in enumerate(stay.tolist()):
            if first._arrived[row] > 1:
                layer.more[row] = count + len(heads) * ends[row] - even[row]
