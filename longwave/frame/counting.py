"""`Counting`: what transformers asks of a cache layer and counts in columns, padding included; and what is checked of a
pass before a layer takes it."""

from __future__ import annotations

from abc import abstractmethod

import torch
from transformers.cache_utils import CacheLayerMixin

from longwave.frame.attention import LogicalLength, StepMask, own_arithmetic, stored_dtype
from longwave.frame.observe import Queries
from longwave.frame.plain import padding_of
from longwave.frame.progress import Progress
from longwave.store.tokens import TokenBuffer


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes the tensors really hold: each storage once and whole, however small the view of it."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Counting(CacheLayerMixin):
    """The half of a memory layer that knows columns and rows, but not what is stored or how."""

    index: int
    progress: Progress
    max_tokens: int | None  # set, with max_rows, where a byte budget bounds the whole cache
    max_rows: int | None
    planned: torch.dtype | None
    queries: Queries | None
    heard: Queries | None
    is_compileable = False
    is_sliding = False
    is_croppable = True

    columns: int
    rows: list[int]
    dense: TokenBuffer
    batch_size: int
    dtype: torch.dtype
    device: torch.device
    _came: tuple[int, int] | None  # bytes of a number of K and V as the model gave them: autocast may mix types
    _new: tuple[torch.Tensor, torch.Tensor] | None  # given to `update`, not written yet
    _valid: torch.Tensor | None  # which columns of the last `write` are real; None for all
    _before: list[int]  # dense tokens of each row before the last `write`
    _run: list[int]  # real tokens since the last padding column of each row: how far `crop` can see
    _beyond: bool  # what is stored was rotated for more than `Progress.switch` tokens
    _unsettled: bool  # tokens wait for `crop`, or the next pass, before `settle`

    # what the other half does

    @abstractmethod
    def settle(self) -> None: ...

    @abstractmethod
    def can_drop(self, counts: list[int]) -> None: ...

    @abstractmethod
    def drop_last(self, counts: list[int]) -> None: ...

    @abstractmethod
    def select_rows(self, rows: torch.Tensor) -> None: ...

    @abstractmethod
    def move(self, device: torch.device | str) -> None: ...

    @abstractmethod
    def parts(self) -> dict[str, list[torch.Tensor]]: ...

    @abstractmethod
    def _flush(self) -> None: ...

    @abstractmethod
    def _clear(self) -> None: ...

    # what transformers calls

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if query_length == 0:
            raise ValueError("the prompt is empty, or all of it is in the cache already")
        return LogicalLength(self.columns + query_length), 0

    def get_max_length(self) -> int:
        return -1 if self.max_tokens is None else self.max_tokens

    def activate_past_recording(self) -> None:
        """From now on keep the tokens of the last forward pass dense until `crop` or the next pass settles them."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens. Settles what waited for the decision; 0 does only that."""
        counts = self.check_crop(tokens_to_remove)
        self._drop(counts)
        if self.is_initialized and int(tokens_to_remove):
            self.rows = [row - c for row, c in zip(self.rows, counts, strict=True)]
            self._run = [max(0, run + int(tokens_to_remove)) for run in self._run]
            self.columns += int(tokens_to_remove)
        self._finish_settling()

    def counts(self) -> tuple[int, list[int], list[int], bool]:
        """What `take_back` goes back to."""
        return self.columns, list(self.rows), list(self._run), self._beyond

    def take_back(self, before: tuple[int, list[int], list[int], bool]) -> None:
        """Forget the tokens of the last pass, wherever its padding was."""
        counts = [now - was for now, was in zip(self.rows, before[1], strict=True)]
        self.can_drop(counts)
        self._drop(counts)
        self.columns, self.rows, self._run, self._beyond = before

    def _drop(self, counts: list[int]) -> None:
        """The last counts[b] tokens of row b, and what is remembered of them."""
        if any(counts):
            self.drop_last(counts)
            for remembered in (self.queries, self.heard):
                if remembered is not None:
                    remembered.drop_last(counts)

    def check_crop(self, tokens_to_remove: int) -> list[int]:
        """How many tokens of each row a crop would remove, or an error that says why it cannot. Removes nothing."""
        count = -int(tokens_to_remove)  # transformers 5.17 counts in tensors
        if count < 0:
            raise ValueError(f"crop takes a number of tokens to remove as 0 or negative, got {-count}")
        self._flush()
        if not count or not self.is_initialized:
            return [0] * len(self.rows)
        if count > self.columns:
            raise ValueError(f"cannot remove {count} tokens from a cache of {self.columns}")
        counts = []
        for row, run in zip(self.rows, self._run, strict=True):
            if run < count and run != row:  # padding in between: which columns held tokens is not known any more
                raise NotImplementedError("cannot crop past padding in the middle of a row")
            counts.append(min(count, row))
        self.can_drop(counts)
        return counts

    def _finish_settling(self) -> None:
        if self._unsettled:
            try:
                with own_arithmetic(self.device.type):
                    self.settle()
            except BaseException:
                self.progress.broken = True
                raise
            self._unsettled = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized and self.columns:
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        self._flush()
        index = torch.arange(self.batch_size)[indices.cpu()]  # masks and negative indices become row numbers
        order = index.tolist()
        if order == list(range(self.batch_size)):
            return
        if not order:
            raise ValueError("a cache cannot be reduced to no rows: use reset()")
        self._check_rows(len(order))
        self.select_rows(index)
        self.rows = [self.rows[i] for i in order]
        self._run = [self._run[i] for i in order]
        self.batch_size = len(order)

    def reset(self) -> None:
        self._clear()

    def offload(self) -> None:
        self._flush()
        self.move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.move(self.device)

    # what they hold

    @property
    def nbytes(self) -> int:
        """Bytes really held, storages counted once and whole."""
        return storage_bytes([t for tensors in self.parts().values() for t in tensors])

    @property
    def dense_nbytes(self) -> int:
        """Bytes transformers' DynamicCache holds after the same calls (it stores padding too)."""
        if not self.is_initialized or self._shape is None:
            return 0
        heads, k_dim, v_dim, itemsize = self._shape
        k_size, v_size = self._came or (itemsize, itemsize)
        return self.batch_size * heads * self.columns * (k_dim * k_size + v_dim * v_size)

    @property
    def _shape(self) -> tuple[int, int, int, int] | None:
        k, v = self._new if self._new is not None else (self.dense.k, self.dense.v)
        if k is None or v is None:
            return None
        return k.shape[1], k.shape[3], v.shape[3], k.element_size()

    def _check_rows(self, rows: int) -> None:
        if self.max_rows is not None and rows > self.max_rows:
            raise ValueError(
                f"the byte budget of this cache was computed for a batch of {self.max_rows}, not {rows} "
                "(beams and returned sequences count as rows): build it with a larger batch"
            )

    @property
    def unbroken(self) -> bool:
        """Whether padding, where a row has any, comes before all of its tokens."""
        return self._run == self.rows

    def _read_padding(self, mask: StepMask) -> torch.Tensor | None:
        """The part of the mask that speaks of the new tokens, after checking what it says of the old ones."""
        assert self._new is not None
        new = self._new[0].shape[2]
        if mask.padding is None:
            if sum(self.rows) != self.batch_size * (self.columns - new):
                raise ValueError("this cache holds padded rows: pass the attention mask of the whole sequence")
            return None
        valid = mask.padding[:, -new:]
        full = mask.rows == [self.columns] * self.batch_size
        if full and sum(self.rows) == self.batch_size * (self.columns - new):
            return None
        counts = [new] * self.batch_size if full else valid.sum(-1).tolist()
        if [total - count for total, count in zip(mask.rows, counts, strict=True)] != self.rows:
            raise ValueError(
                "the attention mask hides or shows other tokens than when they were stored: "
                "a stored token stays as it was"
            )
        return None if counts == [new] * self.batch_size else valid

    def _plain(self, mask: torch.Tensor) -> StepMask | torch.Tensor:
        """A pass's 4D mask as it is, or what it amounts to where that is causality and the padding that is known."""
        if self.progress.mask is None or self.progress.mask[0] is not mask:  # once a pass: layers are given the same
            assert self._new is not None
            new = self._new[0].shape[2]
            real = padding_of(mask, self.batch_size, new, self.columns)
            found, before = None, []
            if real is not None:
                real = real.expand(self.batch_size, -1)
                before = real[:, :-new].sum(-1).tolist()
                found = StepMask(real, causal=True)
            self.progress.mask = mask, found, before
        _, found, before = self.progress.mask
        return mask if found is None or before != self.rows else found

    def _check_rotation(self, new: int, valid: torch.Tensor | None) -> None:
        """Beyond `switch` tokens the model turns every key otherwise, and what is stored stays as it was turned."""
        switch = self.progress.switch
        if switch is None or not any(self.rows):
            return
        counts = [new] * self.batch_size if valid is None else valid.sum(-1).tolist()
        after = max(row + count for row, count in zip(self.rows, counts, strict=True))
        if self.progress.drifts and max(after, *self.rows) > switch:
            raise ValueError(
                f"beyond {switch:,} tokens this model rotates all of them otherwise with every token that comes "
                f"(dynamic), and the cache holds {max(self.rows):,} already, turned as they were: extend the model by "
                'a rule whose tables stay, such as "ntk" or "yarn"'
            )
        if (after > switch) != self._beyond:
            raise ValueError(
                f"beyond {switch:,} tokens this model rotates all of them otherwise (longrope), and the cache holds "
                f"{max(self.rows):,} already: read all {after:,} in one pass, into a new cache or after cache.reset()"
            )

    def _check_own_mask(self, mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        batch, heads, new, _ = q.shape
        if sum(self.rows) != batch * (self.columns - new):
            raise NotImplementedError("a 4D attention mask cannot be combined with padded rows")
        shape = list(mask.shape)
        sizes = zip(shape, (batch, heads, new), strict=False)
        if len(shape) != 4 or shape[3] < self.columns or any(n not in (1, whole) for n, whole in sizes):
            raise ValueError(
                f"a 4D attention mask is [{batch} rows or 1, {heads} heads or 1, {new} new tokens, {self.columns} "
                f"columns] here; got {shape}"
            )
        if mask.dtype not in (torch.bool, torch.float32, q.dtype):
            raise ValueError(f"a 4D attention mask is of bool, or of {q.dtype} to be added to scores; got {mask.dtype}")
        if any(a != b for a, b in zip(self.rows, self.dense.lengths, strict=True)):
            raise NotImplementedError(
                "a 4D attention mask counts tokens that this cache does not hold one by one any more: pass a 2D mask"
            )
        return mask[..., : self.columns]

    def check_dtype(self, v: torch.Tensor) -> torch.dtype:
        """The type that is stored, autocast's own inside of it. ValueError where the cache was planned in the bytes of
        another."""
        now = stored_dtype(v.dtype, v.device.type)
        own = self.planned or (self.dtype if self.is_initialized else now)
        if now != own:
            raise ValueError(
                f"layer {self.index} got {now} and its cache was built for {own}: build the cache once the model has "
                "the type that it will run in, and inside of torch.autocast where it runs there"
            )
        return own

    def check_finite(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """On a CPU, where looking costs little, refuse new tokens that are NaN or infinite."""
        if k.device.type == "cpu" and not bool(torch.isfinite(k.sum() + v.sum())):
            self._refuse_nan(k, v, valid)

    def _refuse_nan(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Raise if a real token is NaN or infinite (padding may be)."""
        for name, x in (("keys", k), ("values", v)):
            bad = ~torch.isfinite(x).all(-1).all(1)  # [batch, t]
            if bool((bad if valid is None else bad & valid).any()):
                raise ValueError(
                    f"layer {self.index} got NaN or infinite {name}: the model overflows on this input "
                    "(float16 often does; try bfloat16 or float32)"
                )

    @staticmethod
    def _trailing(valid: torch.Tensor | None, row: int) -> int:
        assert valid is not None
        flags = valid[row].flip(0).long()
        return int(flags.cumprod(0).sum())
