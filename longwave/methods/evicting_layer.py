"""The layer of methods that keep some tokens of the middle: what goes, in passes and on the device, and slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from longwave.frame import MemoryLayer, Pass, Step
from longwave.methods.held import Held, evictable, held_by, rising, survivors
from longwave.store.state import State, demand


class EvictingLayer(MemoryLayer):
    """Dense tokens, a set a head; `rows` are seen, `dense.lengths` held."""

    def __init__(self, index: int, bound: Any):
        super().__init__(index, bound.needs)
        self.bound = bound
        self.position = bound.shape.memory_layers.index(index)
        self.slots = self.renumbers = bound.method.positions == "slots"

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.bound.whole or (self.record_past and self.patience() > 0)

    @property
    def _takes_turns(self) -> bool:
        return self.bound.method.takes_turns and not self.bound.whole

    def _clear(self) -> None:
        super()._clear()
        self._arrived: list[int] = []  # real tokens of each row that came with the last write
        self._evicted: list[int] = []  # tokens that each row had seen when it last evicted: `crop` reaches no further
        self.turn: torch.Tensor | None = None  # int64 [batch]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._arrived, self._evicted = [0] * self.batch_size, [0] * self.batch_size
        if self._takes_turns:
            self.turn = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)

    def state(self) -> State:
        made = super().state()
        turn = {} if self.turn is None else {"turn": self.turn}
        return made and {**made, "arrived": list(self._arrived), "evicted": list(self._evicted), **turn}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        if state:
            self._arrived, self._evicted = list(state["arrived"]), list(state["evicted"])
            demand(len(self._arrived) == len(self._evicted) == self.batch_size, "rows differ in number")
            turn = state.get("turn")
            demand((turn is not None) == self._takes_turns, "whose turn it is is kept by no other method")
            demand(turn is None or turn.shape == (self.batch_size,), "rows differ in number")
            self.turn = turn

    def patience(self) -> int:
        return self.bound.method.window if self.max_tokens is None else 0

    def due(self, row: int, undecided: int = 0) -> bool:
        """Whether a row holds more than it may: a token too many after a prompt or chunk, `every` of them after
        steps."""
        over = self.held()[row] - self._allowed(row, undecided)
        return over >= (self.bound.method.every if self._arrived[row] <= 1 else 1)

    def _allowed(self, row: int, undecided: int) -> int:
        """Tokens that a row may hold where its last ones may still be taken back."""
        undecided = min(undecided, self.rows[row])
        return self.bound.limit(self.rows[row] - undecided, self.position) + undecided

    def undecided(self) -> int:
        """Tokens at the end of the pass that settles which `crop` may still take back."""
        # of a pass too long to wait for `crop` its last tokens do
        return self.patience() if self.record_past and not self._unsettled else 0

    def survivors(self, held: Held, keep: torch.Tensor) -> torch.Tensor:
        """As held.survivors."""
        return survivors(self.bound.method, held, keep)

    def settle(self) -> None:
        undecided = self.undecided()
        self._unsettled |= undecided > 0
        due = [self.due(row, undecided) for row in range(self.batch_size)]
        if not any(due):
            self.dense.fit()
            return
        lengths = [
            self._allowed(row, undecided) if over else held
            for row, (held, over) in enumerate(zip(self.dense.lengths, due, strict=True))
        ]
        held, method = held_by(self, layer=self.position, turn=self.turn), self.bound.method
        keep = torch.tensor(lengths, device=held.k.device)
        kept = self.survivors(held, keep)
        gone = held.lengths - keep
        if method.folds:
            real = torch.arange(kept.shape[2], device=kept.device) < held.lengths[:, None]
            self.fold(held, ~kept & real[:, None], int(gone.max()))
        if self.turn is not None:
            held = replace(held, room=(keep - self.bound.ends).clamp(min=1))
            after = method.next_turn(held)
            self.turn = self.turn.where(gone == 0, after.where(gone == 1, torch.zeros_like(after)))
        self.dense.keep(rising(kept, max(lengths)), lengths)
        self._evicted = [
            max(0, seen - undecided) if over else was
            for seen, was, over in zip(self.rows, self._evicted, due, strict=True)
        ]

    def fold(self, held: Held, gone: torch.Tensor, most: int) -> None:
        """Fold what goes, bool [batch, kv_heads, n], into what stays; most: as many go in a head."""
        self.dense.set_values(self.bound.method.fold(held, gone, most))

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
        if self.turn is not None:
            self.turn = self.turn[rows.to(self.turn.device)]

    def parts(self) -> dict[str, list[torch.Tensor]]:
        parts = super().parts()
        return parts if self.turn is None else {**parts, "turns": [self.turn]}

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        if self.turn is not None:
            self.turn = self.turn.to(device)

    # steps

    def unsteady(self) -> str | None:
        if self.needs.surprise:
            return "it judges tokens by logits, behind the last layer, which a step does not hand back"
        return None

    def reserve(self, new: int) -> None:
        most = max(
            min(held + new, self.bound.most(seen + new, self.position))
            for held, seen in zip(self.dense.lengths, self.rows, strict=True)
        )
        self.dense.reserve(max(most, self.dense.longest) + 1)
        if self.turn is not None:
            self.turn = self.turn.clone()  # steps write to it

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
        method, limit = self.bound.method, self.bound.limit_step(step.total + 1, self.position)
        room = (limit - self.bound.ends).clamp(min=1)
        held = held_by(self, step.at + 1, layer=self.position, turn=self.turn, room=room)
        over = (held.lengths > limit) & step.live
        free = evictable(method, held, held.lengths)
        score = method.score(held).float().masked_fill(~free, float("inf"))
        worst = score.shape[-1] - 1 - score.flip(-1).argmin(-1)  # the later one of equals, as `top` has it
        if method.folds:
            gone = (torch.arange(score.shape[-1], device=score.device) == worst[..., None]) & over[:, None, None]
            held.v.copy_(method.fold(held, gone, 1))
        if self.turn is not None:
            self.turn.copy_(method.next_turn(held).where(over, self.turn))
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
                if held > self.bound.limit(seen + i, self.position):
                    self.dense.lengths[row] = held - 1
                    self._evicted[row] = seen + i
