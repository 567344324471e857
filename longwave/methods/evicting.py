"""Methods that keep some tokens of the middle and drop the others, head by head.

A method says how much each token is worth (`score`); the base protects sinks and window, keeps the budget of every
layer and head at every step, and gathers, so that memory is freed. With `store` what is kept goes into pages of another
method: eviction and quantisation multiply.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from longwave.checks import whole
from longwave.frame import MemoryLayer, Needs, Pass, Step
from longwave.methods.base import Bound, CacheShape, Method
from longwave.methods.evicting_pages import PagedBound
from longwave.methods.held import Held, evictable, held_by, survivors
from longwave.methods.segmented import Segmented
from longwave.plan.profile import Profile
from longwave.store.state import State, demand
from longwave.store.tokens import capacity

DEFAULT_BUDGET = 0.25


@dataclass(frozen=True)
class Evicting(Method):
    """Options that all evicting methods share.

    tokens: how many a head keeps, sinks and window included, whatever the length; instead of a budget, which lets the
        number grow with the context. sinks, window: first and last tokens, never evicted.
    positions: "true" leaves keys rotated where they were; "slots" rotates them, and the query, by their place in the
        cache, so that it outlives the trained length.
    store: a method of pages, by name or with options, that what is kept of the middle goes into; store_budget: its own
        budget, where it takes one.
    """

    every: ClassVar[int] = 1  # steps between two evictions: up to one less are held beside the budget
    observes: ClassVar[Needs] = Needs()

    tokens: int | None = None
    sinks: int = 4
    window: int = 64
    positions: str = "true"
    store: Segmented | str | None = None
    store_budget: float | None = None

    def __post_init__(self) -> None:
        whole("sinks", self.sinks, 0, "tokens")
        whole("window", self.window, 1, "tokens")
        if self.tokens is not None:
            whole("tokens", self.tokens, self.sinks + self.window + 1, "tokens (sinks + window + 1)")
        if self.positions not in ("true", "slots"):
            raise ValueError(f'positions are "true" or "slots", got {self.positions!r}')
        if self.positions == "slots" and self.needs().queries:
            raise ValueError(
                f'{self.name} asks with queries that it remembers, which slots would turn: positions="true"'
            )
        if isinstance(self.store, str):
            from longwave.methods import get_method

            object.__setattr__(self, "store", get_method(self.store))
        if self.store is None and self.store_budget is not None:
            raise ValueError("store_budget is the budget of the store, and there is none: give store, or only a budget")
        if self.store is not None:
            if not isinstance(self.store, Segmented) or not self.store.dense_tokens[2]:
                raise ValueError(f'store is a method of pages such as "kivi" or "fourier", got {self.store!r}')
            for option in fields(self.store):
                if option.name in ("sinks", "window") and getattr(self.store, option.name) != option.default:
                    raise ValueError(
                        f"{option.name} is {self.name}'s to say, and the store's decides nothing: leave it out there"
                    )
            object.__setattr__(self, "uses_profile", self.store.uses_profile)  # of this instance
            if self.positions == "slots" or self.tokens is not None:
                raise ValueError(
                    "pages are never opened again: with store, give a budget instead of tokens, and true positions"
                )

    @abstractmethod
    def score(self, held: Held) -> torch.Tensor:
        """What each token is worth: float [batch, kv_heads, n]; those of least worth go. No host reads if `every` is 1,
        since captured steps ask too."""

    def fits_budget(self) -> bool:
        return self.tokens is None

    def measured_by(self) -> Any:
        return None if self.store is None else self.store.measured_by()  # type: ignore[union-attr]

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        if self.store is not None:  # everything in pages was too much already
            raise ValueError(
                f"{self.name} over pages cannot be fitted to a size: the less of the middle survives, the more of it "
                "waits for its page. Give the budget as a fraction"
            )
        return 0.0

    def needs(self) -> Needs:
        return self.observes | Needs(positions=True, unrotated=self.positions == "slots")

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> Bound:
        if self.tokens is not None and budget is not None:
            raise ValueError("give a budget or tokens, not both: each of them decides how many tokens are kept")
        fraction = DEFAULT_BUDGET if budget is None and self.tokens is None else budget
        if self.store is not None:
            assert isinstance(self.store, Segmented)
            store = replace(self.store, sinks=self.sinks, window=self.window)  # type: ignore[call-arg]
            inner = store.bind(shape, profile, self.store_budget)
            return PagedBound(self, shape, budget, inner.profile, inner=inner, fraction=fraction)
        columns = sum(dtype.itemsize for dtype in self.needs().columns().values())
        each = 2 * shape.head_dim * shape.dtype.itemsize
        share = 1.0 if fraction is None or fraction >= 1 else fraction * each / (each + columns)
        return EvictingBound(self, shape, budget, share=share)


@dataclass(frozen=True, eq=False)
class EvictingBound(Bound):
    """share: of the middle's tokens, what is kept."""

    method: Evicting
    share: float = 1.0

    def decisions(self) -> Iterator[bytes]:
        yield repr(self.share).encode()

    @property
    def whole(self) -> bool:
        """Whether nothing is ever evicted: then nothing needs to be observed."""
        return self.share >= 1 and self.method.tokens is None and self.method.positions == "true"

    @property
    def needs(self) -> Needs:
        return Needs() if self.whole else self.method.needs()

    def __str__(self) -> str:
        m = self.method
        kept = f"{m.tokens} tokens" if m.tokens is not None else f"{self.share:.3f} of the middle"
        slots = ", slots" if m.positions == "slots" else ""
        return f"{m.name}({kept}, sinks={m.sinks}, window={m.window}{slots})"

    def limit(self, seen: int) -> int:
        """Tokens that a head keeps of `seen`."""
        if self.method.tokens is not None:
            return min(seen, self.method.tokens)
        free = max(0, seen - self.method.sinks - self.method.window)
        return seen - free + math.floor(self.share * free)

    def limit_step(self, seen: torch.Tensor) -> torch.Tensor:
        """The same of int64 tensors, on their device."""
        if self.method.tokens is not None:
            return seen.clamp(max=self.method.tokens)
        free = (seen - self.method.sinks - self.method.window).clamp(min=0)
        return seen - free + torch.floor(free.double() * self.share).long()

    def most(self, seen: int) -> int:
        """Tokens that a head holds at most on the way to `seen`."""
        return min(seen, self.limit(seen) + self.method.every - 1)

    def layer(self, index: int) -> MemoryLayer:
        return EvictingLayer(index, self)

    def layer_bytes(self, index: int, tokens: int) -> int:
        return self._bytes(self.limit(tokens))

    def _bytes(self, held: int) -> int:
        shape, needs = self.shape, self.needs
        columns = shape.kv_heads * sum(dtype.itemsize for dtype in needs.columns().values())
        beside = needs.nbytes(shape.query_heads, shape.head_dim, shape.dtype.itemsize)
        return capacity(held) * (shape.token_bytes + columns) + beside

    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        memory = len(self.shape.memory_layers) * self._bytes(self.most(tokens))
        return batch * (memory + self.shape.sliding_bytes(tokens))


