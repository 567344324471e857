"""Dense tokens of a batch whose rows may differ in length: padded buffers that grow by blocks.

Rows are stored from column 0 on, padding tokens never enter. Beside K and V a buffer may have *side columns*, a number
a token and head (its position, the attention it got), which travel with the tokens. This module knows nothing about
attention.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from longwave.ops.write.reference import write_step
from longwave.store.state import State, demand

BLOCK = 64  # tokens; capacity is always the longest row rounded up to this


def capacity(tokens: int) -> int:
    """Tokens a buffer reserves for its longest row of `tokens`."""
    return -(-tokens // BLOCK) * BLOCK


def writable(x: torch.Tensor) -> bool:
    """Tensors made under torch.inference_mode() cannot be written to outside it."""
    return torch.is_inference_mode_enabled() or not x.is_inference()


class TokenBuffer:
    """K and V of shape [batch, kv_heads, capacity, head_dim]; row b holds `lengths[b]` tokens, zeros after them.

    columns: name -> [batch, kv_heads, capacity] of the dtypes declared.
    """

    def __init__(self, batch: int, columns: Mapping[str, torch.dtype] | None = None):
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None
        self.declared = dict(columns or {})
        self.columns: dict[str, torch.Tensor] = {}
        self.lengths = [0] * batch
        self.owned = True  # False while it only points at the tensors a forward pass handed in
        self.fixed = False  # between `reserve` and `release`

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def view(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V up to the longest row: [batch, kv_heads, longest, head_dim], not copied."""
        assert self.k is not None
        assert self.v is not None
        return self.k[:, :, : self.longest], self.v[:, :, : self.longest]

    def column(self, name: str) -> torch.Tensor:
        """A side column up to the longest row: [batch, kv_heads, longest], not copied."""
        return self.columns[name][:, :, : self.longest]

    # K, V and the columns, told apart by name where it matters: the token dimension is the third of each

    def _items(self) -> dict[str, torch.Tensor]:
        return {} if self.k is None or self.v is None else {"k": self.k, "v": self.v, **self.columns}

    def _set(self, items: Mapping[str, torch.Tensor]) -> None:
        self.k, self.v = items["k"], items["v"]
        self.columns = {name: items[name] for name in self.declared}

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor | None,
        columns: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Add tokens [batch, kv_heads, t, head_dim]; `valid` [batch, t] tells which are real, None means all.

        columns: values of the new tokens, [batch, 1 or kv_heads, t]; those not given start at 0. Into an empty buffer,
        unpadded K and V are taken by reference: call `fit` before the pass ends.
        """
        given = columns or {}
        new = {"k": k, "v": v}
        for name, dtype in self.declared.items():
            start = given.get(name)
            shape = (k.shape[0], k.shape[1], k.shape[2])
            new[name] = (
                torch.zeros(shape, dtype=dtype, device=k.device) if start is None else start.to(dtype).expand(shape)
            )
        if self.k is None and valid is None:
            self._set({name: x if name in ("k", "v") else x.contiguous() for name, x in new.items()})
            self.owned, self.lengths = False, [k.shape[2]] * k.shape[0]
            return
        counts = [k.shape[2]] * k.shape[0] if valid is None else valid.sum(-1).tolist()
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._reserve(max(ends), new)
        for name, target in self._items().items():
            own = new[name]
            if valid is None and self.uniform:
                target[:, :, self.lengths[0] : ends[0]] = own
            elif valid is None and k.shape[2] == 1:
                where = target.device  # host memory, maybe
                rows = torch.arange(k.shape[0], device=where)
                target[rows, :, torch.tensor(self.lengths, device=where)] = own[:, :, 0].to(where)
            else:
                for row, (start_at, end) in enumerate(zip(self.lengths, ends, strict=True)):
                    target[row, :, start_at:end] = own[row] if valid is None else own[row][:, valid[row]]
        self.lengths = ends

    def _reserve(self, tokens: int, like: Mapping[str, torch.Tensor]) -> None:
        if self.k is None:
            self._set({name: _room(x, tokens) for name, x in like.items()})
        elif not self.owned or self.k.shape[2] < tokens or not writable(self.k):
            self._copy(tokens)
        self.owned = True

    def _copy(self, tokens: int) -> None:
        made = {}
        for name, old in self._items().items():
            made[name] = _room(old, tokens)
            made[name][:, :, : self.longest] = old[:, :, : self.longest]
        self._set(made)

    def reserve(self, tokens: int) -> None:
        """Room for `tokens` a row, in tensors that stay where they are until `release`: a captured graph knows their
        addresses."""
        items = self._items()
        for name in list(items):  # one after the other: only one of them is held twice
            room = _room(items[name], max(tokens, self.longest))
            room[:, :, : self.longest] = items[name][:, :, : self.longest]
            items[name] = room
            self._set(items)
        self.owned = self.fixed = True

    def release(self) -> None:
        """Back to no more memory than the tokens need."""
        self.fixed = False
        self.crop([0] * len(self.lengths))

    def drop(self, start: int, counts: list[int]) -> None:
        """Remove `counts[b]` tokens of row b from column `start` on, and give their memory back unless `reserve`d."""
        if self.fixed:
            self._shift(start, counts)
            return
        kept = [length - count for length, count in zip(self.lengths, counts, strict=True)]
        fresh = {}
        for name, source in self._items().items():
            fresh[name] = target = _room(source, max(kept))
            if self.uniform and len(set(counts)) == 1:
                target[:, :, :start] = source[:, :, :start]
                target[:, :, start : kept[0]] = source[:, :, start + counts[0] : self.lengths[0]]
            else:
                for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
                    target[row, :, : min(start, length)] = source[row, :, : min(start, length)]
                    if length > start:
                        target[row, :, start : kept[row]] = source[row, :, start + count : length]
        self._set(fresh)
        self.lengths, self.owned = kept, True

    def _shift(self, start: int, counts: list[int]) -> None:
        moves = list(enumerate(zip(self.lengths, counts, strict=True)))
        same = self.uniform and len(set(counts)) == 1
        for row, (length, count) in moves[:1] if same else moves:
            rows = slice(None) if same else slice(row, row + 1)
            for x in self._items().values() if count else ():
                x[rows, :, start : length - count] = x[rows, :, start + count : length].clone()
                x[rows, :, length - count : length] = 0
        self.lengths = [length - count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, index: torch.Tensor, lengths: list[int]) -> None:
        """Keep, of each row and head, the tokens at index [batch, kv_heads, n], rising; row b takes its first
        `lengths[b]` of them. The memory of the others is given back unless it is `reserve`d."""
        n = max(lengths)
        fresh = {}
        for name, source in self._items().items():
            where = index[:, :, :n]
            taken = source.gather(
                2, where if source.ndim == 3 else where[..., None].expand(*where.shape, source.shape[3])
            )
            for row, length in enumerate(lengths):
                if length < n:
                    taken[row, :, length:] = 0
            if self.fixed:
                source[:, :, :n] = taken
                source[:, :, n : self.longest] = 0
                fresh[name] = source
            else:
                fresh[name] = _room(source, n)
                fresh[name][:, :, :n] = taken
        self._set(fresh)
        self.lengths, self.owned = list(lengths), True

    def set_values(self, v: torch.Tensor) -> None:
        """V up to the longest row becomes v [batch, kv_heads, longest, head_dim]. Never written to where it is not
        our own."""
        assert self.v is not None
        if not self.fixed:
            self.v = self.v.clone()
        self.v[:, :, : self.longest] = v

    def set_column(self, name: str, x: torch.Tensor) -> None:
        """The same of a side column, x [batch, kv_heads, longest] of its dtype."""
        if not self.fixed:
            self.columns[name] = self.columns[name].clone()
        self.column(name).copy_(x)

    def write_step(
        self,
        rows: torch.Tensor,
        at: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        columns: Mapping[str, torch.Tensor],
    ) -> None:
        """One token a row at column at[b] of reserved storage, as the device says: k, v [batch, kv_heads, 1, head_dim];
        columns [batch, 1], those not given 0. `lengths` is the host's to bring up."""
        assert self.k is not None
        assert self.v is not None
        write_step(self.k, self.v, k, v, rows, at)
        for name, held in self.columns.items():
            held[rows, :, at] = columns[name].to(held.dtype) if name in columns else 0

    def drop_step(self, slot: torch.Tensor, over: torch.Tensor) -> None:
        """Remove the token at slot [batch, kv_heads] of every head where over [batch], in place and on the device: what
        follows moves up, and what stands behind the rows' ends is anything."""
        assert self.k is not None
        columns = torch.arange(self.k.shape[2], device=slot.device)
        source = columns + ((columns >= slot[..., None]) & over[:, None, None])
        source = source.clamp_(max=self.k.shape[2] - 1)
        for x in self._items().values():
            x.copy_(x.gather(2, source if x.ndim == 3 else source[..., None].expand_as(x)))

    def fit(self) -> None:
        """Own the tokens, in no more memory than `capacity` of the longest row, or than was reserved."""
        if self.fixed:
            return
        if self.k is not None and (not self.owned or self.k.shape[2] != capacity(self.longest)):
            self._copy(self.longest)
            self.owned = True

    def crop(self, counts: list[int]) -> None:
        """Forget the last `counts[b]` tokens of row b."""
        self.lengths = [length - count for length, count in zip(self.lengths, counts, strict=True)]
        if self.k is not None:
            self.fit()
            if not writable(self.k):  # made under inference_mode, cropped outside
                self._copy(self.longest)
            for x in self._items().values():
                for row, length in enumerate(self.lengths):  # the columns after a row's end are zero by contract
                    x[row, :, length:] = 0

    def tensors(self) -> Iterator[torch.Tensor]:
        """K and V."""
        if self.k is not None and self.v is not None:
            yield self.k
            yield self.v

    def state(self) -> State:
        """Everything held, not copied: "k", "v" and the columns by name, as they are, and "lengths"."""
        return {**self._items(), "lengths": list(self.lengths)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave. ValueError where it does not fit together, or what is declared here."""
        lengths = list(state["lengths"])
        names = ("k", "v", *self.declared) if len(state) > 1 else ()
        demand(set(state) == {*names, "lengths"}, f"tokens come with {sorted(state)}, not with {sorted(names)}")
        items: dict[str, torch.Tensor] = {name: state[name] for name in names}
        demand(len(lengths) == len(self.lengths) and min(lengths) >= 0, f"lengths are {lengths}")
        for name, x in items.items():
            like = items["k"].shape[:3]
            demand(x.shape[:3] == like and like[0] == len(lengths), f"{name} is {list(x.shape)}, K {list(like)}")
            demand(x.ndim == (4 if name in ("k", "v") else 3), f"{name} is {list(x.shape)}")
            demand(x.dtype == self.declared.get(name, items["k"].dtype), f"{name} is {x.dtype}")
            demand(max(lengths) <= like[2], f"{max(lengths)} tokens in room for {like[2]}")
        demand(bool(items) or not any(lengths), f"lengths are {lengths}, and there are no tokens")
        if items:
            self._set(items)
        self.lengths, self.owned = lengths, True

    def move(self, device: torch.device | str) -> None:
        if self.k is not None:
            self._set({name: x.to(device) for name, x in self._items().items()})

    def select(self, rows: torch.Tensor) -> None:
        """Replace the batch by `rows` (indices, repeats allowed)."""
        if self.k is not None:
            index = rows.to(self.k.device)
            self._set({name: x.index_select(0, index) for name, x in self._items().items()})
            self.owned = True
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.fit()


def _room(like: torch.Tensor, tokens: int) -> torch.Tensor:
    """Zeros like a tensor of tokens, with room for `tokens` of them."""
    return like.new_zeros(*like.shape[:2], capacity(tokens), *like.shape[3:])
