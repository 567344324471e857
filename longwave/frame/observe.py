"""What a memory layer may know of a forward pass, and what it remembers of earlier ones.

A method says what it `Needs`; the frame provides just that, in ordinary passes, chunks, steps and forked caches alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from longwave.store.state import State, demand


@dataclass(frozen=True, order=True)
class Repeat:
    """How a model repeats what it has just read (again.py).

    chunk: tokens that are repeated at a time. lead: as many of those before a chunk come before it again, so that the
    model knows where to go on. sinks: first tokens that share attention with every chunk. ask: token ids of a request
    that comes before all of this.
    """

    chunk: int
    lead: int
    sinks: int
    ask: tuple[int, ...] = ()

    @property
    def column(self) -> str:
        """Name of the column that it fills."""
        return "_".join(map(str, ("again", self.chunk, self.lead, self.sinks, *self.ask)))


@dataclass(frozen=True)
class Needs:
    """What a method asks of the frame.

    queries: of the last so many tokens of each row, rotated, as they met the keys. every: of those tokens alone whose
    number in the row, from 1 on, is a multiple of it. mass: the attention that each stored token got so far, a column
    of the token store. votes: what it got from the last so many queries of the latest pass that brought its row tokens,
    a column for each number named. positions: of each stored token, a column too. unrotated: a model whose rotation can
    be undone (`Pass.rotary`). hidden: the input of the attention module, in `Pass.hidden`. shifts: `Queries.later`,
    which turns queries where the model's rotation can be undone. surprise: how little each token was expected, a column
    that is known once a pass is through all layers, so that they settle then (surprise.py); of so many last tokens a
    cache's first memory layer remembers what went into the head: one, and those that `crop` may take back. again: the
    most attention that each token gets while the model repeats it, a column for every way to; until then nothing
    settles. Tokens that come one at a time have 0. bias: a column for what attention adds to a token's scores, 0 as it
    comes. ids: which token it is, a column (ids.py). look: passes of two tokens to so many are read twice where a layer
    `looks`: what its layers see the first time they may know the second time (look.py).
    """

    queries: int = 0
    every: int = 1
    mass: bool = False
    positions: bool = False
    unrotated: bool = False
    hidden: bool = False
    votes: tuple[int, ...] = ()
    shifts: bool = False
    surprise: int = 0
    again: tuple[Repeat, ...] = ()
    bias: bool = False
    ids: bool = False
    look: int = 0

    def __or__(self, other: Needs) -> Needs:
        asked = [needs for needs in (self, other) if needs.queries]
        every = math.gcd(*(needs.every for needs in asked)) or 1
        # the newest multiple of the larger step may lie back by a part of it
        spans = (needs.queries * needs.every + (needs.every - every) for needs in asked)
        return Needs(
            max((span // every for span in spans), default=0),
            every,
            self.mass or other.mass,
            self.positions or other.positions,
            self.unrotated or other.unrotated,
            self.hidden or other.hidden,
            tuple(sorted({*self.votes, *other.votes})),
            self.shifts or other.shifts,
            max(self.surprise, other.surprise),
            tuple(sorted({*self.again, *other.again})),
            self.bias or other.bias,
            self.ids or other.ids,
            max(self.look, other.look),
        )

    def columns(self) -> dict[str, torch.dtype]:
        """The side columns that a token store keeps for this."""
        told = [*(["mass"] if self.mass else []), *map(votes_of, self.votes), *(["surprise"] if self.surprise else [])]
        told += [repeat.column for repeat in self.again] + (["bias"] if self.bias else [])
        whole = [*(["position"] if self.positions else []), *(["token"] if self.ids else [])]
        return dict.fromkeys(whole, torch.int32) | dict.fromkeys(told, torch.float32)

    @property
    def in_passing(self) -> bool:
        """Whether something is asked for that is seen while a text is read, and held nowhere afterwards but as columns
        of its tokens."""
        return self.watches or self.hidden or bool(self.again) or self.surprise > 0

    @property
    def watches(self) -> bool:
        """Whether something of the attention over all tokens is asked for, by token."""
        return self.mass or bool(self.votes)

    def nbytes(self, query_heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes a row beside its tokens: the remembered queries and their positions."""
        return self.queries * (query_heads * head_dim * itemsize + 8)


