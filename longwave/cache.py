"""The frame: `LongCache`, what transformers holds, and `MemoryLayer`, where a method lives.

A layer's life in one forward pass: `update` takes the new tokens, `forward` (called from the attention function)
runs `write`, `attend`, `settle`. A prompt given in one call is so read with exact attention and compressed right
after, one layer at a time; later tokens see the compressed past.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from longwave.attention import Handle, LogicalLength, StepMask
from longwave.ops.attention import causal_attention, dense_attention, step_attention
from longwave.store.tokens import TokenBuffer


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes the tensors really hold: each storage once and whole, however small the view of it."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass
class Progress:
    """How far the running forward pass got, shared by a cache's layers: failing half-way leaves them unequal."""

    first: int = 0
    last: int = 0
    reached: int | None = None  # the last layer given tokens in this pass
    broken: bool = False
    lent: object | None = None  # of the decoder that holds the layers' storage and counts for them

    def check(self) -> None:
        if self.broken or self.reached not in (None, self.last):
            raise ValueError(
                "the last forward pass failed half-way and layers hold different tokens: call cache.reset()"
            )

    def check_lent(self) -> None:
        if self.lent is not None:
            raise RuntimeError("a decoder holds this cache: call the decoder's finish(), or cache.reset()")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles of the cache: what a decoder holds is not counted yet."""
        self.check_lent()
        return vars(self)

    def refused(self, index: int) -> None:
        """A layer took nothing. If it was the first one, the pass never happened."""
        if index == self.first:
            self.reached = None
        else:
            self.broken = True


class MemoryLayer(CacheLayerMixin):
    """One attention layer's memory. The base class keeps every token dense; methods override `settle` and more.

    `dense` holds tokens row by row without padding; `rows[b]` counts row b's real tokens, and `columns` counts what
    transformers believes is stored, padding included.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True

    columns: int
    rows: list[int]
    dense: TokenBuffer
    batch_size: int
    _new: tuple[torch.Tensor, torch.Tensor] | None  # given to `update`, not written yet
    _valid: torch.Tensor | None  # which columns of the last `write` are real; None for all
    _before: list[int]  # dense tokens of each row before the last `write`
    _run: list[int]  # real tokens since the last padding column of each row: how far `crop` can see
    _fresh: bool  # the last `write` was the first
    _unsettled: bool  # tokens wait for `crop`, or the next pass, before `settle`

    def __init__(self, index: int):
        super().__init__()
        self.index = index
        self.max_tokens: int | None = None  # set, with max_rows, where a byte budget bounds the whole cache
        self.max_rows: int | None = None
        self.record_past = False
        self.progress = Progress()
        self._clear()

    # what a method overrides

    def settle(self) -> None:
        """Compress, evict or merge what is due. Must leave no reference to a forward pass's own tensors."""
        self.dense.fit()

    def patience(self) -> int:
        """Longest forward pass, in tokens, whose `settle` may wait for `crop` while the past is recorded."""
        return 0

    def attend(
        self, q: torch.Tensor, scaling: float, causal: bool = True, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Answer queries over everything stored, the tokens of the last `write` included.

        q [batch, query_heads, queries, head_dim] -> same shape. The queries are those of the last `write`.
        """
        k, v = self.dense.view()
        if mask is None and causal and self._fresh and self._valid is None and q.shape[2] == k.shape[2] > 1:
            return causal_attention(q, k, v, scaling)
        return dense_attention(q, k, v, scaling, None if mask is not None else self.visible(q.shape[2], causal), mask)

    # what a method overrides to decode in storage that stays where it is (longwave/decode.py)

    def unsteady(self) -> str | None:
        """Why this layer cannot decode in storage of a fixed size, or None if it can."""
        return None if type(self) is MemoryLayer else "its method does not say how much storage a step needs"

    def reserve(self, new: int) -> None:
        """Take storage that lasts for `new` more tokens a row, and does not move until `release`."""
        self.dense.reserve(self.dense.longest + new)

    def release(self) -> None:
        """Back to storage that grows."""
        self.dense.release()

    def ripe(self) -> bool:
        """Whether `settle` has something to do."""
        return False

    def attend_step(self, q: torch.Tensor, scaling: float, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """`attend` in reserved storage with one query a row, by what the device knows: no host state is read.

        q [batch, query_heads, 1, head_dim]. seen int32 [batch, 1]: dense tokens of each row, the new one included;
        counts int32 [batch]: its pages, if the method has any.
        """
        k, v = self.dense.tensors()
        return step_attention(q, k, v, scaling, seen)

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense K and V this layer stands for, in token order.

        Each [batch, kv_heads, tokens, head_dim], tokens = the longest row; row b fills its first `rows[b]` places,
        padding is not stored, zeros follow. A copy, for tests and plots.
        """
        self._flush()
        if self.dense.k is None:
            raise ValueError("nothing is stored yet")
        k, v = self.dense.view()
        return k.clone(), v.clone()

    def parts(self) -> dict[str, list[torch.Tensor]]:
        """Every tensor held, by what it is for."""
        return {"dense": [*self.dense.tensors(), *(self._new or ())]}

    def move(self, device: torch.device | str) -> None:
        self.progress.check_lent()
        self.dense.move(device)

    def select_rows(self, rows: torch.Tensor) -> None:
        self.dense.select(rows)

    # what transformers calls

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.rows = [0] * self.batch_size
        self._run = [0] * self.batch_size
        self.dense = TokenBuffer(self.batch_size)
        self.is_initialized = True

    def update(  # type: ignore[override]  # attention modules pass on whatever this returns
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        """Take new tokens [batch, kv_heads, t, head_dim], keys after RoPE. They are written when attention asks."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"this cache holds a batch of {self.batch_size} but got {key_states.shape[0]} rows: use a new cache, "
                "or cache.reset(), cache.batch_repeat_interleave(n), cache.batch_select_indices(rows)"
            )
        self._check_rows(self.batch_size)
        self._flush()
        if self._unsettled:  # a past that was kept open for `crop` is final once more tokens come
            self.settle()
            self._unsettled = False
        if self.max_tokens is not None and self.columns + key_states.shape[2] > self.max_tokens:
            raise ValueError(
                f"the byte budget of this cache was computed for {self.max_tokens} tokens and "
                f"{self.columns + key_states.shape[2]} were given: build it with a larger max_tokens"
            )
        self._new = (key_states.detach(), value_states.detach())
        self.columns += key_states.shape[2]
        handle = Handle(self)
        return handle, handle

    def forward(self, q: torch.Tensor, scaling: float, mask: StepMask | torch.Tensor | None) -> torch.Tensor:
        """One layer's attention in a forward pass: q [batch, query_heads, queries, head_dim] -> same shape."""
        if self._new is None:
            raise RuntimeError(
                "attention was asked twice for one update: models that share K and V between layers are not supported"
            )
        causal, own_mask, valid = True, None, None
        try:
            if isinstance(mask, StepMask):
                causal, valid = mask.causal, self._read_padding(mask)
            elif mask is not None:
                own_mask = self._check_own_mask(mask)
            self.write(*self._new, valid)
        except (ValueError, NotImplementedError):  # refused: as if it had never been given
            self.columns -= q.shape[2]
            self._new = None
            self.progress.refused(self.index)
            raise
        try:
            out = self.attend(q, scaling, causal, own_mask)
            self._fresh = False
            if self.record_past and q.shape[2] <= self.patience():
                self._unsettled = True
            else:
                self.settle()
        except BaseException:
            self.progress.broken = True
            raise
        return out

    def write(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Store new tokens dense. `valid` [batch, t] marks the real ones, None means all."""
        self.progress.check_lent()
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        self.check_finite(k, v, valid)
        if self._new is None:  # called directly, not through `update`
            self.columns += k.shape[2]
        self._new = None
        self._fresh = self.dense.k is None
        self._valid = valid
        self._before = list(self.dense.lengths)
        self.dense.append(k, v, valid)
        counts = [k.shape[2]] * self.batch_size if valid is None else valid.sum(-1).tolist()
        self.rows = [row + count for row, count in zip(self.rows, counts, strict=True)]
        self._run = [
            run + count if count == k.shape[2] else self._trailing(valid, row)
            for row, (run, count) in enumerate(zip(self._run, counts, strict=True))
        ]

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
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 counts in tensors
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a number of tokens to remove as 0 or negative, got {tokens_to_remove}")
        self._flush()
        if tokens_to_remove and self.is_initialized:
            self._crop(-tokens_to_remove)
        if self._unsettled:
            self.settle()
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
        return self.batch_size * heads * self.columns * (k_dim + v_dim) * itemsize

    # inside

    def _clear(self) -> None:
        self.is_initialized = False
        self.columns = 0
        self.rows = []
        self.dense = TokenBuffer(0)
        self._run = []
        self._new = self._valid = None
        self._before = []
        self._fresh = self._unsettled = self.record_past = False
        if hasattr(self, "batch_size"):
            del self.batch_size

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

    def _flush(self) -> None:
        """Tokens given to `update` whose attention was never asked: store them as they are."""
        self.progress.check_lent()
        if self._new is not None:
            self.write(*self._new)
            self._unsettled = True
            self._fresh = False

    def visible(self, queries: int, causal: bool) -> torch.Tensor | None:
        """How many dense tokens each query of the last `write` may see: [batch, queries], None if all."""
        uniform = self.dense.uniform and self._valid is None
        if uniform and (queries == 1 or not causal):
            return None
        device = self.device
        if not causal:
            return torch.tensor(self.dense.lengths, device=device)[:, None].expand(-1, queries)
        before = torch.tensor(self._before, device=device)[:, None]
        if self._valid is None:
            return before + torch.arange(1, queries + 1, device=device)
        return before + self._valid.cumsum(-1)

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

    def _check_own_mask(self, mask: torch.Tensor) -> torch.Tensor:
        assert self._new is not None
        if sum(self.rows) != self.batch_size * (self.columns - self._new[0].shape[2]):
            raise NotImplementedError("a 4D attention mask cannot be combined with padded rows")
        return mask[..., : self.columns]

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

    def _crop(self, count: int) -> None:
        if count > self.columns:
            raise ValueError(f"cannot remove {count} tokens from a cache of {self.columns}")
        counts = []
        for row, run in zip(self.rows, self._run, strict=True):
            if run < count and run != row:  # padding in between: which columns held tokens is not known any more
                raise NotImplementedError("cannot crop past padding in the middle of a row")
            counts.append(min(count, row))
        self.drop_last(counts)
        self.rows = [row - c for row, c in zip(self.rows, counts, strict=True)]
        self._run = [max(0, run - c) for run, c in zip(self._run, counts, strict=True)]
        self.columns -= count

    def drop_last(self, counts: list[int]) -> None:
        """Remove the last tokens of each row; a method that stores some of them otherwise overrides or refuses."""
        self.dense.crop(counts)


@dataclass(frozen=True)
class Report:
    """What a cache holds. Bytes are those of real storages; `ratio` is nbytes / dense_nbytes."""

    method: str
    tokens: int
    batch: int
    nbytes: int
    dense_nbytes: int
    parts: dict[str, int]

    @property
    def ratio(self) -> float:
        return self.nbytes / self.dense_nbytes if self.dense_nbytes else float("nan")

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "ratio": self.ratio}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size:,}" for name, size in self.parts.items() if size)
        return (
            f"{self.method}: {self.tokens:,} tokens x {self.batch} rows, {self.nbytes:,} bytes held; a dense cache "
            f"would hold {self.dense_nbytes:,} (ratio {self.ratio:.3f}) [{parts}]"
        )


class LongCache(Cache):
    """A cache for `model.generate(past_key_values=...)`, made by `longwave.cache`.

    Full-attention layers are `MemoryLayer`s of one method; every other kind of layer keeps transformers' own class.
    """

    layers: list[Any]

    def __init__(self, layers: list[Any], method: Any):
        super().__init__(layers=layers)
        self.method = method
        attention = [i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)]
        self._progress = Progress(attention[0], attention[-1])
        for layer in self.memory_layers():
            layer.progress = self._progress
        self._unused = [None if isinstance(layer, MemoryLayer) else copy.deepcopy(layer) for layer in layers]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Hand new tokens to a layer. transformers' own layers keep a view of all they returned: cut it to size."""
        returned = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._progress.reached = layer_idx  # not before: a layer that refused took nothing
        layer: Any = self.layers[layer_idx]
        if not isinstance(layer, MemoryLayer):
            for name in ("keys", "values"):
                held = getattr(layer, name, None)
                if isinstance(held, torch.Tensor) and held.untyped_storage().nbytes() > 1.25 * held.nbytes:
                    setattr(layer, name, held.clone())
        return returned

    def reset(self) -> None:
        """Forget everything; the next use may have another batch size."""
        self._progress.reached, self._progress.broken, self._progress.lent = None, False, None
        for index, unused in enumerate(self._unused):
            if unused is None:
                self.layers[index].reset()
            else:  # transformers' own layers may keep their old batch size through a reset
                self.layers[index] = copy.deepcopy(unused)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Called at the start of a forward pass, so the place to see that the last one ended well."""
        self._progress.check()
        return super().get_mask_sizes(query_length, layer_idx)

    def memory_layers(self) -> Iterator[MemoryLayer]:
        return (layer for layer in self.layers if isinstance(layer, MemoryLayer))

    @property
    def nbytes(self) -> int:
        """Bytes all layers really hold."""
        return sum(self.report().parts.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes transformers' DynamicCache would hold after the same calls."""
        return self.report().dense_nbytes

    def report(self) -> Report:
        """Tokens seen, bytes held by part, bytes a dense cache would hold, and their ratio."""
        parts: dict[str, int] = {}
        dense, batch = 0, 0
        for layer in self.layers:
            if isinstance(layer, MemoryLayer):
                dense += layer.dense_nbytes
                batch = getattr(layer, "batch_size", 0)
                for name, tensors in layer.parts().items():
                    parts[name] = parts.get(name, 0) + storage_bytes(tensors)
            else:
                held = storage_bytes(list(_tensors(vars(layer))))
                parts["other layers"] = parts.get("other layers", 0) + held
                dense += held
        return Report(str(self.method), self.get_seq_length(), batch, sum(parts.values()), dense, parts)


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists and dicts: linear-attention layers keep their states in such."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (dict, list, tuple)):
        for item in held.values() if isinstance(held, dict) else held:
            yield from _tensors(item)


def other_layers(config: PretrainedConfig) -> list[Any]:
    """transformers' own cache layers for a decoder config; None where full attention wants a `MemoryLayer`."""
    return [None if type(layer) is DynamicLayer else layer for layer in DynamicCache(config=config).layers]
