"""Dense tokens of a batch whose rows may differ in length: a padded buffer that grows by blocks.

Rows are stored from column 0 on, padding tokens never enter. This module knows nothing about attention.
"""

from collections.abc import Iterator

import torch

BLOCK = 64  # tokens; capacity is always the longest row rounded up to this


def capacity(tokens: int) -> int:
    """Tokens a buffer reserves for its longest row of `tokens`."""
    return -(-tokens // BLOCK) * BLOCK


def writable(x: torch.Tensor) -> bool:
    """Tensors made under torch.inference_mode() cannot be written to outside it."""
    return torch.is_inference_mode_enabled() or not x.is_inference()


class TokenBuffer:
    """K and V of shape [batch, kv_heads, capacity, head_dim]; row b holds `lengths[b]` tokens, zeros after them."""

    def __init__(self, batch: int):
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None
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

    def append(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Add tokens [batch, kv_heads, t, head_dim]; `valid` [batch, t] tells which are real, None means all.

        Into an empty buffer, unpadded tokens are taken by reference: call `fit` before the pass ends.
        """
        if self.k is None and valid is None:
            self.k, self.v, self.owned = k, v, False
            self.lengths = [k.shape[2]] * k.shape[0]
            return
        counts = [k.shape[2]] * k.shape[0] if valid is None else valid.sum(-1).tolist()
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._reserve(max(ends), like=(k, v))
        assert self.k is not None
        assert self.v is not None
        for target, new in ((self.k, k), (self.v, v)):
            if valid is None and self.uniform:
                target[:, :, self.lengths[0] : ends[0]] = new
            elif valid is None and k.shape[2] == 1:
                rows = torch.arange(k.shape[0], device=k.device)
                target[rows, :, torch.tensor(self.lengths, device=k.device)] = new[:, :, 0]
            else:
                for row, (start, end) in enumerate(zip(self.lengths, ends, strict=True)):
                    target[row, :, start:end] = new[row] if valid is None else new[row][:, valid[row]]
        self.lengths = ends

    def _reserve(self, tokens: int, like: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self.k is None:
            self.k, self.v = (x.new_zeros(*x.shape[:2], capacity(tokens), x.shape[3]) for x in like)
        elif not self.owned or self.k.shape[2] < tokens or not writable(self.k):
            self._copy(tokens)
        self.owned = True

    def _copy(self, tokens: int) -> None:
        assert self.k is not None
        assert self.v is not None
        old, longest = (self.k, self.v), self.longest
        self.k, self.v = (x.new_zeros(*x.shape[:2], capacity(tokens), x.shape[3]) for x in old)
        self.k[:, :, :longest] = old[0][:, :, :longest]
        self.v[:, :, :longest] = old[1][:, :, :longest]

    def reserve(self, tokens: int) -> None:
        """Room for `tokens` a row, in tensors that stay where they are until `release`: a captured graph knows their
        addresses."""
        longest = self.longest
        for side in ("k", "v"):  # one after the other: only one of them is held twice
            old = getattr(self, side)
            room = old.new_zeros(*old.shape[:2], capacity(max(tokens, longest)), old.shape[3])
            room[:, :, :longest] = old[:, :, :longest]
            setattr(self, side, room)
            del old
        self.owned = self.fixed = True

    def release(self) -> None:
        """Back to no more memory than the tokens need."""
        self.fixed = False
        self.crop([0] * len(self.lengths))

    def drop(self, start: int, counts: list[int]) -> None:
        """Remove `counts[b]` tokens of row b from column `start` on, and give their memory back unless `reserve`d."""
        assert self.k is not None
        assert self.v is not None
        if self.fixed:
            self._shift(start, counts)
            return
        old = (self.k, self.v)
        kept = [length - count for length, count in zip(self.lengths, counts, strict=True)]
        fresh = tuple(x.new_zeros(*x.shape[:2], capacity(max(kept)), x.shape[3]) for x in old)
        for target, source in zip(fresh, old, strict=True):
            if self.uniform and len(set(counts)) == 1:
                target[:, :, :start] = source[:, :, :start]
                target[:, :, start : kept[0]] = source[:, :, start + counts[0] : self.lengths[0]]
            else:
                for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
                    target[row, :, : min(start, length)] = source[row, :, : min(start, length)]
                    if length > start:
                        target[row, :, start : kept[row]] = source[row, :, start + count : length]
        self.k, self.v = fresh
        self.lengths, self.owned = kept, True

    def _shift(self, start: int, counts: list[int]) -> None:
        moves = list(enumerate(zip(self.lengths, counts, strict=True)))
        same = self.uniform and len(set(counts)) == 1
        for row, (length, count) in moves[:1] if same else moves:
            rows = slice(None) if same else slice(row, row + 1)
            for x in (self.k, self.v) if count else ():
                assert x is not None
                x[rows, :, start : length - count] = x[rows, :, start + count : length].clone()
                x[rows, :, length - count : length] = 0
        self.lengths = [length - count for length, count in zip(self.lengths, counts, strict=True)]

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
        if self.k is not None and self.v is not None:
            self.fit()
            if not writable(self.k):  # made under inference_mode, cropped outside
                self._copy(self.longest)
            for row, length in enumerate(self.lengths):  # the columns after a row's end are zero by contract
                self.k[row, :, length:] = 0
                self.v[row, :, length:] = 0

    def tensors(self) -> Iterator[torch.Tensor]:
        if self.k is not None and self.v is not None:
            yield self.k
            yield self.v

    def move(self, device: torch.device | str) -> None:
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k.to(device), self.v.to(device)

    def select(self, rows: torch.Tensor) -> None:
        """Replace the batch by `rows` (indices, repeats allowed)."""
        if self.k is not None and self.v is not None:
            index = rows.to(self.k.device)
            self.k, self.v = self.k.index_select(0, index), self.v.index_select(0, index)
            self.owned = True
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.fit()
