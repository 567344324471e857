"""Evicting where the heads of a layer hold different numbers of tokens: what left the window lies head behind head.

A method of these shares out what is kept by `share_out`, of the scores of all heads; `best_of_all` is its plain form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from longwave.frame import MemoryLayer, Pass, Step
from longwave.methods.evicting import EvictingBound
from longwave.methods.evicting_layer import EvictingLayer
from longwave.methods.held import Held, evictable, rising, top
from longwave.ops import mass as attention_mass
from longwave.ops.attention.reference import dense_attention, ragged_step_attention, step_attention
from longwave.store.ragged import RaggedBuffer
from longwave.store.state import State, under, within


@dataclass(frozen=True, eq=False)
class RaggedBound(EvictingBound):
    """shares and kept are those of a layer's heads in the mean."""

    def layer(self, index: int) -> MemoryLayer:
        return RaggedLayer(index, self)

    def layer_bytes(self, index: int, tokens: int) -> int:
        if self.whole:
            return super().layer_bytes(index, tokens)
        open_ = min(tokens, self.method.window)
        return self._split(open_, self.limit(tokens, self.shape.memory_layers.index(index)) - open_)

    def _split(self, open_: int, behind: int) -> int:
        """Bytes of a row with so many tokens a head that are open, and in the mean so many behind them."""
        each = self.shape.token_bytes // self.shape.kv_heads + sum(
            dtype.itemsize for dtype in self.needs.columns().values()
        )
        return self._bytes(open_) + (behind * each + 4) * self.shape.kv_heads * (behind > 0)

    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        if self.whole:
            return super().peak_bytes(tokens, batch)
        window, layers = self.method.window, range(len(self.shape.memory_layers))
        open_ = min(tokens, window + self.method.every - 1)
        memory = sum(self._split(open_, max(0, self.most(tokens, layer) - window)) for layer in layers)
        return batch * (memory + self.shape.sliding_bytes(tokens))


@dataclass(frozen=True, eq=False)
class Judged:
    """The tokens of one head, of which some stay: score float32, place int64 (position in the text), free and always
    bool [batch, n]. Free ones may go; those that always stay have left the window."""

    score: torch.Tensor
    place: torch.Tensor
    free: torch.Tensor
    always: torch.Tensor

    def on(self, device: torch.device) -> Judged:
        return Judged(*(getattr(self, field.name).to(device) for field in fields(self)))


def best_of_all(scores: list[torch.Tensor], heads: list[Judged], keep: torch.Tensor) -> list[torch.Tensor]:
    """Which keep[b] of the free tokens of all heads have the best scores [batch, n] (the heads' own, or others): bool
    alike. Of equals those that stand earlier in the text, in all heads alike."""
    worth = torch.cat(
        [score.masked_fill(~head.free, float("-inf")) for score, head in zip(scores, heads, strict=True)], -1
    )
    order = torch.argsort(torch.cat([head.place for head in heads], -1), dim=-1, stable=True)
    chosen = top(worth.gather(-1, order)[:, None], keep)[:, 0]
    return list(torch.zeros_like(chosen).scatter(-1, order, chosen).split([score.shape[-1] for score in scores], -1))


