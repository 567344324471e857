"""Methods that keep some tokens of the middle and drop the others, head by head.

A method says how much each token is worth (`score`); the base protects sinks and window, keeps the budget of every
layer and head at every step, and gathers, so that memory is freed. With `store` what is kept goes into pages of another
method: eviction and quantisation multiply.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from longwave.checks import whole
from longwave.frame import MemoryLayer, Needs
from longwave.methods.base import Bound, CacheShape, Method
from longwave.methods.evicting_layer import EvictingLayer
from longwave.methods.evicting_pages import PagedBound
from longwave.methods.held import Held, top
from longwave.methods.segmented import Segmented, pages_of
from longwave.plan.profile import Profile
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
    least_window: ClassVar[int] = 1  # 0 where the newest token may go at once
    takes_turns: ClassVar[bool] = False  # whether a number a row says whose turn it is (`next_turn`)
    layers: ClassVar[type[EvictingLayer]] = EvictingLayer
    folds: ClassVar[bool] = False  # whether what goes leaves something in the values of what stays (`fold`)

    tokens: int | None = None
    sinks: int = 4
    window: int = 64
    positions: str = "true"
    store: Segmented | str | None = None
    store_budget: float | None = None

    def __post_init__(self) -> None:
        whole("sinks", self.sinks, 0, "tokens")
        whole("window", self.window, self.least_window, "tokens")
        if self.tokens is not None:
            whole("tokens", self.tokens, self.sinks + self.window + 1, "tokens (sinks + window + 1)")
        if self.positions not in ("true", "slots"):
            raise ValueError(f'positions are "true" or "slots", got {self.positions!r}')
        if self.positions == "slots" and self.needs().queries:
            raise ValueError(
                f'{self.name} asks with queries that it remembers, which slots would turn: positions="true"'
            )
        if self.store is None and self.store_budget is not None:
            raise ValueError("store_budget is the budget of the store, and there is none: give store, or only a budget")
        if self.store is not None:
            store = pages_of(self.store, self.name)
            object.__setattr__(self, "store", store)
            object.__setattr__(self, "uses_profile", store.uses_profile)  # of this instance
            if self.positions == "slots" or self.tokens is not None:
                raise ValueError(
                    "pages are never opened again: with store, give a budget instead of tokens, and true positions"
                )

    @abstractmethod
    def score(self, held: Held) -> torch.Tensor:
        """What each token is worth: float [batch, kv_heads, n]; those of least worth go. No host reads if `every` is 1,
        since captured steps ask too."""

    def choose(self, held: Held, free: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Which keep[b] of the tokens free [batch, 1, n] stay in each head of row b: bool [batch, kv_heads, n].

        Those of best `score`, the earlier one of equals. A method whose choice is more than a score overrides it for
        passes, where the host may read; steps go by the score.
        """
        return top(self.score(held).float().masked_fill(~free, float("-inf")), keep)

    def fold(self, held: Held, gone: torch.Tensor, most: int) -> torch.Tensor:
        """The values [batch, kv_heads, n, head_dim] of all that is held once what goes, bool [batch, kv_heads, n], is
        folded into what stays. most: as many go in a head; 1 in steps, where nothing may be read back and what lies
        behind a row's end is anything."""
        raise NotImplementedError

    def next_turn(self, held: Held) -> torch.Tensor:
        """`held.turn` after a token of each row has gone: int64 [batch]. A pass that takes more resets it to 0."""
        raise NotImplementedError

    def spread(self, mean: float, most: float, layers: int) -> tuple[float, ...]:
        """How much of the middle each layer keeps, at most `most`, if they keep `mean` on average: shares or tokens."""
        return (mean,) * layers

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
        layers = len(shape.memory_layers)
        if self.tokens is None:
            return self.bound(self, shape, budget, shares=self.spread(share, 1.0, layers))
        mean = self.tokens - self.sinks - self.window
        parts = self.spread(mean, math.inf, layers)
        left = mean * layers - sum(map(math.floor, parts))  # rounded up where it is least
        up = sorted(range(layers), key=lambda i: math.floor(parts[i]) - parts[i])[:left]
        kept = tuple(math.floor(part) + (i in up) for i, part in enumerate(parts))
        return self.bound(self, shape, budget, shares=(1.0,) * layers, kept=kept)

    @property
    def bound(self) -> type[EvictingBound]:
        """What it is bound as."""
        return EvictingBound


@dataclass(frozen=True, eq=False)
class EvictingBound(Bound):
    """shares: of the middle's tokens, what each memory layer keeps; or kept: how many."""

    method: Evicting
    shares: tuple[float, ...] = ()
    kept: tuple[int, ...] = ()

    def decisions(self) -> Iterator[bytes]:
        yield repr((self.shares, self.kept)).encode()

    @property
    def share(self) -> float:
        """Of the middle's tokens, what is kept in the mean of layers."""
        return sum(self.shares) / len(self.shares)

    @property
    def whole(self) -> bool:
        """Whether nothing is ever evicted: then nothing needs to be observed."""
        return min(self.shares) >= 1 and self.method.tokens is None and self.method.positions == "true"

    @property
    def needs(self) -> Needs:
        return Needs() if self.whole else self.method.needs()

    def __str__(self) -> str:
        m = self.method
        kept = f"{m.tokens} tokens" if m.tokens is not None else f"{self.share:.3f} of the middle"
        slots = ", slots" if m.positions == "slots" else ""
        return f"{m.name}({kept}, sinks={m.sinks}, window={m.window}{slots})"

    @property
    def ends(self) -> int:
        return self.method.sinks + self.method.window

    def reach(self, limit: int) -> int | None:
        return limit if self.at_once(limit) is None else None

    def at_once(self, limit: int) -> int | None:
        """In slots a position is a place among what is held and what a pass brings."""
        if self.method.positions == "true" or not self.kept:
            return None
        left = limit - max(self.most(sys.maxsize, layer) for layer in range(len(self.kept)))
        return left if left > 0 else None

    def limit(self, seen: int, layer: int = 0) -> int:
        """Tokens that a head of memory layer number `layer` keeps of `seen`."""
        if self.kept:
            return min(seen, self.ends + self.kept[layer])
        free = max(0, seen - self.ends)
        return seen - free + math.floor(self.shares[layer] * free)

    def limit_step(self, seen: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """The same of int64 tensors, on their device."""
        if self.kept:
            return seen.clamp(max=self.ends + self.kept[layer])
        free = (seen - self.ends).clamp(min=0)
        return seen - free + torch.floor(free.double() * self.shares[layer]).long()

    def most(self, seen: int, layer: int = 0) -> int:
        """Tokens that a head holds at most on the way to `seen`."""
        return min(seen, self.limit(seen, layer) + self.method.every - 1)

    def layer(self, index: int) -> MemoryLayer:
        return self.method.layers(index, self)

    def layer_bytes(self, index: int, tokens: int) -> int:
        return self._bytes(self.limit(tokens, self.shape.memory_layers.index(index)))

    def _bytes(self, held: int) -> int:
        shape, needs = self.shape, self.needs
        columns = shape.kv_heads * sum(dtype.itemsize for dtype in needs.columns().values())
        beside = needs.nbytes(shape.query_heads, shape.head_dim, shape.dtype.itemsize)
        beside += 8 if self.method.takes_turns and not self.whole else 0
        return capacity(held) * (shape.token_bytes + columns) + beside

    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        memory = sum(self._bytes(self.most(tokens, layer)) for layer in range(len(self.shape.memory_layers)))
        return batch * (memory + self.shape.sliding_bytes(tokens))