def votes_of(queries: int) -> str:
    """Name of the column that Needs(votes=(queries,)) asks for."""
    return f"votes{queries}"


PROBES = 16
LATER = 2048  # tokens, how far queries are turned at most
GOLDEN = (5**0.5 - 1) / 2  # multiples of it modulo 1 are spread evenly, wherever they start


def probing(window: int) -> Needs:
    """What merging asks for (ops/merge.py): queries spread evenly over the window, and asked again later."""
    return Needs(queries=min(PROBES, window), every=max(1, window // PROBES), shifts=True)


@dataclass
class Pass:
    """One forward pass, as one layer sees it.

    q [batch, query_heads, tokens, head_dim], k and v [batch, kv_heads, tokens, head_dim]: the new tokens, rotated.
    valid bool [batch, tokens]: which of them are real; None for all. mask: a caller's own 4D mask (bool or additive).
    positions int [batch or 1, tokens] as the model has them, None where it does not say. module: the attention module
    (its layer's rotary table, its output projection). rotary: turns and un-turns keys (rotary/), where asked for.
    phase: "prompt" (nothing is stored yet), "step" (one token a row) or "chunk". sinks [query_heads]: learned scores
    of a token that has no value and takes its share of attention. lse float [batch, query_heads, tokens]: log of what
    the softmax divides by, where it is known.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scaling: float
    causal: bool = True
    valid: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    module: Any = None
    rotary: Any = None
    hidden: torch.Tensor | None = None
    phase: str = "chunk"
    sinks: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    def unrotated(self) -> torch.Tensor:
        """The new keys before rotation: as k. Needs(unrotated=True)."""
        return self.rotary.unrotate(self.module, self.k, self.known_positions())

    def known_positions(self) -> torch.Tensor:
        """positions [batch, tokens]; ValueError where the model does not say them."""
        if self.positions is None:
            raise ValueError(
                f"{type(self.module).__name__} does not hand position_ids to the attention function, and this method "
                "needs them"
            )
        return self.positions.expand(self.q.shape[0], -1)


@dataclass(frozen=True, eq=False)
class Step:
    """Where a step's token goes and what it sees, as the device counts: tensors that stay where they are.

    rows int64 [batch]: 0, 1, 2 ... at int64 [batch]: the dense column that the new token of each row takes. seen int32
    [batch, 1]: dense tokens once it is there. counts int32 [batch]: pages. total int64 [batch]: real tokens of the row
    before it. positions int64 [batch, 1]: the model's own. live bool [batch]: whether the row's step counts; where not,
    nothing is evicted. A layer that evicts in a step takes off `at` and `seen`, which all advance by one behind it.
    """

    rows: torch.Tensor
    at: torch.Tensor
    seen: torch.Tensor
    counts: torch.Tensor
    total: torch.Tensor
    positions: torch.Tensor
    live: torch.Tensor


class Queries:
    """The queries of the last tokens of each row, or of every so many of them: the newest at the right end.

    q [batch, query_heads, width, head_dim]; positions int64 [batch, width]; row b has seen seen[b] tokens and remembers
    its last counts[b] whose number, from 1 on, is a multiple of `every`.
    """

    def __init__(self, width: int, batch: int, every: int = 1):
        self.width, self.every = width, every
        self.seen, self.counts = [0] * batch, [0] * batch
        self.q: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.q, self.positions) if x is not None]

    def of_heads(self, heads: slice) -> Queries:
        """Those of some query heads, not copied."""
        made = Queries(self.width, len(self.seen), self.every)
        made.seen, made.counts, made.positions = self.seen, self.counts, self.positions
        made.q = None if self.q is None else self.q[:, heads]
        return made

    def numbers(self) -> torch.Tensor:
        """int64 [batch, width]: each one's number in its row, from 1 on; 0 or less where nothing is remembered."""
        newest = torch.tensor([seen // self.every * self.every for seen in self.seen])
        numbers = newest[:, None] - self.every * torch.arange(self.width - 1, -1, -1)
        known = torch.arange(self.width) >= self.width - torch.tensor(self.counts)[:, None]
        return numbers.where(known, torch.zeros_like(numbers))

    def later(self, rotary: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries of layer `index` as models of later ones: q [batch, query_heads, width, head_dim], and int64
        [batch, width], on the host, how many tokens of its row each one sees, 0 or less where nothing is remembered.

        A query close by is no model of a later one: each is turned by up to `LATER` tokens, by its number in the row,
        so that the order of calls cannot matter, and sees all that its row has seen. Without a `rotary` (rotary/)
        they stay as they are. Nothing waits for the device.
        """
        assert self.q is not None
        assert self.positions is not None
        number = self.numbers()
        if rotary is None:
            return self.q, number
        module = rotary.module_of(index)
        by = ((number.double() * GOLDEN).frac() * LATER).long().clamp(min=0)
        later = self.positions + by.to(self.positions.device, non_blocking=True)
        seen = torch.tensor(self.seen)[:, None].expand_as(number)
        return rotary.shift(module, self.q, self.positions, later), seen.where(number > 0, torch.zeros_like(number))

    def _room(self, q: torch.Tensor) -> None:
        if self.q is None:
            self.q = q.new_zeros(q.shape[0], q.shape[1], self.width, q.shape[3])
            self.positions = torch.zeros(q.shape[0], self.width, dtype=torch.long, device=q.device)

    def _count(self, new: list[int]) -> None:
        """Rows have seen `new` more tokens."""
        for row, more in enumerate(new):
            kept = (self.seen[row] + more) // self.every - self.seen[row] // self.every
            self.counts[row] = min(self.width, self.counts[row] + kept)
            self.seen[row] += more

    def add(self, q: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Remember q [batch, query_heads, tokens, head_dim] of a pass, padding left out; positions [batch, tokens]."""
        self._room(q)
        assert self.q is not None
        assert self.positions is not None
        tokens = q.shape[2]
        first = [self.every - 1 - seen % self.every for seen in self.seen]
        parts: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
        if valid is None and len(set(first)) == 1:
            kept = (tokens - first[0] - 1) // self.every + 1
            own = slice(first[0] + max(0, kept - self.width) * self.every, None, self.every)
            parts.append((slice(None), q[:, :, own], positions[:, own]))
        else:
            for b in range(q.shape[0]):
                real = torch.arange(tokens, device=q.device) if valid is None else valid[b].nonzero()[:, 0]
                some = real[first[b] :: self.every][-self.width :]
                parts.append((slice(b, b + 1), q[b : b + 1, :, some], positions[b : b + 1, some]))
        self._count([tokens] * q.shape[0] if valid is None else valid.sum(-1).tolist())
        if not any(some.shape[2] for _, some, _ in parts):
            return
        fresh, where = self.q.clone(), self.positions.clone()  # new storage: made under inference_mode it is read-only
        for rows, fresh_q, at in parts:
            new = fresh_q.shape[2]
            if new:
                keep = self.width - new
                fresh[rows, :, :keep], where[rows, :keep] = self.q[rows, :, new:], self.positions[rows, new:]
                fresh[rows, :, keep:], where[rows, keep:] = fresh_q, at
        self.q, self.positions = fresh, where

    def reserve(self) -> None:
        """Tensors that `add_step` may write to: what was made under inference_mode is read-only outside."""
        if self.q is not None and self.positions is not None:
            self.q, self.positions = self.q.clone(), self.positions.clone()

    def add_step(self, q: torch.Tensor, positions: torch.Tensor, total: torch.Tensor) -> None:
        """`add` of one real token a row, in place: device work alone. total int64 [batch]: tokens of each row before
        it. `counts` is brought up by `count_steps`."""
        assert self.q is not None
        assert self.positions is not None
        kept = ((total + 1) % self.every == 0)[:, None, None, None]
        for held, new in ((self.q, q), (self.positions[:, None, :, None], positions[:, None, :, None])):
            shifted = torch.cat([held[:, :, 1:], new.to(held.dtype)], 2)
            held.copy_(shifted if self.every == 1 else torch.where(kept, shifted, held))

    def count_steps(self, new: int) -> None:
        self._count([new] * len(self.seen))

    def drop_last(self, counts: list[int]) -> None:
        """Forget those of the last counts[b] tokens of row b."""
        for row, count in enumerate(counts):
            by = self.seen[row] // self.every - (self.seen[row] - count) // self.every
            self.counts[row] = max(0, self.counts[row] - by)
            self.seen[row] -= count
            if by and self.q is not None and self.positions is not None:
                by = min(by, self.width)
                self.q, self.positions = self.q.clone(), self.positions.clone()
                self.q[row], self.positions[row] = self.q[row].roll(by, 1), self.positions[row].roll(by, 0)

    def select(self, rows: torch.Tensor) -> None:
        self.seen = [self.seen[row] for row in rows.tolist()]
        self.counts = [self.counts[row] for row in rows.tolist()]
        if self.q is not None and self.positions is not None:
            index = rows.to(self.q.device)
            self.q, self.positions = self.q.index_select(0, index), self.positions.index_select(0, index)

    def state(self) -> State:
        """Everything remembered, not copied."""
        tensors = {} if self.q is None else {"q": self.q, "positions": self.positions}
        return {
            "width": self.width,
            "every": self.every,
            "seen": list(self.seen),
            "counts": list(self.counts),
            **tensors,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Queries:
        """What `state` was given of. ValueError where it does not fit together."""
        seen, counts = list(state["seen"]), list(state["counts"])
        made = cls(state["width"], len(seen), state["every"])
        made.seen, made.counts = seen, counts
        made.q, made.positions = state.get("q"), state.get("positions")
        demand((made.q is None) == (made.positions is None), "queries come with positions")
        if made.q is not None and made.positions is not None:
            shape = [len(seen), made.width]
            fits = [made.q.shape[0], made.q.shape[2]] == shape == list(made.positions.shape)
            demand(fits and len(counts) == len(seen), f"queries are {list(made.q.shape)} for {len(seen)} rows")
        return made

    def move(self, device: torch.device | str) -> None:
        if self.q is not None and self.positions is not None:
            self.q, self.positions = self.q.to(device), self.positions.to(device)

    def covers(self, needs: Needs) -> bool:
        """Whether `last` finds here what `needs` asks for."""
        return needs.every % self.every == 0 and (needs | Needs(1, self.every)).queries <= self.width

    def last(self, width: int, every: int) -> Queries:
        """A copy that remembers fewer."""
        made = Queries(width, len(self.seen), every)
        made.seen, step = list(self.seen), every // self.every
        made.counts = [0] * len(self.seen)
        if self.q is None or self.positions is None:
            return made
        made.q = self.q.new_zeros(*self.q.shape[:2], width, self.q.shape[3])
        made.positions = self.positions.new_zeros(len(self.seen), width)
        for row, (seen, count) in enumerate(zip(self.seen, self.counts, strict=True)):
            newest = self.width - 1 - seen // self.every % step
            found = min(width, (newest - (self.width - count)) // step + 1) if newest >= self.width - count else 0
            if found:
                some = torch.arange(newest - (found - 1) * step, newest + 1, step, device=self.q.device)
                made.q[row, :, width - found :] = self.q[row, :, some]
                made.positions[row, width - found :] = self.positions[row, some]
            made.counts[row] = found
        return made
