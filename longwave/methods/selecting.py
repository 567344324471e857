"""Methods that keep every token and read some of them: the full cache stays, on the device or in host memory.

Tokens lie in *chunks*; a method keeps a summary of each and says, for a step's query, which chunks are worth reading. A
prompt, and every pass of several tokens, reads all.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from longwave.checks import whole
from longwave.frame import MemoryLayer, Pass, Step
from longwave.methods import host
from longwave.methods.base import CacheShape, Method
from longwave.ops.attention.reference import group_heads, subset_attention, subset_log_sum_exp
from longwave.plan.profile import Profile
from longwave.store.state import State, demand
from longwave.store.tokens import TokenBuffer, capacity, writable


@dataclass(frozen=True)
class Selecting(Method):
    """Options that all selecting methods share.

    chunk: tokens that are read together. sinks, window: first and last tokens, always read. full_layers: the first so
        many memory layers read everything. host: True or a directory: keys and values lie in host memory, or in mapped
        files there, summaries on the device.

    Its budget is the share of the middle that a step reads; all of it is held.
    """

    steps_alone: ClassVar[bool] = True
    summaries: ClassVar[int] = 0  # numbers a channel and chunk that the method keeps

    chunk: int = 16
    sinks: int = 4
    window: int = 64
    full_layers: int = 0
    host: bool | str = False

    def __post_init__(self) -> None:
        whole("chunk", self.chunk, 1, "tokens")
        whole("sinks", self.sinks, 0, "tokens")
        whole("window", self.window, 1, "tokens")
        whole("full_layers", self.full_layers, 0, "layers")
        host.check_option(self.host)

    @abstractmethod
    def summarise(self, k: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Summary of chunks: k [batch, kv_heads, chunks, chunk, head_dim], of which tokens real [batch, 1, chunks,
        chunk] count -> [batch, kv_heads, chunks, summaries, head_dim] in k's dtype."""

    @abstractmethod
    def worth(self, q: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """What reading each chunk is worth to a query: q [batch, kv_heads, group, head_dim] and summary as above ->
        float [batch, kv_heads, chunks]."""

    def check(self, device: torch.device) -> None:
        host.check_host(self.host, device)

    def near(self) -> Selecting:
        return replace(self, host=False)

    def fits_budget(self) -> bool:
        return False  # whatever it is, all is held

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> SelectingBound:
        return SelectingBound(self, shape, budget, share=0.25 if budget is None else budget)


@dataclass(frozen=True, eq=False)
class SelectingBound(host.HostBound):
    """share: of the middle's tokens, what a step reads."""

    method: Selecting
    share: float = 1.0

    def __str__(self) -> str:
        m = self.method
        where = f", in {host.where(m.host)}" if m.host else ""
        return f"{m.name}(reads {self.share:.3f} of the middle, chunks of {m.chunk}, window={m.window}{where})"

    def every(self, held: int) -> int:
        """Chunks that a row of `held` tokens has room for."""
        return -(-capacity(held) // self.method.chunk)

    def chunks(self, held: int) -> int:
        """Chunks that a step reads of a row of `held` tokens: all that sinks and window touch, and a share of the
        rest."""
        m = self.method
        every, first = -(-held // m.chunk), -(-m.sinks // m.chunk)
        between = max(0, min(every, max(0, held - m.window) // m.chunk) - first)
        return every - between + math.floor(self.share * between)

    def chunks_step(self, held: torch.Tensor) -> torch.Tensor:
        """The same of int64 tensors, on their device."""
        m = self.method
        every, first = (held + m.chunk - 1) // m.chunk, -(-m.sinks // m.chunk)
        between = (torch.minimum(every, (held - m.window).clamp(min=0) // m.chunk) - first).clamp(min=0)
        return every - between + torch.floor(between.double() * self.share).long()

    def layer(self, index: int) -> MemoryLayer:
        return SelectingLayer(index, self)

    def layer_bytes(self, index: int, tokens: int) -> int:
        shape, m = self.shape, self.method
        each = shape.kv_heads * shape.head_dim * shape.dtype.itemsize * m.summaries
        reads = 0 if shape.memory_layers.index(index) < m.full_layers else self.every(tokens) * each
        return capacity(tokens) * shape.token_bytes + reads


class SelectingLayer(MemoryLayer):
    """All tokens dense, and a summary of each chunk of every row and head."""

    def __init__(self, index: int, bound: SelectingBound):
        super().__init__(index, bound.needs)
        self.bound, self.method = bound, bound.method
        self.full = bound.shape.memory_layers.index(index) < bound.method.full_layers or bound.share >= 1

    def _clear(self) -> None:
        super()._clear()
        self.summary: torch.Tensor | None = None  # [batch, kv_heads, chunks of the capacity, summaries, head_dim]
        self._known: list[int] = []  # tokens of each row that the summary covers

    # storage

    def empty(self) -> TokenBuffer:
        return host.tokens(self.method.host, self.batch_size, self.needs.columns())

    def mapped(self) -> list[torch.Tensor]:
        return host.mapped(self.method.host, self.dense)

    def settle(self) -> None:
        device = self.device if self.summary is None else self.summary.device
        if not self.full:
            self._summarise(self._known or [0] * self.batch_size, device)
        self.dense.fit()

    def _summarise(self, known: list[int], device: torch.device) -> None:
        """Make the chunks anew that got tokens since `known`."""
        chunk, lengths = self.method.chunk, self.dense.lengths
        every = self.bound.every(self.dense.longest)
        if self.summary is not None and known == lengths and self.summary.shape[2] == every:
            return
        first = min(known) // chunk
        k = self.dense.k
        assert k is not None
        part = k[:, :, first * chunk : self.dense.longest].to(device)
        part = torch.nn.functional.pad(part, (0, 0, 0, -part.shape[2] % chunk))
        part = part.unflatten(2, (part.shape[2] // chunk, chunk))
        place = torch.arange(first * chunk, first * chunk + part.shape[2] * chunk, device=device).view(-1, chunk)
        real = (place < torch.tensor(lengths, device=device)[:, None, None])[:, None]
        fresh = self.method.summarise(part, real)
        made = self.summary
        if made is None or made.shape[2] != every or not writable(made):
            made = fresh.new_zeros(*fresh.shape[:2], every, *fresh.shape[3:])
            if self.summary is not None:
                made[:, :, :first] = self.summary[:, :, :first]
        made[:, :, first : first + fresh.shape[2]] = fresh
        self.summary, self._known = made, list(lengths)

    def parts(self) -> dict[str, list[torch.Tensor]]:
        dense = host.where(self.method.host) or "dense"
        parts = {dense if name == "dense" else name: tensors for name, tensors in super().parts().items()}
        return parts if self.summary is None else {**parts, "summaries": [self.summary]}

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        if self.summary is not None:
            self.summary = self.summary.to(device)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self._known = [self._known[row] for row in rows.tolist()] if self._known else []
        if self.summary is not None:
            self.summary = self.summary.index_select(0, rows.to(self.summary.device))
            self.summary = self.summary[:, :, : self.bound.every(self.dense.longest)].clone()

    def drop_last(self, counts: list[int]) -> None:
        super().drop_last(counts)
        if self.summary is None:
            return
        chunk = self.method.chunk  # one that lost tokens is made anew
        self._known = [
            known if known <= length else length // chunk * chunk
            for known, length in zip(self._known, self.dense.lengths, strict=True)
        ]
        self._summarise(self._known, self.summary.device)

    def state(self) -> State:
        made = super().state()
        known = {} if self.summary is None else {"summary": self.summary}
        return made and {**made, **known, "known": list(self._known)}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        if state:
            self.summary, self._known = state.get("summary"), list(state["known"])
            if self.summary is not None and self.dense.k is not None:
                shape = [*self.dense.k.shape[:2], self.method.summaries, self.dense.k.shape[3]]
                found = [*self.summary.shape[:2], *self.summary.shape[3:]]
                demand(found == shape and self.summary.dtype == self.dtype, f"summaries are {list(self.summary.shape)}")
                demand(len(self._known) == self.batch_size, f"{len(self._known)} rows of {self.batch_size} are known")

    # attention

    def attend(self, p: Pass) -> torch.Tensor:
        if p.phase != "step" or self.full or not p.causal or p.mask is not None or self.summary is None:
            k, v = self.dense.k, self.dense.v
            if k is None or k.device == p.q.device:
                return super().attend(p)
            self.dense.k, self.dense.v = k.to(p.q.device), self.dense.v.to(p.q.device)  # type: ignore[union-attr]
            try:
                return super().attend(p)
            finally:
                self.dense.k, self.dense.v = k, v
        self._summarise(self._known, self.summary.device)
        lengths = torch.tensor(self.dense.lengths, device=p.q.device)
        allowed = torch.tensor([self.bound.chunks(n) for n in self.dense.lengths], device=p.q.device)
        k, v = self.dense.view()
        return self._read(p, k, v, self.summary, lengths, allowed, max(map(self.bound.chunks, self.dense.lengths)))

    def _read(
        self,
        p: Pass,
        k: torch.Tensor,
        v: torch.Tensor,
        summary: torch.Tensor,
        lengths: torch.Tensor,
        allowed: torch.Tensor,
        most: int,
    ) -> torch.Tensor:
        """One query a row over the allowed[b] chunks that are worth most to it, at most `most`."""
        chunk = self.method.chunk
        start = torch.arange(summary.shape[2], device=p.q.device) * chunk
        worth = self.method.worth(group_heads(p.q, k.shape[1]), summary).float()
        always = (start < self.method.sinks) | (start + chunk > (lengths - self.method.window)[:, None])
        worth = worth.masked_fill(always[:, None], float("inf"))
        worth = worth.masked_fill((start >= lengths[:, None])[:, None], float("-inf"))
        # [batch, kv_heads, most]; of equals the earlier one, on every device (topk does not say)
        chosen = worth.argsort(dim=-1, descending=True, stable=True)[..., :most]
        place = chosen[..., None] * chunk + torch.arange(chunk, device=chosen.device)
        rank = torch.arange(chosen.shape[-1], device=chosen.device)
        seen = (rank < allowed[:, None])[:, None, :, None] & (place < lengths[:, None, None, None])
        place = place.flatten(2).clamp(max=k.shape[2] - 1)
        where = place.to(k.device)[..., None].expand(*place.shape, k.shape[3])
        read_k, read_v = (x.gather(2, where).to(p.q.device) for x in (k, v))
        if p.sinks is not None:
            p.lse = subset_log_sum_exp(p.q, read_k, p.scaling, seen.flatten(2))
        return subset_attention(p.q, read_k, read_v, p.scaling, seen.flatten(2))

    # steps

    def unsteady(self) -> str | None:
        return f"keys and values lie in {host.where(self.method.host)}" if self.method.host else None

    def reserve(self, new: int) -> None:
        super().reserve(new)
        # a chunk more is never fewer to read, a token more may be
        self._most = max(
            self.bound.chunks(at)
            for n in self.dense.lengths
            for at in range(max(n, n + new - self.method.chunk + 1), n + new + 1)
        )
        if self.summary is not None:
            every = self.bound.every(self.dense.longest + new)
            made = self.summary.new_zeros(*self.summary.shape[:2], every, *self.summary.shape[3:])
            made[:, :, : self.summary.shape[2]] = self.summary
            self.summary = made

    def release(self) -> None:
        super().release()
        if self.summary is not None:
            self._summarise([0] * self.batch_size, self.summary.device)

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        if self.full or self.summary is None:
            return super().attend_step(p, step)
        k, v = self.dense.tensors()
        chunk, lengths = self.method.chunk, step.seen[:, 0].long()
        place = (step.at // chunk * chunk)[:, None] + torch.arange(chunk, device=k.device)
        real = (place < lengths[:, None])[:, None, None]
        here = k[step.rows[:, None], :, place.clamp(max=k.shape[2] - 1)].transpose(1, 2)[:, :, None]
        self.summary[step.rows, :, step.at // chunk] = self.method.summarise(here, real)[:, :, 0]
        return self._read(p, k, v, self.summary, lengths, self.bound.chunks_step(lengths), self._most)
