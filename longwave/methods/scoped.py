"""Methods that keep every token and let attention read a number of them that does not grow, at positions that do not.

Keys lie as they were before rotation. A row is read in *stretches*: tokens that choose together what they read, in
every layer anew. A short row is read whole, as the model does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import PreTrainedModel

from longwave.frame import MemoryLayer, Needs, Pass, Step
from longwave.methods import host
from longwave.methods.base import Bound, CacheShape, Method
from longwave.ops.pieces import Coming, Made
from longwave.plan.profile import Profile
from longwave.shape import context_limit
from longwave.store.tokens import TokenBuffer, capacity


@dataclass(frozen=True)
class Scoped(Method):
    """What they share: no budget decides anything, since all is held; 1 reads all.

    host: True: keys and values lie in host memory, where the model is elsewhere. A directory: in files there, that are
        mapped into memory and end with the cache.
    """

    learns: ClassVar[bool] = True
    alone: ClassVar[int] = 16  # tokens of a row that choose one by one, as steps do, where a pass brings no more
    uses: ClassVar[str]  # "reads {} tokens at once (...)": how it comes to its positions
    fewer: ClassVar[str]  # what would make them fewer

    host: bool | str = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        host.check_option(self.host)

    def check(self, device: torch.device) -> None:
        host.check_host(self.host, device)

    @property
    @abstractmethod
    def chunk(self) -> int:
        """Tokens of a prompt that choose together."""

    @property
    @abstractmethod
    def positions(self) -> int:
        """Positions that attention uses at most, however long the text is."""

    @property
    @abstractmethod
    def plain(self) -> int:
        """Tokens up to which a row is read whole and at its own positions."""

    @property
    def takes(self) -> int:
        """Tokens up to which it can take over what a dense cache has read."""
        return self.plain

    def known(self, model: PreTrainedModel, shape: CacheShape, tokenizer: Any) -> Method:
        limit = context_limit(model)
        if limit is not None and self.positions > limit:
            raise ValueError(
                f"{self.name} {self.uses.format(f'{self.positions:,}')}, and this model knows {limit:,} positions: "
                f"give {self.fewer}"
            )
        return self

    def near(self) -> Scoped:
        return replace(self, host=False)

    def fits_budget(self) -> bool:
        return False  # whatever it is, all is held

    @abstractmethod
    def bound(self, shape: CacheShape, budget: float | None) -> ScopedBound:
        """`bind`, of a budget that is 1 or left out."""

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> Bound:
        if budget is not None and self.host:
            raise ValueError(f"what is read whole is on the device: leave budget={budget:g} or host={self.host!r} out")
        if budget is not None and budget < 1:
            raise ValueError(
                f"{self.name} keeps everything, so its budget is 1; got {budget}. What is read of it is a number of "
                "tokens, which its options say"
            )
        return self.bound(shape, budget)


@dataclass(frozen=True, eq=False)
class ScopedBound(host.HostBound):
    method: Scoped

    @property
    def whole(self) -> bool:
        """Whether all is read: then everything is dense."""
        return self.budget is not None

    @property
    def needs(self) -> Needs:
        return Needs(unrotated=not self.whole)

    @property
    def reads_exactly(self) -> bool:
        return self.whole

    def reach(self, limit: int) -> int | None:
        return limit if self.whole else None

    @abstractmethod
    def reads(self) -> str:
        """What is read, for whoever prints it."""

    @abstractmethod
    def reading(self, index: int) -> ScopedLayer:
        """`layer`, where not all is read."""

    def beside(self, tokens: int) -> int:
        """Bytes that a layer holds for one row of `tokens` beside K and V."""
        return 0

    def __str__(self) -> str:
        where = f", in {host.where(self.method.host)}" if self.method.host else ""
        return f"{self.method.name}(reads {'everything' if self.whole else self.reads()}{where})"

    def layer(self, index: int) -> MemoryLayer:
        return MemoryLayer(index) if self.whole else self.reading(index)

    def layer_bytes(self, index: int, tokens: int) -> int:
        return capacity(tokens) * self.shape.token_bytes + (0 if self.whole else self.beside(tokens))


class Stretch(NamedTuple):
    """Tokens start to stop - 1 of a row."""

    row: int
    start: int
    stop: int


class ScopedLayer(MemoryLayer):
    """All tokens dense, their keys un-rotated, wherever they lie: see `Scoped.host`."""

    method: Scoped

    renumbers = True

    def __init__(self, index: int, bound: ScopedBound):
        super().__init__(index, bound.needs)
        self.bound, self.method = bound, bound.method

    @abstractmethod
    def read(
        self,
        p: Pass,
        number: torch.Tensor,
        stop: torch.Tensor,
        longest: int,
        asks: torch.Tensor | None = None,
        square: bool = False,
    ) -> torch.Tensor:
        """Answers to queries that choose together: p.q of row b's tokens number[b], int64 [batch, queries], of which
        the first stop[b] <= longest are seen. asks: which are there. square: all tokens of all rows ask. With p.sinks
        it sets p.lse.

        No shape depends on what the device knows.
        """

    def turns(self, rows: list[list[tuple[int, int]]]) -> Iterator[list[Stretch]]:
        """What is read together of the stretches of each row: the first ones of all rows, then the second ones."""
        for turn in zip_longest(*rows, fillvalue=(0, 0)):
            yield [Stretch(row, *ends) for row, ends in enumerate(turn)]

    def read_turn(
        self, p: Pass, turn: list[Stretch], number: torch.Tensor, stop: torch.Tensor, asks: torch.Tensor
    ) -> torch.Tensor:
        """Answers to a turn's stretches: p.q and all else has a row for each of them. `read` wants one of each row."""
        alike = len({(s.start, s.stop) for s in turn}) == 1
        return self.read(p, number, stop, max(s.stop for s in turn), asks, alike and not turn[0].start)

    @property
    def alone(self) -> int:
        """Tokens of a row that choose one by one, where a pass brings no more."""
        return self.method.alone

    def ahead(self, starts: list[int]) -> None:
        """What has to be known before stretches that begin at token starts[b] of row b are read."""

    def taken(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, un-rotated, and values of row b's tokens index [batch, n]: [batch, kv_heads, n, head_dim] each."""
        where = self.dense.k.device  # type: ignore[union-attr]
        rows, there = torch.arange(index.shape[0], device=where)[:, None], index.to(where)
        k, v = (x[rows, :, there].transpose(1, 2) for x in self.dense.tensors())  # on a CPU half of what `gather` takes
        return k.to(index.device), v.to(index.device)

    def stored_keys(self, tokens: int) -> torch.Tensor | Made | Coming:
        """The first `tokens` keys of every row, un-rotated, [batch, kv_heads, tokens, head_dim], wherever they lie."""
        return next(self.dense.tensors())[:, :, :tokens]

    def whole(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys, un-rotated, and values of every row, [batch, kv_heads, n, head_dim] each, on the device."""
        k, v = (x.to(device) for x in self.dense.tensors())
        return k, v

    @property
    def starts(self) -> list[int]:
        """Tokens of each row before the pass that is read."""
        held = zip(self.rows, self.dense.lengths, self._before, strict=True)
        return [seen - (now - before) for seen, now, before in held]

    def empty(self) -> TokenBuffer:
        return host.tokens(self.method.host, self.batch_size, self.needs.columns())

    def parts(self) -> dict[str, list[torch.Tensor]]:
        dense = host.where(self.method.host) or "dense"
        return {dense if name == "dense" else name: tensors for name, tensors in super().parts().items()}

    def mapped(self) -> list[torch.Tensor]:
        return host.mapped(self.method.host, self.dense)

    def refuse(self, p: Pass) -> None:
        if p.causal and p.mask is None:
            return
        new = [p.q.shape[2]] * self.batch_size if p.valid is None else p.valid.sum(-1).tolist()
        longest = max(row + more for row, more in zip(self.rows, new, strict=True))
        if longest > self.method.plain:
            what = "a 4D attention mask" if p.causal else "is_causal=False"
            raise NotImplementedError(
                f"{what} goes over tokens that are not read: of {longest:,} {self.method.name} reads "
                f"{self.method.plain:,}. Pass a 2D mask and leave is_causal out"
            )

    def arrive(self, p: Pass) -> None:
        p.k = p.unrotated()

    def _adopt(self, source: MemoryLayer) -> None:
        if max(source.rows) > self.method.takes:
            raise ValueError(
                f"{self.method.name} reads a prompt of more than {self.method.takes:,} tokens otherwise than a dense "
                "cache does, so it cannot take over what that has read: let the model read the prompt into it"
            )
        super()._adopt(source)

    # attention

    def attend(self, p: Pass) -> torch.Tensor:
        if max(self.rows) > self.method.plain:
            return self.attend_in_stretches(p)
        before = torch.tensor(self.starts, device=p.q.device)[:, None]
        real = torch.ones_like(p.q[:, 0, :, 0], dtype=torch.long) if p.valid is None else p.valid.long()
        place = before + (real.cumsum(-1) - 1).clamp(min=0)
        turned = replace(p, q=p.rotary.shift(p.module, p.q, p.known_positions(), place))
        with self._turned(p):  # a row that is read whole is no longer than what is read of any
            out = MemoryLayer.attend(self, turned)
            if p.sinks is not None:
                p.lse = self.lse(turned)
        return out

    @contextmanager
    def _turned(self, p: Pass) -> Iterator[None]:
        """In here the stored keys are rotated to their places in the row, and all lies on the device."""
        held, before = self.dense, self._before
        k, v = self.whole(p.q.device)
        self._before, self.dense = self.starts, TokenBuffer(self.batch_size)
        self.dense.k, self.dense.v, self.dense.lengths = at_places(p, k), v, list(self.rows)
        try:
            yield
        finally:
            self.dense, self._before = held, before

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """How a row reads the tokens from start to stop that a pass brings: those that are read plainly at once, then
        borders at multiples of the chunk, wherever passes end."""
        step = 1 if stop - start <= self.alone else self.method.chunk
        border = self.method.plain // step * step
        while start < stop:
            border = max(border, (start // step + 1) * step)
            yield start, min(border, stop)
            start = border

    def attend_in_stretches(self, p: Pass) -> torch.Tensor:
        """`attend`, by stretches of each row, in `turns`."""
        device, tokens = p.q.device, p.q.shape[2]
        before = torch.tensor(self.starts, device=device)[:, None]
        rows = [list(self.stretches(*ends)) for ends in zip(self.starts, self.rows, strict=True)]
        order = torch.arange(tokens, device=device).expand(p.q.shape[0], -1)  # columns of a row's real tokens
        if p.valid is not None:
            order = torch.argsort((~p.valid).byte(), dim=-1, stable=True)
        out = torch.zeros_like(p.q)
        if p.sinks is not None:
            wide = torch.float64 if p.q.dtype == torch.float64 else torch.float32
            p.lse = torch.zeros(p.q.shape[:3], dtype=wide, device=device)
        for turn in self.turns(rows):
            who, start, stop = torch.tensor([(s.row, s.start, s.stop) for s in turn], device=device).T
            self.ahead([s.start for s in turn])
            rank = torch.arange(max(s.stop - s.start for s in turn), device=device)
            asks = rank < (stop - start)[:, None]
            own = who[:, None]
            column = order[own, (start[:, None] - before[who] + rank).clamp(0, tokens - 1)]
            part = replace(p, q=p.q[own, :, column].transpose(1, 2), positions=p.known_positions()[own, column])
            answer = self.read_turn(part, turn, start[:, None] + rank, stop, asks)
            if len({s.stop - s.start for s in turn}) == 1:
                out[own, :, column] = answer.transpose(1, 2)
                if p.lse is not None and part.lse is not None:
                    p.lse[own, :, column] = part.lse.transpose(1, 2)
                continue
            n, number = asks.nonzero(as_tuple=True)
            out[who[n], :, column[n, number]] = answer[n, :, number]
            if p.lse is not None and part.lse is not None:
                p.lse[who[n], :, column[n, number]] = part.lse[n, :, number]
        return out

    # steps

    def unsteady(self) -> str | None:
        return f"keys and values lie in {host.where(self.method.host)}" if self.method.host else None

    def arrive_step(self, p: Pass, step: Step) -> None:
        self.arrive(p)

    def attend_step(self, p: Pass, step: Step) -> torch.Tensor:
        assert self.dense.k is not None
        stop = step.seen[:, 0].long()
        return self.read(p, stop[:, None] - 1, stop, self.dense.k.shape[2])


def at_places(p: Pass, k: torch.Tensor) -> torch.Tensor:
    """Keys [batch, kv_heads, n, head_dim] rotated to 0, 1, 2 ..."""
    return p.rotary.rotate(p.module, k, torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1))
