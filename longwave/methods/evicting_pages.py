"""Evicting over pages: of the tokens that leave the window some survive, and these become a page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from longwave.frame import MemoryLayer, Needs
from longwave.methods.held import held_by, rising
from longwave.methods.segmented import SegmentedBound, SegmentedLayer


@dataclass(frozen=True, eq=False)
class PagedBound(SegmentedBound):
    """inner: the pages. fraction: the budget, None where every token is kept."""

    method: Any
    inner: SegmentedBound | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        assert self.inner is not None
        page = self.inner.page_fraction()
        segment = self.inner.dense_tokens[2]
        span = segment
        if self.fraction is not None and self.fraction < 1:
            if self.fraction > page:
                raise ValueError(
                    f"a budget of {self.fraction:g} is more than the store's pages take with every token in them "
                    f"({page:.3f}): nothing would be evicted. Give less, or a store of more bits"
                )
            span = math.ceil(segment * page / self.fraction)
        object.__setattr__(self, "plan", self.inner.plan)
        object.__setattr__(self, "basis", self.inner.basis)
        object.__setattr__(self, "warn", self.inner.warn)
        object.__setattr__(self, "_span", span)

    def decisions(self) -> Iterator[bytes]:
        assert self.inner is not None
        yield self.inner.digest.encode()
        yield str(self.span).encode()

    @property
    def dense_tokens(self) -> tuple[int, int, int]:
        assert self.inner is not None
        return self.method.sinks, self.method.window, self.inner.dense_tokens[2]

    @property
    def span(self) -> int:
        return self._span  # type: ignore[attr-defined]

    @property
    def needs(self) -> Needs:
        assert self.inner is not None
        return self.method.needs() | self.inner.needs

    def __str__(self) -> str:
        assert self.inner is not None
        segment = self.inner.dense_tokens[2]
        return f"{self.method.name}({segment / self.span:.3f} of the middle, in {self.inner})"

    def layout(self, position: int) -> Any:
        assert self.inner is not None
        return self.inner.layout(position)

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        assert self.inner is not None
        return self.inner._sizes

    def store_bytes(self, index: int, pages: int) -> int:
        assert self.inner is not None
        return self.inner.store_bytes(index, pages)

    def shared_bytes(self, index: int, tokens: int) -> int:
        assert self.inner is not None
        return self.inner.shared_bytes(index, tokens) if self.absorbed(tokens) else 0

    def new_store(self, position: int, batch: int, device: torch.device) -> Any:
        assert self.inner is not None
        return self.inner.new_store(position, batch, device)

    def prepare(self, layer: SegmentedLayer, rows: slice) -> None:
        assert self.inner is not None
        self.inner.prepare(layer, rows)

    def layer(self, index: int) -> MemoryLayer:
        return PagedLayer(index, self)


class PagedLayer(SegmentedLayer):
    """Of `span` middle tokens a segment's worth survives, and becomes a page."""

    bound: PagedBound
    hints = False
    _kept: torch.Tensor | None = None  # which of the dense tokens go into pages, while they settle

    def due(self, row: int) -> int:
        return self.bound.absorbed(self.dense.lengths[row])

    def chosen(self, rows: slice, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._kept is not None
        index = rising(self._kept[rows], count // self.bound.span * self.segment)
        k, v = (x[rows].gather(2, index[..., None].expand(*index.shape, x.shape[3])) for x in self.dense.view())
        return k, v

    def settle(self) -> None:
        due = [self.due(row) for row in range(self.batch_size)]
        if any(due):
            self._decide(due)
        try:
            super().settle()
        finally:
            self._kept = None

    def _decide(self, due: list[int]) -> None:
        """Choose among the due[b] oldest tokens behind the sinks of row b, and fold what goes into what stays."""
        method, held = self.bound.method, held_by(self, layer=self.position)
        own = method.needs()
        if held.queries is not None and own.queries:  # there may be more, for what is merged
            held = replace(held, queries=held.queries.last(own.queries, own.every))
        slots = torch.arange(held.k.shape[2], device=held.k.device)
        counts = torch.tensor(due, device=held.k.device)
        free = ((slots >= self.sinks) & (slots < self.sinks + counts[:, None]))[:, None]
        keep = counts // self.bound.span * self.segment
        self._kept = method.choose(held, free, keep)
        if method.folds:
            self.dense.set_values(method.fold(held, free & ~self._kept, int((counts - keep).max())))

    def unsteady(self) -> str | None:
        if self.needs.watches:
            return "its pages take part in the attention that it measures, which a step does not sum up"
        return super().unsteady()
