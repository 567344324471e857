"""fourier: channels that long context does not need are kept as a few coefficients along time, the rest as values.

Source: FourierAttention, arXiv 2506.11886; the segments, the plan and the decoding without rebuilding K and V are ours
(docs/fourier.md). `Fourier.paper()` is the published setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from longwave import plan as planner
from longwave.methods.base import CacheShape
from longwave.methods.kivi import bit_pair
from longwave.methods.segmented import LayerCodes, Segmented, check_count
from longwave.ops.codes import BITS
from longwave.ops.spectral.basis import BASES
from longwave.store.channels import ChannelSplit
from longwave.store.layout import OWN, Code
from longwave.store.pages import PageStore
from longwave.store.period import FLUSH, PeriodStore
from longwave.store.tokens import capacity

if TYPE_CHECKING:
    from longwave.profile import Profile

DEFAULT_BUDGET = 0.25
PLANS = ("measured", "uniform", "bits")
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
class Fourier(Segmented):
    """Channels that long context does not need become a few coefficients along time (FourierAttention).

    With a budget, a plan decides for every head of K and V which channels stay and in how many bits (docs/planner.md).
    With `keep`, every head keeps the same share.

    plan: None takes "measured" where the profile holds a measurement and "uniform" otherwise, which says so.
        "uniform" treats all heads alike; "bits" is measured, and compresses no channel.
    keep: share of channels kept as values, 0 to 1, or a pair (K, V), or "paper" for the paper's schedule by layer.
        Takes the plan's place.
    keep_bits: bits of kept channels, 16, 8, 4, 3 or 2, or a pair (K, V); goes with `keep`. None: the model's own type.
        K's codes share a scale and a zero along a segment, V's a scale a token.
    states: coefficients kept per compressed channel and segment.
    coef_bits: bits of a coefficient, 16 or 8. None: 8 in a plan, the model's own type with `keep`.
    segment: tokens compressed together; None makes one period of the whole middle (the paper; basis "dft" only).
    sinks, window: first and last tokens kept dense.
    basis: "dct", "dft" or "legendre".
    gain: "max" stretches each smooth channel to its true largest deviation (the paper; one period only); None
        leaves it the plain low-pass.
    quota: "head" keeps the same number of channels in every head, "layer" takes the best of the layer; with `keep`.
    reserve: tokens that a period leaves free for growth before it is fitted again (one period only).
    """

    name: ClassVar[str] = "fourier"

    plan: str | None = None
    keep: float | tuple[float, float] | str | None = None
    keep_bits: int | tuple[int, int] | None = None
    states: int = 1
    coef_bits: int | None = None
    segment: int | None = 128
    sinks: int = 4
    window: int = 256
    basis: str = "dct"
    gain: str | None = None
    quota: str = "head"
    reserve: int = 512
    _codes: tuple[LayerCodes, ...] | None = field(default=None, repr=False, compare=False)
    _kept: Table | None = field(default=None, repr=False, compare=False)
    _made: str = field(default="", repr=False, compare=False)
    _warn: bool = field(default=False, repr=False, compare=False)

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
        if self.plan not in (None, *PLANS):
            raise ValueError(f"plan is {', '.join(PLANS[:-1])} or {PLANS[-1]}, got {self.plan!r}")
        if self.plan and (self.keep is not None or self.segment is None):
            raise ValueError("a plan decides what is kept: leave keep out, and give a segment")
        if self.keep_bits is not None:
            bit_pair(self.keep_bits, (16, *BITS))
            if self.keep is None or self.segment is None:
                raise ValueError("keep_bits goes with keep and a segment; with a budget the plan chooses the bits")
        if self.coef_bits not in (None, 16, 8):
            raise ValueError(f"coef_bits is 16 or 8, got {self.coef_bits!r}")
        for name, least in (("states", 1), ("sinks", 0), ("window", 1), ("reserve", 1)):
            check_count(name, getattr(self, name), least, "coefficients" if name == "states" else "tokens")
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
            if self.keep is None or self.coef_bits is not None:
                raise ValueError("one period keeps values and coefficients in the model's own type: give keep alone")
        else:
            check_count("segment", self.segment, 1)
            if self.states > self.segment:
                raise ValueError(f"states ({self.states}) cannot exceed the segment's {self.segment} tokens")
            if self.keep is None and self.segment % 8:
                raise ValueError(f"a plan packs codes by eights: segment is a multiple of 8, got {self.segment}")
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
        shape = f"states={self.states}, segment={self.segment}, sinks={self.sinks}, window={self.window}"
        return f"fourier({self._made or 'unbound'}, {shape}, basis={self.basis})"

    @property
    def dense_tokens(self) -> tuple[int, int, int]:
        return self.sinks, self.window, self.segment or 0

    @property
    def warning(self) -> str | None:
        """What a user of this bound method should know before relying on it."""
        if not self._warn:
            return None
        return (
            'no measurement of this model: all heads are treated alike (plan="uniform"). '
            "`longwave calibrate` makes a profile that costs less quality at the same bytes"
        )

    # from options, profile and budget to what every layer keeps

    def fits_budget(self) -> bool:
        return self.keep is None

    def least_budget(self, shape: CacheShape) -> float:
        if self.keep is not None:
            return self.states / self.segment if self.segment else 0.0
        page = self._page(shape)
        if self.plan == "bits":  # at most: which of K's options compress nothing depends on the profile
            pair = planner.key_code(None, 8 + 32 / page.segment, page), planner.value_code(1, page)
        else:
            pair = planner.key_code(None, 0.0, page), planner.value_code(0, page)
        head = sum(planner.code_bytes(code, page) for code in pair)
        return head * shape.kv_heads * len(shape.memory_layers) / self._dense_bytes(shape)

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> Fourier:
        if self.keep is None:
            return self._planned(shape, profile, DEFAULT_BUDGET if budget is None else budget)
        if budget is not None:
            raise ValueError("give a budget or keep, not both: each of them decides how many channels are kept")
        kept = tuple(
            (self._select(shape, profile, position, "k", k), self._select(shape, profile, position, "v", v))
            for position, (k, v) in enumerate(self._shares(len(shape.memory_layers)))
        )
        tables = [table for pair in kept for table in pair]
        share = float(sum(table.sum() for table in tables)) / sum(table.numel() for table in tables)
        made = f"keep={share:.3f}"
        if self.keep_bits is not None:
            made += ", keep_bits={}/{}".format(*bit_pair(self.keep_bits, (16, *BITS)))
        codes = None if self.segment is None else tuple(self._explicit(*pair) for pair in kept)
        return replace(self, _kept=kept, _codes=codes, _made=made)

    def _shares(self, layers: int) -> list[tuple[float, float]]:
        if self.keep == "paper":
            return [(1 - k, 1 - v) for k, v in (paper_share(i, layers) for i in range(layers))]
        pair = self.keep if isinstance(self.keep, tuple) else (self.keep, self.keep)
        return [pair] * layers  # type: ignore[list-item]

    def _explicit(self, kept_k: torch.Tensor, kept_v: torch.Tensor) -> LayerCodes:
        bits = (OWN, OWN) if self.keep_bits is None else bit_pair(self.keep_bits, (16, *BITS))
        sides: list[Any] = []
        for table, b, axis in zip((kept_k, kept_v), bits, ("time", "token"), strict=True):
            codes = []
            for kept in table.sum(-1).tolist():
                whole = kept == table.shape[1]
                residual = whole and axis == "token" and b in BITS
                states = 0 if whole and not residual else self.states
                runs = ((b, kept),) if kept else ()
                codes.append(Code(runs, states, axis, residual, state_bits=self.coef_bits or OWN, zero=axis == "time"))
                codes[-1].check(table.shape[1], self.segment or 0)
            sides.append((tuple(codes), torch.argsort((~table).int(), dim=-1, stable=True)))
        (k, order_k), (v, order_v) = sides
        return LayerCodes(k, v, order_k, order_v)

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

    # the plan

    def _page(self, shape: CacheShape) -> planner.Shape:
        assert self.segment is not None
        return planner.Shape(self.segment, shape.head_dim, self.states, self.coef_bits or 8, shape.dtype)

    def _dense_bytes(self, shape: CacheShape) -> int:
        """A segment of all layers, dense."""
        assert self.segment is not None
        return len(shape.memory_layers) * self.segment * shape.token_bytes

    def _planned(self, shape: CacheShape, profile: Profile | None, budget: float) -> Fourier:
        measured = profile.sensitivity if profile is not None else None
        kind = self.plan or ("measured" if measured is not None else "uniform")
        if kind != "uniform" and measured is None:
            raise ValueError(
                f'plan="{kind}" needs a profile with a measurement, and there is none for this model: make one with '
                "`longwave calibrate MODEL --text FILE --out PROFILE` and pass profile=PROFILE"
            )
        layers, heads, page = len(shape.memory_layers), shape.kv_heads, self._page(shape)
        units = [unit for position in range(layers) for unit in planner.units(measured, kind, position, heads, page)]
        limit = budget * self._dense_bytes(shape)
        try:
            chosen = iter(planner.choose(units, page, limit))
        except planner.TooSmall as error:
            raise ValueError(
                f"a budget of {budget:g} is less than {self.name} can do with these options: their smallest plan takes "
                f"{error.needed / self._dense_bytes(shape):.4f}. A longer segment or fewer states take less"
            ) from None
        straight = torch.arange(shape.head_dim).expand(heads, -1)
        codes = []
        for position in range(layers):
            k, v = zip(*(next(chosen) for _ in range(heads)), strict=True)
            codes.append(LayerCodes(k, v, straight if measured is None else measured.order(position), straight))
        made = f"{kind} plan for {budget:g}"
        unmeasured = measured is None and budget < 1
        if unmeasured:
            made += ", nothing measured"
        return replace(self, _codes=tuple(codes), _made=made, _warn=unmeasured and self.plan is None)

    def codes(self, position: int) -> LayerCodes:
        if self._codes is None:
            raise ValueError(
                "these options are not bound to a model yet: build a cache with longwave.cache(model, ...)"
            )
        return self._codes[position]

    @property
    def kept(self) -> Table:
        """Per memory layer, the channels of K and V kept as values or codes: bool [kv_heads, head_dim] each."""
        if self._kept is not None:
            return self._kept
        self.codes(0)
        tables = []
        for layer in self._codes or ():
            pair = []
            for codes, order in ((layer.k, layer.order_k), (layer.v, layer.order_v)):
                rank = torch.argsort(order.long(), dim=-1)
                pair.append(rank < torch.tensor([[code.kept] for code in codes]))
            tables.append((pair[0], pair[1]))
        return tuple(tables)

    # one period

    def new_store(self, position: int, batch: int, dtype: torch.dtype, device: torch.device) -> Any:
        if self.segment is not None:
            codes = self.codes(position)
            return PageStore(batch, codes.layout(self.segment, dtype), self.basis, codes.states, device)
        splits = [ChannelSplit(table) for table in self.kept[position]]
        for split in splits:
            split.move(device)
        return PeriodStore(batch, splits[0], splits[1], self.states, self.reserve, self.gain)

    def absorbed(self, tokens: int) -> int:
        if self.segment is not None:
            return super().absorbed(tokens)
        waiting = max(0, tokens - self.sinks - self.window)
        return waiting if waiting > self.states else 0

    def _bytes(self, index: int, shape: CacheShape, dense: int, middle: int) -> int:
        if self.segment is not None or not middle:
            return super()._bytes(index, shape, dense, middle)
        total = capacity(dense) * shape.token_bytes
        total += 2 * shape.kv_heads * (2 * shape.head_dim + 1) * 8  # which channel is where, there and back
        floats = 8 if shape.dtype == torch.float64 else 4
        for table in self.kept[shape.memory_layers.index(index)]:
            kept, comp = int(table.sum()), int((~table).sum())
            total += (middle * kept + self.states * comp) * shape.dtype.itemsize + 4 * comp * floats
        return total

    def peak_bytes(self, shape: CacheShape, tokens: int, batch: int = 1) -> int:
        if self.segment is not None:
            return super().peak_bytes(shape, tokens, batch)
        if batch > 1:
            dense = min(tokens, self.sinks + self.window + max(self.states, FLUSH))
            layers = sum(self._bytes(i, shape, dense, self.absorbed(tokens)) for i in shape.memory_layers)
            return batch * (layers + shape.sliding_bytes(tokens))
        # up to FLUSH tokens wait, and the threshold itself is the most that stays dense
        threshold = min(tokens, self.sinks + self.window + self.states)
        waiting = FLUSH * shape.token_bytes * len(shape.memory_layers)
        return max(self.nbytes(shape, n, batch) for n in (threshold, tokens)) + batch * waiting
