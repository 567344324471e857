"""What methods share that store the middle of the context in segments: sinks and window dense, pages in between."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longwave.cache import MemoryLayer
from longwave.methods.base import CacheShape, Method
from longwave.ops.attention import group_heads, query_block, visible_mask
from longwave.store.layout import Code, Layout
from longwave.store.pages import PageStore
from longwave.store.tokens import capacity


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """How one layer is stored: a code for each head of K and V, and its channels by falling importance [H, D]."""

    k: tuple[Code, ...]
    v: tuple[Code, ...]
    order_k: torch.Tensor
    order_v: torch.Tensor

    def layout(self, segment: int, dtype: torch.dtype) -> Layout:
        return Layout(self.k, self.v, self.order_k, self.order_v, segment, dtype)

    @property
    def states(self) -> int:
        """The longest table any head needs."""
        return max(1, *(code.states for code in (*self.k, *self.v)))


def check_count(name: str, value: object, least: int, unit: str = "tokens") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is a whole number of {unit}, at least {least}; got {value!r}")


@dataclass(frozen=True)
class Segmented(Method):
    """Options: `sinks`, `window` (first and last tokens, dense) and `segment` (tokens compressed together)."""

    @property
    @abstractmethod
    def dense_tokens(self) -> tuple[int, int, int]:
        """(sinks, window, segment)."""

    @abstractmethod
    def codes(self, position: int) -> LayerCodes:
        """How memory layer number `position` is stored. Called on a bound method."""

    def layout(self, position: int, dtype: torch.dtype) -> Layout:
        """The pages of memory layer number `position`."""
        return self.codes(position).layout(self.dense_tokens[2], dtype)

    def new_store(self, position: int, batch: int, dtype: torch.dtype, device: torch.device) -> Any:
        codes = self.codes(position)
        return PageStore(batch, codes.layout(self.dense_tokens[2], dtype), "dct", codes.states, device)

    def absorbed(self, tokens: int) -> int:
        """Middle tokens compressed after a prompt of `tokens` given in one call."""
        sinks, window, segment = self.dense_tokens
        return max(0, tokens - sinks - window) // segment * segment

    def layer_bytes(self, index: int, shape: CacheShape, tokens: int) -> int:
        middle = self.absorbed(tokens)
        return self._bytes(index, shape, tokens - middle, middle)

    def _bytes(self, index: int, shape: CacheShape, dense: int, middle: int) -> int:
        total = capacity(dense) * shape.token_bytes
        if middle:
            layout = self.layout(shape.memory_layers.index(index), shape.dtype)
            total += middle // layout.segment * layout.page_bytes + layout.index_bytes
        return total

    def peak_bytes(self, shape: CacheShape, tokens: int, batch: int = 1) -> int:
        sinks, window, segment = self.dense_tokens
        middle = self.absorbed(tokens)
        if batch > 1:  # rows may differ: the longest dense part of one is padded beside the longest middle of another
            dense = min(tokens, sinks + window + segment - 1)
            layers = sum(self._bytes(i, shape, dense, middle) for i in shape.memory_layers)
            return batch * (layers + shape.sliding_bytes(tokens))
        lengths = {tokens, min(tokens, middle + sinks + window + segment - 1)}
        if middle:
            lengths.add(middle + sinks + window - 1)
        return max(self.nbytes(shape, n, batch) for n in lengths)

    def page_fraction(self, shape: CacheShape) -> float:
        """Bytes of a page of every layer over those of the same tokens dense: what a budget bounds."""
        layers = range(len(shape.memory_layers))
        pages = sum(self.layout(position, shape.dtype).page_bytes for position in layers)
        return pages / (len(layers) * self.dense_tokens[2] * shape.token_bytes)

    def layer(self, index: int, shape: CacheShape) -> SegmentedLayer:
        return SegmentedLayer(index, self, shape.memory_layers.index(index), (shape.kv_heads, shape.head_dim))


class SegmentedLayer(MemoryLayer):
    """Sinks, window and open segment dense, the middle in the method's store."""

    def __init__(self, index: int, method: Segmented, position: int, heads: tuple[int, int]):
        super().__init__(index)
        self.method, self.position, self.heads = method, position, heads
        self.sinks, self.window, _ = method.dense_tokens

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

    def _due(self, row: int) -> int:
        waiting = max(0, self.dense.lengths[row] - self.sinks - self.window)
        if self.store is not None:
            return self.store.due(row, waiting)
        return self.method.absorbed(self.dense.lengths[row])

    def settle(self) -> None:
        due = [self._due(row) for row in range(self.batch_size)]
        if not any(due):
            self.dense.fit()
            return
        k, v = self.dense.view()
        self._check_shape(k, v)
        if self.store is None:
            self.store = self.method.new_store(self.position, self.batch_size, k.dtype, k.device)
        if len(set(due)) == 1:
            batches: Iterator[tuple[int | None, slice, int]] = iter([(None, slice(None), due[0])])
        else:
            batches = ((row, slice(row, row + 1), count) for row, count in enumerate(due) if count)
        for row, rows, count in batches:
            middle = slice(self.sinks, self.sinks + count)
            middle_k, middle_v = k[rows, :, middle], v[rows, :, middle]
            if k.device.type != "cpu":  # on the CPU every token was checked when it was written
                self._refuse_nan(middle_k, middle_v, None)
            self.store.append(row, middle_k, middle_v)
        self.dense.drop(self.sinks, due)

    def _check_shape(self, k: torch.Tensor, v: torch.Tensor) -> None:
        for x in (k, v):
            if (x.shape[1], x.shape[3]) != self.heads:
                raise ValueError(
                    f"layer {self.index} has {x.shape[1]} heads of {x.shape[3]} channels, its profile {self.heads[0]} "
                    f"of {self.heads[1]}: the profile is of another model, or the model is split over devices"
                )

    def attend(
        self, q: torch.Tensor, scaling: float, causal: bool = True, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.store is None:
            return super().attend(q, scaling, causal, mask)
        if mask is not None:
            raise NotImplementedError("a 4D attention mask over compressed tokens is not supported")
        k, v = self.dense.view()
        visible = self.visible(q.shape[2], causal)
        if isinstance(self.store, PageStore):
            answer = self.store.attend(q, scaling, k, v, visible)
            if answer is not None:
                return answer
        middle = self.store.tokens
        ends = torch.tensor(middle, device=q.device) if len(set(middle)) > 1 else None
        return store_attention(self.store, q, scaling, k, v, visible, ends, max(middle))

    def unsteady(self) -> str | None:
        if not self.method.dense_tokens[2]:
            return "its method fits one period to the whole middle again and again: use segments"
        return None

    def reserve(self, new: int) -> None:
        lengths = self.dense.lengths
        segment = self.method.dense_tokens[2]
        filled = [self.method.absorbed(length + new) // segment for length in lengths]
        if self.store is None and any(filled):
            k, v = self.dense.view()
            self._check_shape(k, v)
            self.store = self.method.new_store(self.position, self.batch_size, k.dtype, k.device)
            del k, v  # they would hold the old storage beside the new
        if self.store is not None:
            self.store.reserve(max(held + more for held, more in zip(self.store.counts, filled, strict=True)))
        longest = max(lengths)
        self.dense.reserve(min(longest + new, max(longest + 1, self.sinks + self.window + segment)))

    def release(self) -> None:
        super().release()
        if self.store is not None and any(self.store.counts):
            self.store.release()
        else:
            self.store = None

    def ripe(self) -> bool:
        return any(self._due(row) for row in range(self.batch_size))

    def attend_step(self, q: torch.Tensor, scaling: float, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if self.store is None:
            return super().attend_step(q, scaling, seen, counts)
        k, v = self.dense.tensors()
        answer = self.store.attend(q, scaling, k, v, seen, counts)
        if answer is not None:
            return answer
        segment = self.method.dense_tokens[2]
        return store_attention(
            self.store, q, scaling, k, v, seen, counts * segment, self.store.pages.shape[1] * segment
        )

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = super().materialize()
        if self.store is None:
            return k, v
        sides = []
        for dense, middle in zip((k, v), self.store.materialize(), strict=True):
            whole = dense.new_zeros(*dense.shape[:2], max(self.rows), dense.shape[3])
            for row, (held, count) in enumerate(zip(self.dense.lengths, self.store.tokens, strict=True)):
                first = min(self.sinks, held)
                whole[row, :, :first] = dense[row, :, :first]
                whole[row, :, first : first + count] = middle[row, :, :count]
                whole[row, :, first + count : held + count] = dense[row, :, first:held]
            sides.append(whole)
        return sides[0], sides[1]

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

    def drop_last(self, counts: list[int]) -> None:
        for row, count in enumerate(counts):
            free = self.dense.lengths[row] - (self.sinks if self.store and self.store.tokens[row] else 0)
            if count > free:
                raise ValueError(
                    f"cannot remove the last {count} tokens: all but {free} of them are compressed already. "
                    "Raise window, or keep a copy.deepcopy of the cache to go back to"
                )
        super().drop_last(counts)


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
