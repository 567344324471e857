"""longcache: every token is kept, and attention reads a number of them that does not grow, at positions that do not.

Source: LongCache, later ReAttention, arXiv 2407.15176. Keys lie as they were before rotation. Queries look for the best
of them without positions, in every layer anew; what most of them want is read with its neighbours, between the first
tokens and the last ones, and all of it is rotated to places without gaps. So no position exceeds the `scope`, and
text of any length can be asked for what stands in it.

    scope = sinks + spans * span + window

As long as a row has no more tokens than that, all of them are read, and this is full attention. Of our own: votes are
counted row by row, a pass of few tokens chooses for each of them, and a long prompt is read in stretches by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch

from longwave.checks import whole
from longwave.frame import MemoryLayer, Needs, Pass
from longwave.methods.base import Bound, CacheShape
from longwave.methods.ends import read_ends
from longwave.methods.scoped import Scoped, ScopedBound, ScopedLayer, Stretch, at_places
from longwave.methods.scoped_pages import PagedScopedBound, PagedScopedLayer, bind_pages
from longwave.methods.segmented import Segmented, pages_of
from longwave.methods.told import NEVER, Told
from longwave.ops import mass, select
from longwave.ops.ahead import Ahead
from longwave.ops.attention.reference import causal_attention, dense_attention, step_attention
from longwave.ops.pieces import Coming, Made, fetched, on_its_way
from longwave.plan.profile import Profile
from longwave.store.mapped import MappedTokens
from longwave.store.state import State, under, within
from longwave.store.tokens import capacity

READ = 1 << 14  # tokens that stretches read together, where none waits for another


@dataclass(frozen=True)
class ReAttention(Scoped):
    """Everything is kept; queries choose, without positions, a scope that stays finite (LongCache, ReAttention).

    sinks, window: first and last tokens, always read; the window ends with the tokens that ask. top: tokens that each
        query votes for in each of its heads. spans: of the tokens voted for, how many are read, with what stands around
        them, span tokens in all. chunk: tokens of a prompt that choose together. exact: every token may be voted for;
        False: of 128 that stand side by side only their best, which is less work on a GPU. store: a method of pages, by
        name or with options, that what leaves the window goes into; the budget is that of the pages then. look: a pass
        of two tokens to so many, such as a question, is read twice: the first time to see which spans it asks for, in
        all layers together, the second time, and in the steps behind it, all layers read those. 0: never. before:
        tokens right before such a pass that are read with it and behind it; None: what the window has room for. scan:
        whether what is not looked for chooses as well; False: it scores nothing, and reads first and last tokens alone,
        as many of these as the scope has room for.

    Without store it takes no budget, since all is held; 1 reads all.
    """

    name: ClassVar[str] = "longcache"
    uses: ClassVar[str] = "reads {} tokens at once (sinks + spans * span + window)"
    fewer: ClassVar[str] = "fewer spans, or a smaller window"

    sinks: int = 32
    window: int = 4096
    top: int = 4
    spans: int = 127
    span: int = 32
    chunk: int = 512
    exact: bool = True
    store: Segmented | str | None = None
    look: int = 0
    before: int | None = None
    scan: bool = True

    def __post_init__(self) -> None:
        whole("sinks", self.sinks, 0, "tokens")
        whole("top", self.top, 1, "tokens")
        whole("spans", self.spans, 0, "spans")
        whole("span", self.span, 1, "tokens")
        whole("chunk", self.chunk, 1, "tokens")
        whole("window", self.window, self.chunk, "tokens (those that choose together, chunk, lie in it)")
        if not 0 <= whole("look", self.look, 0, "tokens") <= self.window:
            raise ValueError(f"look is of tokens that stay in the window of {self.window:,}; got {self.look:,}")
        if self.before is not None:
            if not self.look:
                raise ValueError("before is of what is looked for: give look, tokens of a question at most")
            most = self.window - self.look
            if whole("before", self.before, 0, "tokens") > most:
                raise ValueError(f"before and look share the window of {self.window:,}: before is at most {most:,}")
        if not isinstance(self.scan, bool):
            raise ValueError(f"scan is True or False, got {self.scan!r}")
        if not (self.scan or self.look):
            raise ValueError(
                "scan=False leaves the middle to what is looked for: give look, tokens of a question at most"
            )
        if not isinstance(self.exact, bool):
            raise ValueError(f"exact is True or False, got {self.exact!r}")
        super().__post_init__()
        if self.store is not None:
            object.__setattr__(self, "store", pages_of(self.store, self.name))
            if self.host:
                raise ValueError(f"pages lie on the device: leave store or host={self.host!r} out")

    @property
    def scope(self) -> int:
        """Tokens that attention reads at most, and positions that it uses."""
        return self.sinks + self.spans * self.span + self.window

    @property
    def positions(self) -> int:
        return self.scope

    @property
    def plain(self) -> int:
        return self.scope

    @property
    def words(self) -> str:
        """What is read."""
        looks = f", look={self.look}" * bool(self.look) + ", scan=False" * (not self.scan)
        looks += f", before={self.before}" * (self.before is not None)
        return f"{self.scope} tokens: {self.spans} spans of {self.span}, window={self.window}{looks}"

    @property
    def found_bytes(self) -> int:
        """Of a layer and row: the spans that were looked for, and where the question began."""
        return 8 * (self.spans + 1) if self.needs.look else 0

    @property
    def needs(self) -> Needs:
        """Of a layer, beside keys before rotation."""
        return Needs(look=self.look if self.spans else 0)

    def bound(self, shape: CacheShape, budget: float | None) -> ReAttentionBound:
        return ReAttentionBound(self, shape, budget)

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> Bound:
        if not isinstance(self.store, Segmented):
            return super().bind(shape, profile, budget)
        inner = bind_pages(self, self.store, shape, budget)
        return PagedReAttentionBound(self, shape, budget, inner=inner)

    def fits_budget(self) -> bool:
        return isinstance(self.store, Segmented) and self.store.fits_budget()

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        store = self.store
        return store.unmeasured().least_budget(shape) if isinstance(store, Segmented) else 0.0


@dataclass(frozen=True, eq=False)
class ReAttentionBound(ScopedBound):
    method: ReAttention

    @property
    def needs(self) -> Needs:
        return super().needs | (Needs() if self.whole else self.method.needs)

    def beside(self, tokens: int) -> int:
        return self.method.found_bytes

    def reads(self) -> str:
        return self.method.words

    def reading(self, index: int) -> ReAttentionLayer:
        return ReAttentionLayer(index, self)

    def brings(self, tokens: int) -> int:
        """What is read, and keys: a piece that is scored, the next one, and the next layer's first. Without scanning,
        or what stretches that are answered together share, and their own of it."""
        keys = min(tokens, 2 * select.PIECE) + min(tokens, select.PIECE)
        found = 2 * capacity(min(tokens, self.method.scope)) + keys
        ends = 0 if self.method.scan or tokens <= self.method.scope else 2 * (min(tokens, READ) + READ)
        return max(found, ends) * self.shape.token_bytes // 2


class ReAttentionLayer(ScopedLayer):
    """Every pass rotates what it reads to places without gaps. All keys are scored, whatever is chosen: where they lie
    elsewhere, those of the next layer are asked for while this one goes on."""

    method: ReAttention
    _peers: Sequence[Any] = ()

    def join(self, peers: list[MemoryLayer]) -> None:
        super().join(peers)
        # one list, or a copy of a cache would go from layer to layer, as deep as there are any
        self._peers = peers if peers[0] is self else peers[0]._peers  # type: ignore[attr-defined]

    def _clear(self) -> None:
        super()._clear()
        self._coming: Ahead | None = None  # of the stored keys the first ones, between the layer before and this one
        self.told: Told | None = None  # where rows may look
        self._asking = False  # the pass that runs was looked through

    def looks(self, rows: list[int]) -> bool:
        return max(rows) > self.method.scope

    def seen(self, look: list[torch.Tensor], new: list[int]) -> None:
        assert self.told is not None
        longer = [row + more > self.method.scope for row, more in zip(self.rows, new, strict=True)]
        who = [more > 1 and beyond for more, beyond in zip(new, longer, strict=True)]
        if look and any(who):
            self._asking = True
            first = self._peers[0]
            found = select.greatest(look[0], self.method.spans) if self is first else first.told.found
            self.told.tell(found, self.rows, who)

    @property
    def alone(self) -> int:
        """What is looked for, and what looked, chooses together."""
        return 0 if self._asking or self._looking else self.method.alone

    def attend(self, p: Pass) -> torch.Tensor:
        if self.told is not None and any(self.told.asked) and not self._looking and not self._asking:
            before, least = self.starts, self.method.look + 1 if self.record_past else 2  # guesses ask nothing
            who = [a and row - was >= least for a, row, was in zip(self.told.asked, self.rows, before, strict=True)]
            if any(who):
                self.told.forget(before, who)
        try:
            return super().attend(p)
        finally:
            if not self._looking:
                self._asking = False

    def expect(self) -> None:
        """Stored keys are scored soon. Those of the pass that runs are not there yet, and no row may have one of them
        among what is fetched."""
        there = min(self.dense.lengths, default=0)
        if not there or not isinstance(self.dense, MappedTokens):
            return
        self.dense.expect(there)
        k = next(self.dense.tensors())
        if self._coming is None and fetched(k, self.device):
            self._coming = on_its_way(k[:, :, : min(there, select.PIECE)], self.device)

    def stored_keys(self, tokens: int) -> torch.Tensor | Made | Coming:
        keys, coming, self._coming = super().stored_keys(tokens), self._coming, None
        return keys if coming is None else Coming(keys, coming)  # type: ignore[arg-type]

    def turns(self, rows: list[list[tuple[int, int]]]) -> Iterator[list[Stretch]]:
        if not self._blind:
            return super().turns(rows)
        plain = super().turns([[ends for ends in row if ends[1] <= self.method.scope] for row in rows])
        return chain(plain, self._together([[ends for ends in row if ends[1] > self.method.scope] for row in rows]))

    def _together(self, rows: list[list[tuple[int, int]]]) -> Iterator[list[Stretch]]:
        """Stretches that do not wait for each other, as many at a time as READ allows, or one of each row."""
        far = [s for turn in super().turns(rows) for s in turn if s.stop]
        size = max(self.batch_size, READ // self.method.scope)
        return (far[at : at + size] for at in range(0, len(far), size))

    def read_turn(
        self, p: Pass, turn: list[Stretch], number: torch.Tensor, stop: torch.Tensor, asks: torch.Tensor
    ) -> torch.Tensor:
        m = self.method
        if self._blind and all(s.stop > m.scope for s in turn):
            return read_ends(p, turn, self.rows, self.taken, m.sinks, m.scope - m.sinks)
        return super().read_turn(p, turn, number, stop, asks)

    @property
    def _blind(self) -> bool:
        """Whether no row looks into the middle."""
        return not (self.method.scan or self._looking or (self.told is not None and any(self.told.asked)))

    @property
    def _looking(self) -> bool:
        """Whether the pass that runs is read for the first of two times."""
        return self.progress.look is not None

    def read(
        self,
        p: Pass,
        number: torch.Tensor,
        stop: torch.Tensor,
        longest: int,
        asks: torch.Tensor | None = None,
        square: bool = False,
    ) -> torch.Tensor:
        index, count = self._read_by(p, longest, stop, asks)
        k, v = self.taken(index)
        k = at_places(p, k)
        place = (number - stop[:, None] + count[:, None]).clamp(min=0)  # what is read ends with the tokens that ask
        q = p.rotary.shift(p.module, p.q, p.known_positions(), place)
        if p.sinks is not None:
            p.lse = mass.log_sum_exp(q, k, p.scaling, place + 1)
        if square and longest <= self.method.scope:
            return causal_attention(q, k, v, p.scaling)
        attention = step_attention if q.shape[2] == 1 else dense_attention
        return attention(q, k, v, p.scaling, place + 1)

    def _read_by(
        self, p: Pass, longest: int, stop: torch.Tensor, asks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the tokens that rows read, rising, int64 [batch, n], and how many those are, int64 [batch]."""
        told, m = self.told, self.method
        if told is None or longest <= m.scope or self._looking or not any(told.asked):
            return self._untold(p, longest, stop, asks)
        since = None if m.before is None else told.since - m.before
        ours = select.told(told.found, stop, m.sinks, m.window, m.span, since)
        if all(told.asked):
            return ours
        own = told.found[:, 0] != NEVER
        index, count = self._untold(p, longest, stop, asks)
        return ours[0].where(own[:, None], index), ours[1].where(own, count)

    def _untold(
        self, p: Pass, longest: int, stop: torch.Tensor, asks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_read_by`, where nothing was looked for."""
        m = self.method
        if longest > m.scope and not m.scan and not self._looking:
            return select.told(stop.new_empty(len(stop), 0), stop, m.sinks, m.scope - m.sinks, 1)
        return select.places(self._chosen(p, longest, stop, asks), min(longest, m.scope))

    def _chosen(self, p: Pass, longest: int, stop: torch.Tensor, asks: torch.Tensor | None) -> torch.Tensor:
        """Which of the stored tokens a row reads: bool [batch, longest]."""
        m, number, last = self.method, torch.arange(longest, device=stop.device), stop[:, None]
        near = m.window if m.scan else m.scope - m.sinks
        keep = (number < m.sinks) | (number >= last - near) | (last <= m.scope)
        if m.spans and longest > m.scope:
            q = p.rotary.unrotate(p.module, p.q, p.known_positions())
            begin, end = torch.full_like(stop, m.sinks), stop - m.window
            if m.scan:
                options = dict(top=m.top, spans=m.spans, span=m.span, exact=m.exact)
                keep |= select.choose(q, self._keys_of(longest), begin, end, asks, **options)  # type: ignore[arg-type]
            if self.progress.look is not None:
                keys = self.stored_keys(longest)
                if m.before is not None:
                    end = torch.tensor(self.starts, device=stop.device) - m.before
                claim = select.claims(q, keys, begin, end, asks, scaling=p.scaling, span=m.span)
                _add(self.progress.look, claim)
        return keep & (number < last)

    def _keys_of(self, longest: int) -> torch.Tensor | Made | Coming:
        """Stored keys that are scored; those of the next layer begin to come behind the last stretch of a pass."""
        keys = self.stored_keys(longest)
        if longest == max(self.rows):
            for layer in [layer for layer in self._peers if layer.index > self.index][:1]:
                layer.expect()
        return keys

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.needs.look:
            self.told = Told(self.batch_size, self.method.spans, self.device)

    def parts(self) -> dict[str, list[torch.Tensor]]:
        parts = super().parts()
        return parts if self.told is None else {**parts, "found": [self.told.found, self.told.since]}

    def drop_last(self, counts: list[int]) -> None:
        super().drop_last(counts)
        if self.told is not None and not self._looking:
            self.told.take_back([row - count for row, count in zip(self.rows, counts, strict=True)])

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        if self.told is not None:
            self.told.move(device)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        if self.told is not None:
            self.told.select(rows)

    def state(self) -> State:
        made = super().state()
        return made if not made or self.told is None else {**made, **under("told", self.told.state())}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        if self.needs.look and state:
            self.told = Told.of_state(within("told", state), self.batch_size, self.method.spans)


def _add(looking: list[torch.Tensor], claim: torch.Tensor) -> None:
    """To what was seen before of other queries and in other layers: [batch, spans], fewer where rows were shorter."""
    if looking:
        most = max(looking[0].shape[1], claim.shape[1])
        before, new = (
            torch.nn.functional.pad(x, (0, most - x.shape[1])) for x in (looking.pop().to(claim.device), claim)
        )
        claim = before + new
    looking.append(claim)


@dataclass(frozen=True, eq=False)
class PagedReAttentionBound(PagedScopedBound):
    method: ReAttention

    @property
    def needs(self) -> Needs:
        return super().needs | self.method.needs

    def layer_bytes(self, index: int, tokens: int) -> int:
        return super().layer_bytes(index, tokens) + self.method.found_bytes

    def __str__(self) -> str:
        return f"{self.method.name}(reads {self.method.words}, in {self.inner})"

    def layer(self, index: int) -> PagedReAttentionLayer:
        return PagedReAttentionLayer(index, self)


class PagedReAttentionLayer(ReAttentionLayer, PagedScopedLayer):
    """The same over pages."""