class RaggedLayer(EvictingLayer):
    """`dense` holds the window and what came since tokens last left it, `far` what is kept of those before, each head
    its own number. `held` counts in the mean of heads, rounded down."""

    bound: RaggedBound

    def _clear(self) -> None:
        super()._clear()
        self.far = RaggedBuffer(0, 1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.far = RaggedBuffer(self.batch_size, key_states.shape[1], self.needs.columns())

    def held(self) -> list[int]:
        return [near + far // self.far.heads for near, far in zip(self.dense.lengths, self.far.totals, strict=True)]

    def total(self, row: int) -> int:
        """Tokens that all heads of a row hold together."""
        return self.far.heads * self.dense.lengths[row] + sum(self.far.counts[row])

    def room(self, row: int, undecided: int = 0) -> int:
        """Tokens that they may hold."""
        return self.far.heads * self._allowed(row, undecided)

    def due(self, row: int, undecided: int = 0) -> bool:
        least = self.far.heads * self.bound.method.every if self._arrived[row] <= 1 else 1
        return self.total(row) - self.room(row, undecided) >= least

    def head(self, head: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        """K, V and columns [batch, 1, n, ...] of one head, in order, zeros behind a row's end; tokens of each row."""
        near = {"k": self.dense.k, "v": self.dense.v, **self.dense.columns}
        own = slice(head, head + 1)
        if not self.far:
            return {
                name: x[:, own, : self.dense.longest] for name, x in near.items() if x is not None
            }, self.dense.lengths
        lengths = [counts[head] + n for counts, n in zip(self.far.counts, self.dense.lengths, strict=True)]
        made = {}
        for name, far in self.far.items.items():
            made[name] = far.new_zeros(self.batch_size, 1, max(lengths), *far.shape[1:])
            for row, length in enumerate(lengths):
                own_far = far[self.far.place(row, head)]
                made[name][row, 0, : len(own_far)] = own_far
                made[name][row, :, len(own_far) : length] = near[name][row, own, : length - len(own_far)]  # type: ignore[index]
        return made, lengths

    def by_heads(self, row: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        if not self.far:
            yield from super().by_heads(row)
            return
        near = [x[row, :, : self.dense.lengths[row]] for x in self.dense.view()]
        far = [self.far.items[name] for name in "kv"]
        for head in range(self.far.heads):
            own = self.far.place(row, head)
            k, v = (torch.cat([x[own], y[head]])[None, None] for x, y in zip(far, near, strict=True))
            yield slice(head, head + 1), k, v

    # what stays

    def settle(self) -> None:
        undecided = self.undecided()
        self._unsettled |= undecided > 0
        rows = range(self.batch_size)
        due = [self.due(row, undecided) for row in rows]
        leaving = [self._leaving(row, undecided) if due[row] or self._full(row, undecided) else 0 for row in rows]
        if not any(due) and not any(leaving):
            self.dense.fit()
            return
        totals = [self.room(row, undecided) if due[row] else self.total(row) for row in rows]
        ends = [n - out for n, out in zip(self.dense.lengths, leaving, strict=True)]  # of what stays open
        judged = self.judge(ends)
        method: Any = self.bound.method
        chosen = method.share_out(judged, self.sharing(judged, totals, ends))
        kept = [own | head.always for own, head in zip(chosen, judged, strict=True)]
        parts: list[dict[str, torch.Tensor]] = []
        reals, counts = [], torch.stack([own.sum(-1) for own in kept], -1).tolist()
        for head, own in enumerate(kept):
            items, _ = self.head(head)
            most = max(count[head] for count in counts)
            index = rising(own[:, None], most)
            parts.append({name: _gather(x, index) for name, x in items.items()})
            many = torch.tensor([count[head] for count in counts], device=index.device)
            reals.append(torch.arange(most, device=index.device) < many[:, None])
        self.far.fill(
            {name: torch.cat([part[name] for part in parts], 2) for name in parts[0]}, torch.cat(reals, 1), counts
        )
        if any(leaving):
            self.dense.drop(0, leaving)
        else:
            self.dense.fit()
        self._evicted = [
            max(0, seen - undecided) if over else was
            for seen, was, over in zip(self.rows, self._evicted, due, strict=True)
        ]

    def _leaving(self, row: int, undecided: int) -> int:
        """Open tokens of a row that the window has left behind."""
        return max(0, self.dense.lengths[row] - self.bound.method.window - undecided)

    def _full(self, row: int, undecided: int) -> bool:
        """Whether they are to go, though nothing has to be evicted: else one row's would be padding beside another."""
        most = self.bound.method.every if self._arrived[row] <= 1 else 1
        return not self.bound.whole and self._leaving(row, undecided) >= most

    def judge(self, ends: list[int]) -> list[Judged]:
        """Every head's tokens but the ends[b] last ones, which stay open; these are neither free nor always kept."""
        method, judged = self.bound.method, []
        open_ = torch.tensor(ends, device=self.dense.k.device)  # type: ignore[union-attr]
        for head in range(self.far.heads):
            held = self._held(head)
            slots = torch.arange(held.k.shape[2], device=open_.device)
            behind = slots < (held.lengths - open_)[:, None]
            free = evictable(method, held, held.lengths)[:, 0] & behind
            place = held.columns["position"][:, 0].long()
            judged.append(Judged(method.score(held)[:, 0].float(), place, free, behind & ~free))
        return judged

    def sharing(self, judged: list[Judged], totals: list[int], ends: list[int]) -> torch.Tensor:
        """How many free tokens stay, int64 [batch], where heads hold totals[b] together with the ends[b] open ones."""
        open_ = [total - len(judged) * end for total, end in zip(totals, ends, strict=True)]
        always = sum(head.always.sum(-1) for head in judged)
        return (torch.tensor(open_, device=judged[0].free.device) - always).clamp(min=0)

    def _held(self, head: int) -> Held:
        """One head, as the only one of a layer."""
        items, lengths = self.head(head)
        k, v = items.pop("k"), items.pop("v")
        queries = self.queries
        if queries is not None and queries.q is not None:
            group = queries.q.shape[1] // self.far.heads
            queries = queries.of_heads(slice(head * group, (head + 1) * group))
        return Held(k, v, torch.tensor(lengths, device=k.device), items, queries, self.scaling, self.position)

    # attention

    def attend(self, p: Pass) -> torch.Tensor:
        if not self.far:
            return super().attend(p)
        seen = self._seen(p)
        if p.q.shape[2] == 1:
            return self._attend_one(p, *self.dense.view(), seen)
        out = torch.empty_like(p.q)
        for head, own, before in self._heads(p):
            items, _ = self.head(head)
            out[:, own] = dense_attention(p.q[:, own], items["k"], items["v"], p.scaling, seen + before)
        return out

    def log_sum_exp(self, p: Pass) -> torch.Tensor | None:
        if not self.far:
            return None
        seen, parts = self._seen(p), []
        for head, own, before in self._heads(p):
            k = self.head(head)[0]["k"]
            parts.append(attention_mass.log_sum_exp(p.q[:, own], k, p.scaling, seen + before))
        return torch.cat(parts, 1)

    def _seen(self, p: Pass) -> torch.Tensor:
        """How many open tokens each query sees: int64 [batch, queries]."""
        seen = self.visible(p.q.shape[2], p.causal)
        if seen is not None:
            return seen
        return torch.tensor(self.dense.lengths, device=p.q.device)[:, None].expand(-1, p.q.shape[2])

    def _heads(self, p: Pass) -> Any:
        """Each KV head's number, its query heads, and how many tokens lie before the open ones: int64 [batch, 1]."""
        group = p.q.shape[1] // self.far.heads
        for head in range(self.far.heads):
            before = torch.tensor([counts[head] for counts in self.far.counts], device=p.q.device)[:, None]
            yield head, slice(head * group, (head + 1) * group), before

    def _attend_one(self, p: Pass, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """All rows at once where they have as many slots, else one after the other."""
        far, rows = self.far, self.batch_size
        assert far.ends is not None
        far_k, far_v = far.items["k"], far.items["v"]
        if len(set(far.rooms)) == 1:
            far_k, far_v = (x.view(rows, far.rooms[0], x.shape[-1]) for x in (far_k, far_v))
            return ragged_step_attention(p.q, far_k, far_v, far.ends, k, v, p.scaling, seen)
        parts = []
        for row in range(rows):
            own, slots = slice(row, row + 1), far.row(row)
            q, near = p.q[own], (k[own], v[own])
            if far.rooms[row]:
                sides = far_k[None, slots], far_v[None, slots], far.ends[own]
                parts.append(ragged_step_attention(q, *sides, *near, p.scaling, seen[own]))
            else:
                parts.append(step_attention(q, *near, p.scaling, seen[own]))
        return torch.cat(parts)

    # steps

    def reserve(self, new: int) -> None:
        window, every = self.bound.method.window, self.bound.method.every
        k, _ = self.dense.view()
        seen = max(self.rows) + new
        if not self.bound.whole and (self.far or self.dense.longest + new >= window + every):
            self.far.reserve([self._most(row, seen) for row in range(self.batch_size)], k)
        del k  # it would hold the old storage beside the new
        longest = self.dense.longest
        self.dense.reserve(longest + new if self.bound.whole else min(longest + new, max(longest, window + every) + 1))

    def _most(self, row: int, seen: int) -> int:
        """Slots that a row may need on the way to `seen` tokens, heads together."""
        return self.far.heads * max(0, self.bound.most(seen, self.position) - self.bound.method.window)

    def release(self) -> None:
        super().release()
        self.far.release()

    def ripe(self) -> bool:
        return any(self.due(row) or self._full(row, 0) for row in range(self.batch_size))

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        if not self.far.items:
            return super().attend_step(p, step)
        k, v = self.dense.tensors()
        return self._attend_one(p, k, v, step.seen)

    # what it holds

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As it is said there; heads that hold fewer tokens than the longest are followed by zeros, too."""
        k, v = super().materialize()
        if not self.far:
            return k, v
        heads = [self.head(head)[0] for head in range(self.far.heads)]
        longest = max(items["k"].shape[2] for items in heads)
        sides = []
        for name in "kv":
            whole = k.new_zeros(self.batch_size, len(heads), longest, heads[0][name].shape[3])
            for head, items in enumerate(heads):
                whole[:, head, : items[name].shape[2]] = items[name][:, 0]
            sides.append(whole)
        return sides[0], sides[1]

    def span(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.materialize()
        return k[row, :, start:stop], v[row, :, start:stop]

    def parts(self) -> dict[str, list[torch.Tensor]]:
        parts = super().parts()
        if self.far.ends is None:
            return parts
        columns = [*parts["columns"], *self.far.columns()]
        return {**parts, "heads": self.far.tensors(), "columns": columns}

    def drop_last(self, counts: list[int]) -> None:
        near = [min(count, n) for count, n in zip(counts, self.dense.lengths, strict=True)]
        self.dense.crop(near)
        self.far.drop_last([count - part for count, part in zip(counts, near, strict=True)])

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self.far.select(rows)

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        self.far.move(device)

    def state(self) -> State:
        made = super().state()
        return made and made | under("far", self.far.state())

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        if state:
            self.far = RaggedBuffer(self.batch_size, self.bound.shape.kv_heads, self.needs.columns())
            self.far.load_state(within("far", state))


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens of x [batch, 1, n, ...] at index [batch, 1, m]."""
    return x.gather(2, index if x.ndim == 3 else index[..., None].expand(*index.shape, x.shape[3]))
