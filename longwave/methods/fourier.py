"""fourier: channels that long context does not need are kept as a few coefficients along time, the rest as values.

Source: FourierAttention, arXiv 2506.11886; the segments and the decoding without rebuilding K and V are ours
(docs/fourier.md). `Fourier.paper()` is the published setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from longwave.cache import MemoryLayer
from longwave.methods.base import CacheShape, Method
from longwave.ops.attention import group_heads, query_block, visible_mask
from longwave.ops.spectral.basis import BASES
from longwave.store.channels import ChannelSplit
from longwave.store.period import FLUSH, PeriodStore
from longwave.store.segments import SegmentStore
from longwave.store.tokens import capacity

if TYPE_CHECKING:
    from longwave.profile import Profile

DEFAULT_BUDGET = 0.5  # the least of those measured that leaves the small model most needles (docs/results.md)
Table = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def paper_share(position: int, layers: int) -> tuple[float, float]:
    """Share of (K, V) channels that the paper compresses in a layer: most in the first four, least in the last eight.

    Its two models have 28 and 32 layers; with fewer than 16 the two bands shrink in proportion.
    """
    first, last = (4, 8) if layers >= 16 else (layers // 8, layers // 4)
    if position < first:
        return 0.90, 0.95
    if position >= layers - last:
        return 0.50, 0.70
    return 0.80, 0.80


@dataclass(frozen=True)
class Fourier(Method):
    """Channels that long context does not need become a few coefficients along time (FourierAttention).

    keep: share of channels kept as values, 0 to 1, or a pair (K, V), or "paper" for the paper's schedule by layer.
        None: decided by the budget (0.5 where none is given).
    states: coefficients kept per compressed channel and segment.
    segment: tokens compressed together; None makes one period of the whole middle (the paper; basis "dft" only).
    sinks, window: first and last tokens kept dense.
    basis: "dct", "dft" or "legendre".
    gain: "max" stretches each smooth channel to its true largest deviation (the paper; one period only); None
        leaves it the plain low-pass.
    quota: "head" keeps the same number of channels in every head, "layer" takes the best of the layer.
    reserve: tokens that a period leaves free for growth before it is fitted again (one period only).
    """

    name: ClassVar[str] = "fourier"

    keep: float | tuple[float, float] | str | None = None
    states: int = 8
    segment: int | None = 256
    sinks: int = 4
    window: int = 256
    basis: str = "dct"
    gain: str | None = None
    quota: str = "head"
    reserve: int = 512
    _kept: Table | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        for share in shares:
            if len(shares) == 1 and (share is None or share == "paper"):
                continue
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(
                    f'keep is a share of channels from 0 to 1, a pair (K, V) of them, or "paper"; got {self.keep!r}'
                )
        if isinstance(self.keep, tuple) and len(self.keep) != 2:
            raise ValueError(f"keep as a tuple is (K, V), got {self.keep!r}")
        for name, least in (("states", 1), ("sinks", 0), ("window", 1), ("reserve", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                unit = "coefficients" if name == "states" else "tokens"
                raise ValueError(f"{name} is a whole number of {unit}, at least {least}; got {value!r}")
        if self.basis not in BASES:
            raise ValueError(f"unknown basis {self.basis!r}; choose from {', '.join(BASES)}")
        if self.quota not in ("head", "layer"):
            raise ValueError(f'quota is "head" or "layer", got {self.quota!r}')
        if self.gain not in (None, "max"):
            raise ValueError(f'gain is None or "max", got {self.gain!r}')
        if self.segment is None:
            if self.basis != "dft":
                raise ValueError(f'segment=None (one period) needs basis="dft", got {self.basis!r}')
            if self.states % 2:
                raise ValueError(f"one period stores cosine and sine rows, so states must be even; got {self.states}")
        else:
            if not isinstance(self.segment, int) or isinstance(self.segment, bool) or self.segment < 1:
                raise ValueError(f"segment is a whole number of tokens, at least 1, or None; got {self.segment!r}")
            if self.states > self.segment:
                raise ValueError(f"states ({self.states}) cannot exceed the segment's {self.segment} tokens")
            if self.gain is not None:
                raise ValueError("gain belongs to one period: use segment=None, or Fourier.paper()")

    @classmethod
    def paper(cls) -> Fourier:
        """The published setting of FourierAttention (arXiv 2506.11886).

        One period, complex DFT with 1024 states, 4 + 1020 dense tokens, mean and maximum-deviation correction, its
        share of channels by layer."""
        return cls(
            keep="paper", states=1024, segment=None, sinks=4, window=1020, basis="dft", gain="max", quota="layer"
        )

    def __str__(self) -> str:
        keep = "unbound" if self._kept is None else f"keep={self.kept_share:.3f}"
        shape = f"states={self.states}, segment={self.segment}, sinks={self.sinks}, window={self.window}"
        return f"fourier({keep}, {shape}, basis={self.basis})"

    # budget

    @property
    def rate(self) -> float:
        """Bytes of a compressed channel over those of a kept one."""
        return self.states / self.segment if self.segment else 0.0

    def least_budget(self, shape: CacheShape) -> float:
        return self.rate

    def fits_budget(self) -> bool:
        return self.keep is None

    def _shares(self, shape: CacheShape, budget: float | None) -> list[tuple[float, float]]:
        layers = len(shape.memory_layers)
        if self.keep is None:
            budget = DEFAULT_BUDGET if budget is None else budget
            if budget < self.rate:
                raise ValueError(
                    f"a budget of {budget:g} is less than the coefficients alone take: "
                    f"{self.states} states per {self.segment} tokens need {self.rate:.4f}. Use fewer states"
                )
            share = 1.0 if budget >= 1 else (budget - self.rate) / (1 - self.rate)
            return [(share, share)] * layers
        if budget is not None:
            raise ValueError("give a budget or keep, not both: each of them decides how many channels are kept")
        if self.keep == "paper":
            return [(1 - k, 1 - v) for k, v in (paper_share(i, layers) for i in range(layers))]
        pair = self.keep if isinstance(self.keep, tuple) else (self.keep, self.keep)
        return [pair] * layers  # type: ignore[list-item]

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> Fourier:
        shares = self._shares(shape, budget)
        kept = tuple(
            (self._select(shape, profile, position, "k", k), self._select(shape, profile, position, "v", v))
            for position, (k, v) in enumerate(shares)
        )
        return replace(self, _kept=kept)

    def _select(
        self, shape: CacheShape, profile: Profile | None, position: int, side: str, share: float
    ) -> torch.Tensor:
        """Kept channels of one layer's K or V: bool [kv_heads, head_dim], those with the largest error first."""
        heads, dim = shape.kv_heads, shape.head_dim
        whole = dim if self.quota == "head" else heads * dim
        count = int(share * whole + 1e-9)  # rounding down stays within the budget
        if self.keep == "paper":  # which rounds the compressed count down instead
            count = whole - int((1 - share) * whole + 1e-9)
        if count in (0, whole):
            return torch.full((heads, dim), count > 0)
        if profile is None:
            raise ValueError(
                "which channels to keep is not known for this model: measure it with "
                "`longwave calibrate MODEL --text FILE --out PROFILE` and pass profile=PROFILE"
            )
        error = profile.error(side, position)
        if self.quota == "layer":
            error = error.reshape(1, -1)
        best = error.argsort(dim=-1, descending=True, stable=True)[:, :count]
        return torch.zeros_like(error, dtype=torch.bool).scatter_(1, best, True).reshape(heads, dim)

    @property
    def kept(self) -> Table:
        """Per memory layer, the kept channels of K and V: bool [kv_heads, head_dim] each."""
        if self._kept is None:
            raise ValueError(
                "these options are not bound to a model yet: build a cache with longwave.cache(model, ...)"
            )
        return self._kept

    @property
    def kept_share(self) -> float:
        tables = [table for pair in self.kept for table in pair]
        return float(sum(table.sum() for table in tables)) / sum(table.numel() for table in tables)

    # bytes

    def absorbed(self, tokens: int) -> int:
        """Middle tokens compressed after a prompt of `tokens` given in one call."""
        waiting = max(0, tokens - self.sinks - self.window)
        if self.segment is None:
            return waiting if waiting > self.states else 0
        return waiting // self.segment * self.segment

    def layer_bytes(self, index: int, shape: CacheShape, tokens: int) -> int:
        middle = self.absorbed(tokens)
        return self._bytes(index, shape, tokens - middle, middle)

    def _bytes(self, index: int, shape: CacheShape, dense: int, middle: int) -> int:
        total = capacity(dense) * shape.token_bytes
        if middle:
            total += 2 * shape.kv_heads * (2 * shape.head_dim + 1) * 8  # which channel is where, there and back
            for table in self.kept[shape.memory_layers.index(index)]:
                kept, comp = int(table.sum()), int((~table).sum())
                if self.segment is None:
                    floats = 8 if shape.dtype == torch.float64 else 4
                    total += (middle * kept + self.states * comp) * shape.dtype.itemsize + 4 * comp * floats
                else:
                    total += (middle * kept + middle // self.segment * self.states * comp) * shape.dtype.itemsize
        return total

    def peak_bytes(self, shape: CacheShape, tokens: int, batch: int = 1) -> int:
        if batch > 1:  # rows may differ: the longest dense part of one is padded beside the longest middle of another
            open_tokens = self.segment - 1 if self.segment else max(self.states, FLUSH)
            dense = min(tokens, self.sinks + self.window + open_tokens)
            layers = sum(self._bytes(i, shape, dense, self.absorbed(tokens)) for i in shape.memory_layers)
            return batch * (layers + shape.sliding_bytes(tokens))
        if self.segment is None:  # up to FLUSH tokens wait, and the threshold itself is the most that stays dense
            threshold = min(tokens, self.sinks + self.window + self.states)
            waiting = FLUSH * shape.token_bytes * len(shape.memory_layers)
            return max(self.nbytes(shape, n, batch) for n in (threshold, tokens)) + batch * waiting
        middle = self.absorbed(tokens)
        lengths = {tokens, min(tokens, middle + self.sinks + self.window + self.segment - 1)}
        if middle:
            lengths.add(middle + self.sinks + self.window - 1)
        return max(self.nbytes(shape, n, batch) for n in lengths)

    def layer(self, index: int, shape: CacheShape) -> FourierLayer:
        return FourierLayer(index, self, *self.kept[shape.memory_layers.index(index)])


class FourierLayer(MemoryLayer):
    """Sinks, window and open segment dense, the middle in a `SegmentStore` or a `PeriodStore`."""

    def __init__(self, index: int, options: Fourier, kept_k: torch.Tensor, kept_v: torch.Tensor):
        super().__init__(index)
        self.options = options
        self.kept_k, self.kept_v = kept_k, kept_v

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """What crossed the window cannot come back, but while the past is recorded the last pass has not crossed yet.

        Assisted decoding asks for it since transformers 5.24, after it has switched recording on.
        """
        return self.record_past

    def _clear(self) -> None:
        super()._clear()
        self.store: SegmentStore | PeriodStore | None = None

    def _new_store(self, device: torch.device) -> SegmentStore | PeriodStore:
        options = self.options
        split_k, split_v = ChannelSplit(self.kept_k), ChannelSplit(self.kept_v)
        split_k.move(device)
        split_v.move(device)
        if options.segment is None:
            return PeriodStore(self.batch_size, split_k, split_v, options.states, options.reserve, options.gain)
        return SegmentStore(self.batch_size, split_k, split_v, options.basis, options.states, options.segment)

    def patience(self) -> int:
        return self.options.window if self.max_tokens is None else 0  # `crop` reaches into the window either way

    def _due(self, row: int) -> int:
        waiting = max(0, self.dense.lengths[row] - self.options.sinks - self.options.window)
        if self.store is not None:
            return self.store.due(row, waiting)
        return self.options.absorbed(self.dense.lengths[row])

    def settle(self) -> None:
        due = [self._due(row) for row in range(self.batch_size)]
        if not any(due):
            self.dense.fit()
            return
        k, v = self.dense.view()
        self._check_shape(k, v)
        if self.store is None:
            self.store = self._new_store(k.device)
        start = self.options.sinks
        if len(set(due)) == 1:
            batches: Iterator[tuple[int | None, slice, int]] = iter([(None, slice(None), due[0])])
        else:
            batches = ((row, slice(row, row + 1), count) for row, count in enumerate(due) if count)
        for row, rows, count in batches:
            middle_k, middle_v = k[rows, :, start : start + count], v[rows, :, start : start + count]
            if k.device.type != "cpu":  # on the CPU every token was checked when it was written
                self._refuse_nan(middle_k, middle_v, None)
            self.store.append(row, middle_k, middle_v)
        self.dense.drop(start, due)

    def _check_shape(self, k: torch.Tensor, v: torch.Tensor) -> None:
        for x, table in ((k, self.kept_k), (v, self.kept_v)):
            if (x.shape[1], x.shape[3]) != tuple(table.shape):
                raise ValueError(
                    f"layer {self.index} has {x.shape[1]} heads of {x.shape[3]} channels, its profile {table.shape[0]} "
                    f"of {table.shape[1]}: the profile is of another model, or the model is split over devices"
                )

    def attend(
        self, q: torch.Tensor, scaling: float, causal: bool = True, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.store is None:
            return super().attend(q, scaling, causal, mask)
        if mask is not None:
            raise NotImplementedError("a 4D attention mask over compressed tokens is not supported")
        k, v = self.dense.view()
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        k, v = k.to(compute), v.to(compute)
        batch, heads, queries, _ = q.shape
        middle = self.store.tokens
        visible = self.visible(queries, causal)
        ragged = len(set(middle)) > 1
        columns = k.shape[2] + max(middle)
        step = query_block(batch * heads, columns)
        out = torch.empty_like(q)
        for start in range(0, queries, step):
            block = q[:, :, start : start + step]
            seen = None if visible is None else visible[:, start : start + step]
            x = group_heads(block.to(compute) * scaling, k.shape[1])
            scores = torch.cat([x @ k.mT, self.store.scores(x)], dim=-1)
            if seen is not None or ragged:
                self._hide(scores, block.shape[2], k.shape[2], seen, middle)
            p = torch.softmax(scores, dim=-1)
            mixed = p[..., : k.shape[2]] @ v + self.store.mix(p[..., k.shape[2] :])
            out[:, :, start : start + step] = mixed.reshape(block.shape).to(q.dtype)
        return out

    def _hide(
        self, scores: torch.Tensor, queries: int, dense: int, seen: torch.Tensor | None, middle: list[int]
    ) -> None:
        """Push what a query may not see to the lowest finite score: a row that sees nothing averages, not NaN."""
        lowest = torch.finfo(scores.dtype).min
        by_query = scores.view(*scores.shape[:2], -1, queries, scores.shape[-1])
        if seen is not None:
            by_query[..., :dense].masked_fill_(~visible_mask(seen, dense)[:, :, None], lowest)
        if len(set(middle)) > 1:
            ends = torch.tensor(middle, device=scores.device)[:, None]
            by_query[..., dense:].masked_fill_(~visible_mask(ends, max(middle))[:, :, None], lowest)

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = super().materialize()
        if self.store is None:
            return k, v
        sinks, sides = self.options.sinks, []
        for dense, middle in zip((k, v), self.store.materialize(), strict=True):
            whole = dense.new_zeros(*dense.shape[:2], max(self.rows), dense.shape[3])
            for row, (held, count) in enumerate(zip(self.dense.lengths, self.store.tokens, strict=True)):
                first = min(sinks, held)
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
            free = self.dense.lengths[row] - (self.options.sinks if self.store and self.store.tokens[row] else 0)
            if count > free:
                raise ValueError(
                    f"cannot remove the last {count} tokens: all but {free} of them are compressed already. "
                    "Raise window, or keep a copy.deepcopy of the cache to go back to"
                )
        super().drop_last(counts)
