"""`MemoryLayer`: one attention layer's memory, where a method lives.

Its life in one forward pass: `update` takes the new tokens, `forward` (called from the attention function) runs
`write`, `attend`, `observe` and `settle`. A prompt given in one call is so read with exact attention and compressed
right after, one layer at a time; later tokens see the compressed past.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from longwave.frame.attention import Handle, StepMask, own_arithmetic
from longwave.frame.gradients import bar_gradients
from longwave.frame.hidden import take_hidden
from longwave.frame.keeping import Keeping
from longwave.frame.observe import Needs, Pass, Queries, Step
from longwave.frame.progress import Progress
from longwave.frame.watch import watch, watch_step
from longwave.ops import mass as attention_mass
from longwave.ops.attention.reference import dense_attention, last_attention, step_attention
from longwave.store.tokens import TokenBuffer

GIVEN = ("position", "bias")  # columns that nobody has to observe


class MemoryLayer(Keeping):
    """One attention layer's memory. The base class keeps every token dense; methods override `settle` and more.

    `dense` holds tokens row by row without padding. `rows[b]` counts the real tokens that row b has *seen*;
    `dense.lengths[b]`, and pages if a method has them, are what is *held*. `columns` counts what transformers believes
    is stored, padding included.
    """

    queries: Queries | None  # of the last tokens, where `needs` says so
    heard: Queries | None  # what went into the model's head, in the place of queries: in one layer of a cache
    waiting: list[int]  # the last so many tokens of each row are to be read again before anything settles
    renumbers = False  # whether keys are read at their numbers in the row, whatever positions they came with
    hints = False  # whether remembered queries only hint at something: then no harm is done where a mask hid tokens
    _sources: list[torch.Tensor]  # what was given to `update` with a gradient to follow, until attention asks

    def __init__(self, index: int, needs: Needs | None = None):
        super().__init__()
        self.index, self.needs = index, needs or Needs()
        self.max_tokens: int | None = None  # set, with max_rows, where a byte budget bounds the whole cache
        self.max_rows: int | None = None
        self.planned: torch.dtype | None = None  # of what is stored; None: what comes first
        self.record_past = False
        self.progress = Progress()
        self._clear()

    # what a method overrides

    def join(self, peers: list[MemoryLayer]) -> None:
        """The memory layers of the cache that this one has become part of, itself included."""

    def refuse(self, p: Pass) -> None:
        """Raise for a pass that this layer cannot answer. Called before anything is written."""

    def arrive(self, p: Pass) -> None:
        """Change what a pass brings before it is written: keys that are stored at another position, say."""

    def settle(self) -> None:
        """Compress, evict or merge what is due. Must leave no reference to a forward pass's own tensors.

        It may come later than its pass (see `patience`): what it needs of it is in the store's columns and `queries`.
        """
        self.dense.fit()

    def conclude(self) -> None:
        """Settle a text that all layers of a cache hold whole until the last has concluded, in their order: one that
        was read again (`Needs.again`), or taken over. Methods whose layers share something override it."""
        self.settle()

    def looks(self, rows: list[int]) -> bool:
        """Whether a pass that makes its rows so long is to be read twice (`Needs.look`)."""
        return False

    def seen(self, look: list[Any], new: list[int]) -> None:
        """Take what all layers saw of a pass that brings new[b] tokens of row b, and is read once more now."""

    def patience(self) -> int:
        """Longest forward pass, in tokens, whose `settle` may wait for `crop` while the past is recorded."""
        return 0

    def attend(self, p: Pass) -> torch.Tensor:
        """Answer a pass's queries over everything stored, its own tokens included: as p.q. They are written already."""
        k, v = self.dense.view()
        alike = self.dense.uniform and p.valid is None  # rows end together, with this pass's tokens
        if p.mask is None and p.causal and alike and p.q.shape[2] > 1:
            return last_attention(p.q, k, v, p.scaling)
        visible = None if p.mask is not None else self.visible(p.q.shape[2], p.causal)
        return dense_attention(p.q, k, v, p.scaling, visible, p.mask)

    def log_sum_exp(self, p: Pass) -> torch.Tensor | None:
        """log of the sum that a pass's softmax divides by, float32 [batch, query_heads, tokens], where it covers more
        than the dense tokens; None where it does not."""
        return None

    def lse(self, p: Pass) -> torch.Tensor:
        """`log_sum_exp`, over the dense tokens where those are all."""
        whole = self.log_sum_exp(p)
        if whole is not None:
            return whole
        k, _ = self.dense.view()
        return attention_mass.log_sum_exp(p.q, k.to(p.q.device), p.scaling, self.visible(p.q.shape[2], p.causal))

    def can_drop(self, counts: list[int]) -> None:
        """Raise ValueError if the last counts[b] tokens of row b cannot be removed. Changes nothing."""
        for row, (count, held) in enumerate(zip(counts, self.dense.lengths, strict=True)):
            if count > held:
                raise ValueError(
                    f"cannot remove the last {count} tokens: of row {row} only {held} are still held. "
                    "Keep a copy.deepcopy of the cache to go back to"
                )

    def drop_last(self, counts: list[int]) -> None:
        """Remove the last tokens of each row, which `can_drop` has allowed."""
        self.dense.crop(counts)

    # what a method overrides to decode in storage that stays where it is (longwave/decode)

    def unsteady(self) -> str | None:
        """Why this layer cannot decode in storage of a fixed size, or None if it can."""
        if self.needs.ids:
            return "its method needs to know which tokens come, and steps do not tell"
        return None if type(self) is MemoryLayer else "its method does not say how much storage a step needs"

    def reserve(self, new: int) -> None:
        """Take storage that lasts for `new` more tokens a row, and does not move until `release`."""
        self.dense.reserve(self.dense.longest + new)

    def release(self) -> None:
        """Back to storage that grows."""
        self.dense.release()

    def ripe(self) -> bool:
        """Whether `settle` has something to do between two steps."""
        return False

    def page_counts(self) -> list[int]:
        """Pages of each row, if the method has any."""
        return [0] * self.batch_size

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        """`attend` in reserved storage with one query a row, by what the device knows: no host state is read."""
        k, v = self.dense.tensors()
        return step_attention(p.q, k, v, p.scaling, step.seen)

    def settle_step(self, step: Step) -> None:
        """What a method evicts at every step, on the device."""

    def step_state(self) -> list[torch.Tensor]:
        """What a step changes of storage that earlier tokens lie in: put back after steps that only warm up."""
        return [
            *(held for name, held in self.dense.columns.items() if name != "position"),
            *(self.queries.tensors() if self.queries is not None else ()),
        ]

    def count_steps(self, new: int) -> None:
        """Bring the host's counts of what is held up by `new` steps. A method that evicts in steps overrides it."""
        self.dense.lengths = [length + new for length in self.dense.lengths]

    # what a step does with them

    def run_step(self, p: Pass, step: Step) -> torch.Tensor:
        """One token a row: written, attended from, observed, on the device alone."""
        p.q, p.k, p.v = (x.to(self.dtype) for x in (p.q, p.k, p.v))  # autocast's type may be another
        self.arrive_step(p, step)
        columns = {} if p.positions is None else {"position": p.positions}
        for name in self.dense.columns.keys() - columns:  # tensors: into a captured graph no number is copied
            columns[name] = p.k.new_zeros(p.k.shape[0], 1, dtype=torch.float32)
        self.dense.write_step(step.rows, step.at, p.k, p.v, columns)
        out = self.attend_step(p, step)
        self.observe_step(p, step)
        self.settle_step(step)
        return out

    def observe_step(self, p: Pass, step: Step) -> None:
        """`observe`, by what the device knows."""
        if self.needs.watches:
            k, _ = self.dense.tensors()
            watch_step(self.dense.columns, self.needs, p, k, step)
        if self.queries is not None:
            self.queries.add_step(p.q, step.positions, step.total)

    def arrive_step(self, p: Pass, step: Step) -> None:
        """`arrive`, by what the device knows."""

    def stepped(self, new: int) -> None:
        """The host's counts after `new` steps."""
        self.count_steps(new)
        self.columns += new
        self.rows = [count + new for count in self.rows]
        self._run = [count + new for count in self._run]
        if self.queries is not None:
            self.queries.count_steps(new)

    # what it stands for

    def held(self) -> list[int]:
        """Tokens of each row that are held, in whatever form."""
        return list(self.dense.lengths)

    def by_heads(self, row: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """K and V [1, heads, n, head_dim] of what a row holds dense, not to be written to: those KV heads together that
        hold as many tokens, and which they are."""
        k, v = self.dense.view()
        n = self.dense.lengths[row]
        yield slice(0, k.shape[1]), k[row : row + 1, :, :n], v[row : row + 1, :, :n]

    def answers(self) -> list[str]:
        """What attended over what is stored otherwise than dense, and why; nothing where all is dense."""
        return []

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense K and V this layer stands for, in token order: those of the tokens that it holds.

        Each [batch, kv_heads, tokens, head_dim], tokens = the longest row; shorter rows are followed by zeros, padding
        is not stored. A copy, for tests and plots.
        """
        self._flush()
        if self.dense.k is None:
            raise ValueError("nothing is stored yet")
        k, v = self.dense.view()
        return k.clone(), v.clone()

    def span(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`materialize` of a row's tokens start to stop alone: [kv_heads, stop - start, head_dim] each."""
        k, v = self.dense.view()
        return k[row, :, start:stop], v[row, :, start:stop]

    def parts(self) -> dict[str, list[torch.Tensor]]:
        """Every tensor held, by what it is for."""
        parts = {"dense": [*self.dense.tensors(), *(self._new or ())]}
        if self.dense.columns:
            parts["columns"] = list(self.dense.columns.values())
        if self.queries is not None:
            parts["queries"] = self.queries.tensors()
        if self.heard is not None:
            parts["heard"] = self.heard.tensors()
        return parts

    def move(self, device: torch.device | str) -> None:
        self.progress.check_lent()
        self.dense.move(device)
        for remembered in (self.queries, self.heard):
            if remembered is not None:
                remembered.move(device)

    def select_rows(self, rows: torch.Tensor) -> None:
        self.dense.select(rows)
        for remembered in (self.queries, self.heard):
            if remembered is not None:
                remembered.select(rows)

    # what transformers calls

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.rows = [0] * self.batch_size
        self._run = [0] * self.batch_size
        self.dense = self.empty()
        if self.needs.queries:
            self.queries = Queries(self.needs.queries, self.batch_size, self.needs.every)
        self.is_initialized = True

    def update(  # type: ignore[override]  # attention modules pass on whatever this returns
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        """Take new tokens [batch, kv_heads, t, head_dim], keys after RoPE. They are written when attention asks."""
        given = key_states, value_states
        own = self.check_dtype(value_states)
        key_states, value_states = (x.detach().to(own) for x in given)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"this cache holds a batch of {self.batch_size} but got {key_states.shape[0]} rows: use a new cache, "
                "or cache.reset(), cache.batch_repeat_interleave(n), cache.batch_select_indices(rows)"
            )
        self._check_rows(self.batch_size)
        self._flush()
        self._finish_settling()  # a past that was kept open for `crop` is final once more tokens come
        if self.max_tokens is not None and self.columns + key_states.shape[2] > self.max_tokens:
            raise ValueError(
                f"the byte budget of this cache was computed for {self.max_tokens} tokens and "
                f"{self.columns + key_states.shape[2]} were given: build it with a larger max_tokens"
            )
        self._new = (key_states, value_states)
        self._came = (given[0].element_size(), given[1].element_size())
        self._sources = [x for x in given if x.requires_grad and torch.is_grad_enabled()]
        self.columns += key_states.shape[2]
        handle = Handle(self)
        return handle, handle

    def forward(
        self,
        q: torch.Tensor,
        scaling: float,
        mask: StepMask | torch.Tensor | None = None,
        module: Any = None,
        positions: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer's attention in a forward pass: q [batch, query_heads, queries, head_dim] -> same shape.

        Nothing is differentiated: a backward pass that reaches the answer raises RuntimeError.
        """
        if self._new is None:
            raise RuntimeError(
                "attention was asked twice for one update: models that share K and V between layers are not supported"
            )
        sources, self._sources = [q, *self._sources], []
        with torch.no_grad():
            out = self._answer(q.detach().to(self.dtype), scaling, mask, module, positions, sinks)
        return bar_gradients(out, sources)

    def _answer(
        self,
        q: torch.Tensor,
        scaling: float,
        mask: StepMask | torch.Tensor | None,
        module: Any,
        positions: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        try:
            p = self._open(q, scaling, mask, module, positions, sinks)
        except BaseException:  # refused, or failed before anything was changed: as if it had never been given
            self.columns -= q.shape[2]
            self._new = None
            self.progress.refused(self.index)
            raise
        try:
            self.scaling = scaling
            self.arrive(p)
            self._store(p.k, p.v, p.valid, p.positions)
            out = self.attend(p)
            if p.sinks is not None:
                out = self._share_with_sinks(p, out)
            self.observe(p)
            if self.needs.again and q.shape[2] > 1 and not self._to_be_cropped(q.shape[2]):
                self.waiting = [q.shape[2]] * self.batch_size if p.valid is None else p.valid.sum(-1).tolist()
                self.dense.fit()
            if self.needs.surprise:
                self.progress.unheard = True
            elif not self.waiting:
                self._settle_pass(q.shape[2])
        except BaseException:  # whatever it was, memory included: layers now hold different tokens
            self.progress.broken = True
            raise
        finally:
            if self.index == self.progress.last_memory:
                self.progress.scratch.clear()
                self.progress.mask = None
        return out

    def _to_be_cropped(self, tokens: int) -> bool:
        """Whether a pass of so many tokens waits for `crop`."""
        return self.record_past and tokens <= self.patience()

    def _settle_pass(self, tokens: int) -> None:
        """Settle behind a pass of so many tokens, or leave it to `crop` and the next one."""
        if self.progress.look is not None:  # it is taken back
            return
        if self._to_be_cropped(tokens):
            self._unsettled = True
        else:
            self.settle()

    def hear(self, surprise: list[torch.Tensor]) -> None:
        """Take how little each real token of the pass was expected, float [their number] of each row, and settle unless
        it is read again."""
        column = self.dense.columns["surprise"]
        for row, own in enumerate(surprise):
            end = self.dense.lengths[row]
            column[row, :, end - len(own) : end] = own
        tokens = max(map(len, surprise)) if self._valid is None else self._valid.shape[1]
        if not self.waiting:
            with own_arithmetic(self.device.type):
                self._settle_pass(tokens)

    def remember(self, hidden: torch.Tensor) -> None:
        """Of what goes into the model's head, [batch, tokens, hidden_size], what `needs` says."""
        if self.heard is None:
            self.heard = Queries(self.needs.surprise, self.batch_size)
        self.heard.add(
            hidden[:, None], torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device), self._valid
        )

    def _open(
        self,
        q: torch.Tensor,
        scaling: float,
        mask: StepMask | torch.Tensor | None,
        module: Any,
        positions: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> Pass:
        """The pass, with everything refused that can be refused. Changes nothing."""
        assert self._new is not None
        self.progress.check_lent()
        k, v = self._new
        p = Pass(q, k, v, scaling, module=module, positions=positions, rotary=self.progress.rotary, sinks=sinks)
        p.phase = "prompt" if not any(self.rows) else "step" if q.shape[2] == 1 else "chunk"
        if isinstance(mask, torch.Tensor):
            mask = self._plain(mask)
        if isinstance(mask, StepMask):
            p.causal, p.valid = mask.causal, self._read_padding(mask)
        elif mask is not None:
            p.mask = self._check_own_mask(mask, q)
            if sinks is not None:
                raise NotImplementedError(
                    "what this model's learned sinks take of attention under a 4D mask is not known: pass a 2D mask"
                )
            if self.needs.watches or self.needs.again or (self.needs.queries and not self.hints):
                raise NotImplementedError(
                    "this method watches what attention reads, which a 4D attention mask hides from it: pass a 2D mask"
                )
        if self.needs.again and q.shape[2] > 1 and not self._to_be_cropped(q.shape[2]) and self.progress.given is None:
            raise ValueError(
                "these tokens are to be read twice, and only the model that the cache was built on does that by "
                "itself: longwave.cache(model, ...), then model(...) or model.generate(...) of that very model"
            )
        if self.needs.hidden:
            p.hidden = take_hidden(module)
        if self.needs.surprise and self.progress.ids is None:
            raise ValueError(
                "what this model expects is not heard, and the cache's method judges tokens by it: the cache came "
                "without its model, so build it with longwave.cache on the very model that uses it"
            )
        if self.needs.ids and (self.progress.ids is None or self.progress.ids.shape != (k.shape[0], k.shape[2])):
            raise ValueError(
                "which tokens these are is not known, and the cache's method needs it: pass input_ids, not embeddings, "
                "to the very model that the cache was built on"
            )
        if self.needs.unrotated:
            p.known_positions()
        if p.rotary is not None:
            p.rotary.rotates(module)  # an error where the model is not the one that the cache was built for
        self._check_rotation(q.shape[2], p.valid)
        self.refuse(p)
        self.check_finite(k, v, p.valid)
        return p

    def _share_with_sinks(self, p: Pass, out: torch.Tensor) -> torch.Tensor:
        """Learned sinks add to what the softmax divides by, and nothing to the answer."""
        assert p.sinks is not None
        alone = self.lse(p) if p.lse is None else p.lse
        p.lse = torch.logaddexp(alone, p.sinks.to(alone.dtype)[:, None])
        return (out * torch.exp(alone - p.lse)[..., None]).to(out.dtype)

    def write(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor | None = None,
        columns: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Store new tokens dense, without a pass. `valid` [batch, t] marks the real ones, None means all; columns: what
        is known of them, [batch, 1 or kv_heads, t]."""
        self.progress.check_lent()
        self.check_dtype(v)
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        self.check_finite(k, v, valid)
        if self._new is None:  # called directly, not through `update`
            self.columns += k.shape[2]
        try:
            self._store(k, v, valid, None, columns)
        except BaseException:
            self.progress.broken = True
            raise

    def _store(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor | None,
        positions: torch.Tensor | None,
        columns: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._new = None
        self._valid = valid
        self._before = list(self.dense.lengths)
        given = dict(columns or {})
        if self.needs.positions and "position" not in given:
            given["position"] = self.positions_of(k, valid, positions)[:, None]
        if self.needs.ids and "token" not in given:
            if self.progress.ids is None:
                raise ValueError("which tokens these are is not known, and the cache's method needs it")
            given["token"] = self.progress.ids[:, None].to(k.device)
        self.dense.append(k, v, valid, given)
        counts = [k.shape[2]] * self.batch_size if valid is None else valid.sum(-1).tolist()
        self.rows = [row + count for row, count in zip(self.rows, counts, strict=True)]
        self._beyond = self.progress.switch is not None and max(self.rows) > self.progress.switch
        self._run = [
            run + count if count == k.shape[2] else self._trailing(valid, row)
            for row, (run, count) in enumerate(zip(self._run, counts, strict=True))
        ]

    def positions_of(self, k: torch.Tensor, valid: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        """Positions int64 [batch, t] of new tokens: the model's where it says them, else their number in the row."""
        if positions is not None:
            return positions.expand(k.shape[0], -1).to(k.device)
        if valid is None:
            return _counted(self.rows, k.shape[2], k.device)
        return torch.tensor(self.rows, device=k.device)[:, None] + (valid.cumsum(-1) - 1).clamp(min=0)

    def observe(self, p: Pass) -> None:
        """Remember of a pass what `needs` asks for. Its tokens are written, and nothing is settled yet."""
        if self.needs.watches:
            k, _ = self.dense.view()
            lse = self.log_sum_exp(p) if p.lse is None else p.lse
            watch(self.dense.columns, self.needs, p, k, self.visible(p.q.shape[2], p.causal), lse)
        if self.queries is not None:
            self.queries.add(p.q, self._positions_before(p), p.valid)

    def _positions_before(self, p: Pass) -> torch.Tensor:
        """Positions of a pass that is stored already."""
        if p.positions is not None:
            return p.known_positions()
        if p.valid is None:
            return _counted([row - p.q.shape[2] for row in self.rows], p.q.shape[2], p.q.device)
        ends = torch.tensor(self.rows, device=p.q.device)[:, None]
        return ends - p.valid.sum(-1, keepdim=True) + (p.valid.cumsum(-1) - 1).clamp(min=0)

    def adopt(self, source: MemoryLayer) -> None:
        """Take over what a dense layer has read and seen, as if this one had read it itself. Rows may differ."""
        with own_arithmetic(source.device.type):
            self._adopt(source)

    def _adopt(self, source: MemoryLayer) -> None:
        missing = [name for name in self.needs.columns() if name not in source.dense.columns and name not in GIVEN]
        asked = self.needs.queries and not (source.queries is not None and source.queries.covers(self.needs))
        if missing or asked:
            raise ValueError(
                "this method needs what the dense cache has not observed while it read "
                f"({', '.join(missing) or f'{self.needs.queries} queries'}): prefill(model, ids, mask, needs)"
            )
        columns = {name: source.dense.column(name) for name in self.needs.columns() if name in source.dense.columns}
        self.take(*source.materialize(), source.rows, source.scaling, columns, source.queries)
        if self.needs.surprise and source.heard is not None:
            self.heard = source.heard.last(self.needs.surprise, 1)

    def take(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: list[int],
        scaling: float,
        columns: Mapping[str, torch.Tensor],
        queries: Queries | None,
    ) -> None:
        """Hold a prompt whose K and V [batch, kv_heads, tokens, head_dim], rotated, are known, as if it had been read.

        Row b has the first rows[b] tokens. columns: what is known of them, [batch, kv_heads, tokens]; without
        "position" they are counted in the row. queries: that cover what this layer needs, None where it needs none.
        """
        valid = None
        if len(set(rows)) > 1:
            valid = torch.arange(k.shape[2], device=k.device) < torch.tensor(rows, device=k.device)[:, None]
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        positions = columns["position"][:, 0].long() if "position" in columns else self.positions_of(k, valid, None)
        p = Pass(k[:, :0], k, v, scaling, valid=valid, positions=positions, phase="prompt")
        p.rotary = self.progress.rotary
        if p.rotary is not None:  # keys come rotated, and may have to lie otherwise
            p.module = p.rotary.module_of(self.index)
        self.arrive(p)
        self.write(p.k, p.v, valid, columns)
        if self.needs.queries:
            assert queries is not None
            self.queries = queries.last(self.needs.queries, self.needs.every)
        self.scaling = scaling
        try:
            self.conclude()
        except BaseException:
            self.progress.broken = True
            raise

    # inside

    def _clear(self) -> None:
        self.is_initialized = False
        self.columns = 0
        self.rows = []
        self.dense = TokenBuffer(0)
        self.queries = self.heard = None
        self._run = []
        self._new = self._valid = None
        self._sources = []
        self._came = None
        self._before = []
        self._unsettled = self._beyond = self.record_past = False
        self.waiting = []
        self.scaling = 1.0  # of the scores, as the last pass had it
        if hasattr(self, "batch_size"):
            del self.batch_size

    def _flush(self) -> None:
        """Tokens given to `update` whose attention was never asked: store them as they are."""
        self.progress.check_lent()
        if self._new is not None:
            self.write(*self._new)
            self._unsettled = True

    def visible(self, queries: int, causal: bool) -> torch.Tensor | None:
        """How many dense tokens each query of the last `write` may see: [batch, queries], None if all."""
        uniform = self.dense.uniform and self._valid is None
        if uniform and (queries == 1 or not causal):
            return None
        device = self.device
        if not causal:
            return torch.tensor(self.dense.lengths, device=device)[:, None].expand(-1, queries)
        if self._valid is None:
            return _counted([before + 1 for before in self._before], queries, device)
        return torch.tensor(self._before, device=device)[:, None] + self._valid.cumsum(-1)


def _counted(first: list[int], count: int, device: torch.device) -> torch.Tensor:
    """int64 [rows, count], each row's from its first on. Rows that are alike need nothing sent, which would wait for a
    GPU."""
    if len(set(first)) == 1:
        return torch.arange(first[0], first[0] + count, device=device).expand(len(first), -1)
    return torch.tensor(first, device=device)[:, None] + torch.arange(count, device=device)