class EvictingLayer(MemoryLayer):
    """Dense tokens, a set a head; `rows` are seen, `dense.lengths` held."""

    def __init__(self, index: int, bound: EvictingBound):
        super().__init__(index, bound.needs)
        self.bound = bound
        self.slots = bound.method.positions == "slots"

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.bound.whole or (self.record_past and self.patience() > 0)

    def _clear(self) -> None:
        super()._clear()
        self._arrived: list[int] = []  # real tokens of each row that came with the last write
        self._evicted: list[int] = []  # tokens that each row had seen when it last evicted: `crop` reaches no further

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._arrived, self._evicted = [0] * self.batch_size, [0] * self.batch_size

    def state(self) -> State:
        made = super().state()
        return made and {**made, "arrived": list(self._arrived), "evicted": list(self._evicted)}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        if state:
            self._arrived, self._evicted = list(state["arrived"]), list(state["evicted"])
            demand(len(self._arrived) == len(self._evicted) == self.batch_size, "rows differ in number")

    def patience(self) -> int:
        return self.bound.method.window if self.max_tokens is None else 0

    def due(self, row: int, undecided: int = 0) -> bool:
        """Whether a row holds more than it may: a token too many after a prompt or chunk, `every` of them after
        steps."""
        over = self.dense.lengths[row] - self._allowed(row, undecided)
        return over >= (self.bound.method.every if self._arrived[row] <= 1 else 1)

    def _allowed(self, row: int, undecided: int) -> int:
        """Tokens that a row may hold where its last ones may still be taken back."""
        undecided = min(undecided, self.rows[row])
        return self.bound.limit(self.rows[row] - undecided) + undecided

    def settle(self) -> None:
        # of a pass too long to wait for `crop` its last tokens do
        undecided = self.patience() if self.record_past and not self._unsettled else 0
        self._unsettled |= undecided > 0
        due = [self.due(row, undecided) for row in range(self.batch_size)]
        if not any(due):
            self.dense.fit()
            return
        lengths = [
            self._allowed(row, undecided) if over else held
            for row, (held, over) in enumerate(zip(self.dense.lengths, due, strict=True))
        ]
        held = held_by(self)
        kept = survivors(self.bound.method, held, torch.tensor(lengths, device=held.k.device))
        self.dense.keep(kept, lengths)
        self._evicted = [
            max(0, seen - undecided) if over else was
            for seen, was, over in zip(self.rows, self._evicted, due, strict=True)
        ]

    def _store(self, k: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        before = list(self.rows)
        super()._store(k, *args, **kwargs)
        self._arrived = [seen - was for seen, was in zip(self.rows, before, strict=True)]

    # slots: keys lie un-rotated, and every pass turns them to their places

    def arrive(self, p: Pass) -> None:
        if not self.slots:
            return
        before = torch.tensor(self.dense.lengths, device=p.q.device)[:, None]
        count = (
            torch.arange(p.q.shape[2], device=p.q.device) if p.valid is None else (p.valid.cumsum(-1) - 1).clamp(min=0)
        )
        self._turn(p, before + count)

    def _turn(self, p: Pass, slot: torch.Tensor) -> None:
        p.k = p.rotary.unrotate(p.module, p.k, p.known_positions())
        p.q = p.rotary.shift(p.module, p.q, p.known_positions(), slot.expand(p.q.shape[0], -1))

    @contextmanager
    def _turned(self, p: Pass) -> Iterator[None]:
        """In here the stored keys are rotated to their slots."""
        stored = self.dense.k
        if not self.slots or stored is None:
            yield
            return
        where = torch.arange(stored.shape[2], device=stored.device).expand(stored.shape[0], -1)
        self.dense.k = p.rotary.rotate(p.module, stored, where)
        try:
            yield
        finally:
            self.dense.k = stored

    def attend(self, p: Pass) -> torch.Tensor:
        with self._turned(p):
            return super().attend(p)

    def lse(self, p: Pass) -> torch.Tensor:
        with self._turned(p):
            return super().lse(p)

    def observe(self, p: Pass) -> None:
        with self._turned(p):
            super().observe(p)

    def can_drop(self, counts: list[int]) -> None:
        for row, count in enumerate(counts):
            if count and self.rows[row] - count < self._evicted[row]:
                raise ValueError(
                    f"cannot remove the last {count} tokens: row {row} evicted others when it had seen "
                    f"{self._evicted[row]} tokens. Keep a copy.deepcopy of the cache to go back to"
                )

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        order = rows.tolist()
        self._arrived, self._evicted = ([x[row] for row in order] for x in (self._arrived, self._evicted))

    # steps

    def unsteady(self) -> str | None:
        return None

    def reserve(self, new: int) -> None:
        most = max(
            min(held + new, self.bound.most(seen + new))
            for held, seen in zip(self.dense.lengths, self.rows, strict=True)
        )
        self.dense.reserve(max(most, self.dense.longest) + 1)

    def ripe(self) -> bool:
        return self.bound.method.every > 1 and any(self.due(row) for row in range(self.batch_size))

    def arrive_step(self, p: Pass, step: Step) -> None:
        if self.slots:
            self._turn(p, step.at[:, None])

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        with self._turned(p):
            return super().attend_step(p, step)

    def observe_step(self, p: Pass, step: Step) -> None:
        with self._turned(p):
            super().observe_step(p, step)

    def settle_step(self, step: Step) -> None:
        if self.bound.method.every > 1 or self.bound.whole:
            return
        method, held = self.bound.method, held_by(self, step.at + 1)
        over = (held.lengths > self.bound.limit_step(step.total + 1)) & step.live
        free = evictable(method, held, held.lengths)
        score = method.score(held).masked_fill(~free, float("inf"))
        worst = score.shape[-1] - 1 - score.flip(-1).argmin(-1)  # the later one of equals, as `best` has it
        self.dense.drop_step(worst, over)
        step.at.sub_(over.to(step.at.dtype))
        step.seen.sub_(over[:, None].to(step.seen.dtype))

    def count_steps(self, new: int) -> None:
        self._arrived = [1] * self.batch_size
        for i in range(1, new + 1):
            super().count_steps(1)
            if self.bound.method.every > 1:
                continue
            for row, (held, seen) in enumerate(zip(self.dense.lengths, self.rows, strict=True)):
                if held > self.bound.limit(seen + i):
                    self.dense.lengths[row] = held - 1
                    self._evicted[row] = seen + i
