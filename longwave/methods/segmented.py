"""Methods that store the middle of the context in segments: sinks and window dense, pages in between."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from longwave.frame import MemoryLayer, Needs, Pass, Step
from longwave.frame.later import later_queries
from longwave.frame.observe import probing
from longwave.methods.base import Bound, CacheShape, Method
from longwave.ops import mass as attention_mass
from longwave.ops.attention.reference import group_heads, last_attention, query_block, visible_mask
from longwave.ops.merge import merge_heads
from longwave.ops.spectral.layout import Layout
from longwave.plan.plan import Plan
from longwave.store.pages import PageStore
from longwave.store.state import State, under, within
from longwave.store.tokens import capacity

BESIDE = 8  # channels beside K's for a bias: fused kernels want multiples of 8


@dataclass(frozen=True)
class Segmented(Method):
    """Options: `sinks`, `window` (first and last tokens, dense) and how many are compressed together."""

    takes_others: ClassVar[bool] = True  # whether what an evicting method keeps can lie in its pages

    @property
    @abstractmethod
    def dense_tokens(self) -> tuple[int, int, int]:
        """(sinks, window, segment)."""

    @abstractmethod
    def bind(self, shape: CacheShape, profile: Any, budget: float | None) -> SegmentedBound: ...

    def unmeasured(self) -> Segmented:
        """The same without anything that is measured of a model, for keys that are not as models have them."""
        return self


def pages_of(store: object, owner: str) -> Segmented:
    """`store` of another method's options: a method of pages, by name or with options, whose sinks and window are the
    owner's to say."""
    if isinstance(store, str):
        from longwave.methods import get_method

        store = get_method(store)
    if not isinstance(store, Segmented) or not (store.takes_others and store.dense_tokens[2]):
        raise ValueError(f'store is a method of pages such as "kivi" or "fourier", got {store!r}')
    for option in fields(store):
        if option.name in ("sinks", "window") and getattr(store, option.name) != option.default:
            raise ValueError(f"{option.name} is {owner}'s to say, and the store's decides nothing: leave it out there")
    return store


@dataclass(frozen=True, eq=False)
class SegmentedBound(Bound):
    """plan: how every head is stored. words: the decisions, for reports. warn: see `Bound.warning`. basis: of
    states."""

    method: Segmented
    plan: Plan = ()
    words: str = ""
    warn: str | None = None
    basis: str = "dct"

    def decisions(self) -> Iterator[bytes]:
        yield self.basis.encode()
        for layer in self.plan:
            yield from layer.contents()

    @property
    def dense_tokens(self) -> tuple[int, int, int]:
        """(sinks, window, segment)."""
        return self.method.dense_tokens

    @functools.cached_property
    def merges(self) -> bool:
        """Whether segments of some head are merged."""
        return any(code.merged for layer in self.plan for code in layer.k)

    @property
    def needs(self) -> Needs:
        return probing(self.dense_tokens[1]) if self.merges else Needs()

    @property
    def warning(self) -> str | None:
        return self.warn

    def __str__(self) -> str:
        return self.words or self.method.name

    @property
    def kept(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Per memory layer, the channels of K and V kept as values or codes: bool [kv_heads, head_dim] each."""
        tables = []
        for layer in self.plan:
            pair = []
            for codes, order in ((layer.k, layer.order_k), (layer.v, layer.order_v)):
                rank = torch.argsort(order.long(), dim=-1)
                pair.append(rank < torch.tensor([[code.kept] for code in codes]))
            tables.append((pair[0], pair[1]))
        return tuple(tables)

    def layout(self, position: int) -> Layout:
        """The pages of memory layer number `position`: always the same object, which keeps what kernels make of it."""
        return self._layouts[position]

    @functools.cached_property
    def _layouts(self) -> list[Layout]:
        return [layer.layout(self.dense_tokens[2], self.shape.dtype) for layer in self.plan]

    @functools.cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        """Bytes of a page of each memory layer, and of its index. Layers may share their codes."""
        sizes = {id(layer): layer.sizes(self.dense_tokens[2], self.shape.dtype) for layer in set(self.plan)}
        return [sizes[id(layer)] for layer in self.plan]

    def new_store(self, position: int, batch: int, device: torch.device) -> Any:
        return PageStore(batch, self.layout(position), self.basis, self.plan[position].states, device)

    def prepare(self, layer: SegmentedLayer, rows: slice) -> None:
        """What is to be decided of some rows whose first tokens are about to go into `layer.store`."""

    @property
    def span(self) -> int:
        """Middle tokens that make a page: a segment, or more where some of them are left out."""
        return self.dense_tokens[2]

    def absorbed(self, tokens: int) -> int:
        """Middle tokens that are behind pages after a prompt of `tokens` given in one call."""
        sinks, window, _ = self.dense_tokens
        return max(0, tokens - sinks - window) // self.span * self.span

    def layer(self, index: int) -> MemoryLayer:
        return SegmentedLayer(index, self)

    def layer_bytes(self, index: int, tokens: int) -> int:
        middle = self.absorbed(tokens)
        return self._bytes(index, tokens - middle, middle)

    def shared_bytes(self, index: int, tokens: int) -> int:
        """What names the channels."""
        return self._sizes[self.shape.memory_layers.index(index)][1] if self.absorbed(tokens) else 0

    def _bytes(self, index: int, dense: int, middle: int) -> int:
        """Of a layer with `dense` tokens, and `middle` behind pages."""
        needs, shape = self.needs, self.shape
        columns = shape.kv_heads * sum(dtype.itemsize for dtype in needs.columns().values())
        total = capacity(dense) * (shape.token_bytes + columns)
        total += needs.nbytes(shape.query_heads, shape.head_dim, shape.dtype.itemsize)
        return total + (self.store_bytes(index, middle // self.span) if middle else 0)

    def store_bytes(self, index: int, pages: int) -> int:
        """Of one row with so many pages in a layer, and of what names the channels."""
        page, names = self._sizes[self.shape.memory_layers.index(index)]
        return pages * page + names

    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        """Besides what layers hold, one row of one layer dense: a turn over pages takes that while it is read."""
        sinks, window, _ = self.dense_tokens
        middle = self.absorbed(tokens)
        scratch = tokens * self.shape.token_bytes if middle else 0
        if self.merges:
            scratch += scratch * BESIDE // self.shape.head_dim
        if batch > 1:  # rows may differ: the longest dense part of one is padded beside the longest middle of another
            dense = min(tokens, sinks + window + self.span - 1)
            layers = sum(self._bytes(i, dense, middle) for i in self.shape.memory_layers)
            return batch * (layers + self.shape.sliding_bytes(tokens)) + scratch
        lengths = {tokens, min(tokens, middle + sinks + window + self.span - 1)}
        if middle:
            lengths.add(middle + sinks + window - 1)
        return max(self.nbytes(n, batch) for n in lengths) + scratch

    def page_fraction(self) -> float:
        """Bytes of a page of every layer over those of the tokens behind it dense: what a budget bounds."""
        pages = sum(page for page, _ in self._sizes)
        return pages / (len(self._sizes) * self.span * self.shape.token_bytes)


class SegmentedLayer(MemoryLayer):
    """Sinks, window and open segment dense, the middle in the method's store."""

    hints = True

    def __init__(self, index: int, bound: SegmentedBound):
        super().__init__(index, bound.needs)
        self.bound, self.planned = bound, bound.shape.dtype
        self.position = bound.shape.memory_layers.index(index)
        self.sinks, self.window, self.segment = bound.dense_tokens
        own = bound.plan[self.position : self.position + 1]  # a period has none
        self.merged = [head for layer in own for head, code in enumerate(layer.k) if code.merged]

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """What crossed the window cannot come back, but while the past is recorded the last pass has not crossed yet.

        Assisted decoding asks for it since transformers 5.24, after it has switched recording on.
        """
        return self.record_past

    def _clear(self) -> None:
        super()._clear()
        self.store: Any = None

    def patience(self) -> int:
        return self.window if self.max_tokens is None else 0  # `crop` reaches into the window either way

    def due(self, row: int) -> int:
        """Dense tokens of a row, the oldest behind the sinks, that pages are to take over now."""
        waiting = max(0, self.dense.lengths[row] - self.sinks - self.window)
        if self.store is not None:
            return self.store.due(row, waiting)
        return self.bound.absorbed(self.dense.lengths[row])

    def chosen(self, rows: slice, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V that go into pages, of the `count` oldest dense tokens behind the sinks: all of them."""
        k, v = self.dense.view()
        middle = slice(self.sinks, self.sinks + count)
        return k[rows, :, middle], v[rows, :, middle]

    def settle(self) -> None:
        due = [self.due(row) for row in range(self.batch_size)]
        if not any(due):
            self.dense.fit()
            return
        k, v = self.dense.view()
        self._check_shape(k, v)
        if self.store is None:
            self.store = self.bound.new_store(self.position, self.batch_size, k.device)
        if len(set(due)) == 1:
            batches: Iterator[tuple[int | None, slice, int]] = iter([(None, slice(None), due[0])])
        else:
            batches = ((row, slice(row, row + 1), count) for row, count in enumerate(due) if count)
        del k, v
        probes = self._probes()
        for row, rows, count in batches:
            self.bound.prepare(self, rows)
            middle_k, middle_v = self.chosen(rows, count)
            if middle_k.device.type != "cpu":  # on the CPU every token was checked when it was written
                self._refuse_nan(middle_k, middle_v, None)
            if probes is None:
                self.store.append(row, middle_k, middle_v)
            else:
                self.store.append(row, *self.joined(middle_k, middle_v, *(x[rows] for x in probes)))
        self.dense.drop(self.sinks, due)

    def joined(self, k: torch.Tensor, v: torch.Tensor, *probes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the store takes of whole segments [b, H, N * T, D], by what `_probes` gave of their rows."""
        q, lse = probes
        return merge_heads(q, k, v, lse, self.scaling, self.segment, self.merged)

    def _probes(self) -> tuple[torch.Tensor, ...] | None:
        """The remembered queries as later ones [B, Hq, P, D], and the log of what their softmax divides by [B, Hq, P],
        -inf where none is remembered; None where no head is merged, or nothing was ever asked."""
        if not self.merged:
            return None
        found = later_queries(self, self.window, [held // self.segment * self.bound.span for held in self.store.tokens])
        if found is None:
            return None
        q, sees, lse = found
        if any(self.store.tokens):
            lse = torch.logaddexp(lse, self._far(q, self.scaling).to(lse.dtype))
        missing = sees[:, None] <= 0
        return q, lse.masked_fill(missing.to(lse.device), float("-inf")) if missing.any() else lse

    def _check_shape(self, k: torch.Tensor, v: torch.Tensor) -> None:
        shape = self.bound.shape
        for x in (k, v):
            if (x.shape[1], x.shape[3]) != (shape.kv_heads, shape.head_dim):
                raise ValueError(
                    f"layer {self.index} has {x.shape[1]} heads of {x.shape[3]} channels, its plan {shape.kv_heads} of "
                    f"{shape.head_dim}: the cache was built for another model, or the model is split over devices"
                )

    def refuse(self, p: Pass) -> None:
        self._check_shape(p.k, p.v)

    # attention

    def attend(self, p: Pass) -> torch.Tensor:
        if self.store is None:
            return super().attend(p)
        if self.store.expands(p.q):
            return self._attend_expanded(p)
        k, v = self.dense.view()
        visible = self.visible(p.q.shape[2], p.causal)
        answer = self.store.attend(p.q, p.scaling, k, v, visible)
        if answer is not None:
            return answer
        return store_attention(self.store, p.q, p.scaling, k, v, visible, self._ends(p.q), max(self.store.tokens))

    def _ends(self, q: torch.Tensor) -> torch.Tensor | None:
        """Middle tokens of each row, None where all have as many."""
        tokens = self.store.tokens
        return None if len(set(tokens)) == 1 else torch.tensor(tokens, device=q.device)

    def _attend_expanded(self, p: Pass) -> torch.Tensor:
        """Many queries: a row's pages are unpacked once, beside its dense tokens and in order, and SDPA does the
        rest."""
        held_k, held_v = self.dense.view()
        out = torch.zeros_like(p.q)
        for row in range(self.batch_size):
            own = slice(None) if p.valid is None else p.valid[row].nonzero()[:, 0]
            q = p.q[row : row + 1, :, own]
            if not q.shape[2]:
                continue
            dense, middle = self.dense.lengths[row], self.store.tokens[row]
            first = min(self.sinks, dense) if middle else dense
            beside = BESIDE if self.merged else 0
            wide_k, wide_v = self.progress.scratch.take(held_k, dense + middle, beside)
            k, v = wide_k[..., : q.shape[3]], wide_v[..., : q.shape[3]]
            for whole, held in ((k, held_k), (v, held_v)):
                whole[:, :, :first] = held[row : row + 1, :, :first]
                whole[:, :, first + middle :] = held[row : row + 1, :, first:dense]
            if middle:
                self.store.expand(row, k[:, :, first : first + middle], v[:, :, first : first + middle])
            if beside:  # what is added to scores meets a query's ones, in two parts: 16 bits would round it
                wide_k[..., k.shape[3] :] = wide_v[..., v.shape[3] :] = 0
                bias = self.store.bias(row).repeat_interleave(self.segment, -1) / p.scaling
                high = bias.to(k.dtype)
                wide_k[:, :, first : first + middle, k.shape[3]] = high
                wide_k[:, :, first : first + middle, k.shape[3] + 1] = (bias - high).to(k.dtype)
                q = torch.cat([q, q.new_ones(*q.shape[:3], 2), q.new_zeros(*q.shape[:3], beside - 2)], -1)
            found = last_attention(q, wide_k, wide_v, p.scaling, p.causal)
            out[row : row + 1, :, own] = found[..., : p.q.shape[3]]
        return out

    def log_sum_exp(self, p: Pass) -> torch.Tensor | None:
        if self.store is None:
            return None
        k, _ = self.dense.view()
        near = attention_mass.log_sum_exp(p.q, k, p.scaling, self.visible(p.q.shape[2], p.causal))
        return torch.logaddexp(near, self._far(p.q, p.scaling))

    def _far(self, q: torch.Tensor, scaling: float) -> torch.Tensor:
        """log of the sum of exp(scores) over pages: [B, Hq, Q] of q [B, Hq, Q, D], in float32 or its float64."""
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        far = torch.full(q.shape[:3], float("-inf"), dtype=kind, device=q.device)
        held = torch.tensor(self.store.tokens, device=q.device)
        step = query_block(self.batch_size * q.shape[1], max(self.store.tokens))
        for start in range(0, q.shape[2], step):
            block = q[:, :, start : start + step]
            scores = self.store.scores(group_heads(block.to(kind) * scaling, self.bound.shape.kv_heads))
            if set(self.store.tokens) != {scores.shape[-1]}:  # rows differ, or there is room for more
                scores = scores.masked_fill(~visible_mask(held[:, None], scores.shape[-1]), float("-inf"))
            far[:, :, start : start + step] = scores.logsumexp(-1).reshape(block.shape[:3])
        return far

    # steps

    def unsteady(self) -> str | None:
        return None if self.segment else "its method fits one period to the whole middle again and again: use segments"

    def page_counts(self) -> list[int]:
        return super().page_counts() if self.store is None else list(self.store.counts)

    def reserve(self, new: int) -> None:
        lengths = [length + new for length in self.dense.lengths]
        filled = [max(0, n - self.sinks - self.window) // self.bound.span for n in lengths]
        if self.store is None and any(filled):
            k, v = self.dense.view()
            self._check_shape(k, v)
            self.store = self.bound.new_store(self.position, self.batch_size, k.device)
            del k, v  # they would hold the old storage beside the new
        if self.store is not None:
            self.store.reserve(max(held + more for held, more in zip(self.store.counts, filled, strict=True)))
        longest = self.dense.longest
        self.dense.reserve(min(longest + new, max(longest + 1, self.sinks + self.window + self.bound.span)))

    def release(self) -> None:
        super().release()
        if self.store is not None and any(self.store.counts):
            self.store.release()
        else:
            self.store = None

    def ripe(self) -> bool:
        return any(self.due(row) for row in range(self.batch_size))

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        if self.store is None:
            return super().attend_step(p, step)
        k, v = self.dense.tensors()
        answer = self.store.attend(p.q, p.scaling, k, v, step.seen, step.counts)
        if answer is not None:
            return answer
        ends = step.counts * self.segment
        return store_attention(self.store, p.q, p.scaling, k, v, step.seen, ends, self.store.room)

    # what it holds

    def held(self) -> list[int]:
        dense = super().held()
        return dense if self.store is None else [a + b for a, b in zip(dense, self.store.tokens, strict=True)]

    def answers(self) -> list[str]:
        return [] if self.store is None else self.store.answers()

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = super().materialize()
        if self.store is None:
            return k, v
        sides = []
        for dense, middle in zip((k, v), self.store.materialize(), strict=True):
            whole = dense.new_zeros(*dense.shape[:2], max(self.held()), dense.shape[3])
            for row, (held, count) in enumerate(zip(self.dense.lengths, self.store.tokens, strict=True)):
                first = min(self.sinks, held)
                whole[row, :, :first] = dense[row, :, :first]
                whole[row, :, first : first + count] = middle[row, :, :count]
                whole[row, :, first + count : held + count] = dense[row, :, first:held]
            sides.append(whole)
        return sides[0], sides[1]

    def span(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.store is None or not self.store.tokens[row]:
            return super().span(row, start, stop)
        first, middle = min(self.sinks, self.dense.lengths[row]), self.store.tokens[row]
        parts = [super().span(row, start, min(stop, first))] if start < first else []
        inside = max(start - first, 0), min(stop - first, middle)
        parts += [self.store.span(row, *inside)] if inside[0] < inside[1] else []
        if stop > first + middle:
            parts.append(super().span(row, max(start - middle, first), stop - middle))
        k, v = zip(*parts, strict=True)
        return torch.cat(k, 1), torch.cat(v, 1)

    def state(self) -> State:
        made = super().state()
        return made if self.store is None else made | under("store", self.store.state())

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        kept = within("store", state)
        if kept:
            store = self.bound.new_store(self.position, self.batch_size, device)
            store.load_state(kept)
            self.store = store

    def parts(self) -> dict[str, list[torch.Tensor]]:
        if self.store is None:
            return super().parts()
        return {**super().parts(), **self.store.parts(), "channel index": list(self.store.index())}

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        if self.store is not None:
            self.store.move(device)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        if self.store is not None:
            self.store.select(rows)
            if not any(self.store.tokens):  # of the rows that are left none has a middle yet
                self.store = None

    def can_drop(self, counts: list[int]) -> None:
        for row, count in enumerate(counts):
            free = self.dense.lengths[row] - (self.sinks if self.store and self.store.tokens[row] else 0)
            if count > free:
                raise ValueError(
                    f"cannot remove the last {count} tokens: all but {free} of them are compressed already. "
                    "Raise window, or keep a copy.deepcopy of the cache to go back to"
                )


def store_attention(
    store: Any,
    q: torch.Tensor,
    scaling: float,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    ends: torch.Tensor | None,
    middle: int,
) -> torch.Tensor:
    """Attention over dense tokens and a store's middle by its `scores` and `mix`: q [B, Hq, Q, D] -> same shape.

    k, v [B, H, L, D], of which query i of row b sees the first visible[b, i]; of the store's `middle` tokens row b has
    the first ends[b]. None: all.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = k.to(compute), v.to(compute)
    batch, heads, queries, _ = q.shape
    dense = k.shape[2]
    step = query_block(batch * heads, dense + middle)
    out = torch.empty_like(q)
    for start in range(0, queries, step):
        block = q[:, :, start : start + step]
        x = group_heads(block.to(compute) * scaling, k.shape[1])
        scores = torch.cat([x @ k.mT, store.scores(x)], dim=-1)
        # what a query may not see gets the lowest finite score: a row that sees nothing averages, not NaN
        lowest = torch.finfo(compute).min
        by_query = scores.view(*scores.shape[:2], -1, block.shape[2], scores.shape[-1])
        if visible is not None:
            seen = visible[:, start : start + step]
            by_query[..., :dense].masked_fill_(~visible_mask(seen, dense)[:, :, None], lowest)
        if ends is not None:
            by_query[..., dense:].masked_fill_(~visible_mask(ends[:, None], middle)[:, :, None], lowest)
        p = torch.softmax(scores, dim=-1)
        mixed = p[..., :dense] @ v + store.mix(p[..., dense:])
        out[:, :, start : start + step] = mixed.reshape(block.shape).to(q.dtype)
    return out
