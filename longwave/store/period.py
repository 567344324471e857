"""The paper's own store: one period over the whole middle, complex DFT, mean and maximum-deviation correction.

Source: arXiv 2506.11886 and its released code; docs/fourier.md says what differs here, being wrong there.
A token's phase is its own index in the middle; the mean is removed before the transform; the gain follows the tokens
that join later; a full period is fitted again with a longer one instead of wrapping round; nothing is a view.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from longwave.ops.spectral.basis import smooth_ge
from longwave.store.channels import ChannelSplit
from longwave.store.state import State, demand, under, within

FLUSH = 64  # tokens that join at once: the gain is computed anew each time


def _floats(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def analyze(x: torch.Tensor, states: int, period: int, start: int = 0) -> torch.Tensor:
    """Coefficients [.., states, c] of x [.., t, c] at phases start .. start + t - 1 of a zero-padded period.

    Rows: states/2 cosines, then as many sines, frequency 0 first, scaled so that `resynthesize` is the plain
    truncated inverse.
    """
    length = x.shape[-2]
    if x.numel() == 0:  # a head that keeps every channel; FFT libraries refuse empty input
        return x.new_zeros(*x.shape[:-2], states, x.shape[-1])
    padded = torch.nn.functional.pad(x, (0, 0, start, period - start - length))
    bins = torch.fft.rfft(padded, dim=-2)[..., : states // 2, :] * math.sqrt(2 / period)
    bins[..., 0, :] /= math.sqrt(2)
    return torch.cat([bins.real, -bins.imag], dim=-2)


def resynthesize(coef: torch.Tensor, period: int, length: int) -> torch.Tensor:
    """coef [.., states, c] -> the first `length` values of the period [.., length, c]."""
    if coef.numel() == 0:
        return coef.new_zeros(*coef.shape[:-2], length, coef.shape[-1])
    cos, sin = coef.chunk(2, dim=-2)
    bins = torch.complex(cos.contiguous(), -sin.contiguous()) * math.sqrt(period / 2)
    bins[..., 0, :] *= math.sqrt(2)
    return torch.fft.irfft(bins, n=period, dim=-2)[..., :length, :]


class PeriodGroup:
    """One head group of one row: kept [heads, M, n], coef [heads, S, c] and three numbers a channel.

    A compressed channel reads gain * (r - centre) + mean, r the truncated inverse; stored as gain and shift.
    """

    def __init__(self, kept: torch.Tensor, comp: torch.Tensor, states: int, period: int):
        x = comp.to(_floats(comp))
        self.dtype = comp.dtype
        self.kept = kept.clone()
        self.mean = x.mean(-2)
        self.reach = (x - self.mean[:, None]).abs().amax(-2)
        self.coef = analyze(x - self.mean[:, None], states, period).to(comp.dtype)

    def correct(self, period: int, length: int, stretch: bool) -> None:
        """Put the mean back, and stretch the smooth signal so that its largest deviation equals the true one (paper,
        section 3), or leave it as it is."""
        if not stretch:
            self.gain, self.shift = torch.ones_like(self.mean), self.mean.clone()
            return
        r = resynthesize(self.coef.to(self.mean.dtype), period, length)
        centre = r.mean(-2)
        span = (r - centre[:, None]).abs().amax(-2)
        self.gain = torch.where(span > 0, self.reach / span, torch.ones_like(span))
        self.shift = self.mean - centre * self.gain

    def join(self, kept: torch.Tensor, comp: torch.Tensor, start: int, period: int) -> None:
        x = comp.to(self.mean.dtype) - self.mean[:, None]
        self.kept = torch.cat([self.kept, kept], dim=-2)
        self.reach = torch.maximum(self.reach, x.abs().amax(-2))
        added = analyze(x, self.coef.shape[-2], period, start)
        self.coef = (self.coef.to(added.dtype) + added).to(self.dtype)

    def refit(self, period: int, length: int, longer: int) -> None:
        states = self.coef.shape[-2]
        r = resynthesize(self.coef.to(self.mean.dtype), period, length)
        self.coef = analyze(r, states, longer).to(self.dtype)

    def channels(self, period: int, length: int) -> torch.Tensor:
        r = resynthesize(self.coef.to(self.gain.dtype), period, length)
        return (r * self.gain[:, None] + self.shift[:, None]).to(self.dtype)

    FIELDS = ("kept", "coef", "mean", "reach", "gain", "shift")

    def move(self, device: torch.device | str) -> None:
        for field in self.FIELDS:
            setattr(self, field, getattr(self, field).to(device))

    def state(self) -> State:
        return {field: getattr(self, field) for field in self.FIELDS}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "PeriodGroup":
        made = object.__new__(cls)
        demand(set(state) == set(cls.FIELDS), f"a group of channels comes with {sorted(state)}")
        vars(made).update(state, dtype=state["coef"].dtype)
        return made

    def clone(self) -> "PeriodGroup":
        copy = object.__new__(PeriodGroup)
        copy.dtype = self.dtype
        for field in self.FIELDS:
            setattr(copy, field, getattr(self, field).clone())
        return copy


def stack(groups: Sequence[PeriodGroup], field: str) -> torch.Tensor:
    """A field of the same head group of several rows, with the rows first; `kept` is padded to the longest row."""
    tensors = [getattr(group, field) for group in groups]
    if len(tensors) == 1:
        return tensors[0][None]
    longest = max(x.shape[-2] for x in tensors)
    return torch.stack([torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[-2])) for x in tensors])


def _pick(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return x if rows == list(range(len(x))) else x[rows]


class Row:
    """One row of the batch: its period, its length, and its K and V groups. Rows share nothing."""

    def __init__(self) -> None:
        self.period = 0
        self.length = 0
        self.k: list[PeriodGroup] = []
        self.v: list[PeriodGroup] = []

    def groups(self) -> Iterator[PeriodGroup]:
        yield from self.k
        yield from self.v

    def clone(self) -> "Row":
        copy = Row()
        copy.period, copy.length = self.period, self.length
        copy.k, copy.v = [group.clone() for group in self.k], [group.clone() for group in self.v]
        return copy

    def state(self) -> State:
        made: State = {"period": self.period, "length": self.length, "groups": [len(self.k), len(self.v)]}
        for name in "kv":
            for i, group in enumerate(getattr(self, name)):
                made |= under(f"{name}.{i}", group.state())
        return made

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Row":
        made = cls()
        made.period, made.length = state["period"], state["length"]
        for name, count in zip("kv", state["groups"], strict=True):
            groups = [PeriodGroup.of_state(within(f"{name}.{i}", state)) for i in range(count)]
            demand(all(g.kept.shape[1] == made.length for g in groups), f"{made.length} tokens, and others are kept")
            setattr(made, name, groups)
        return made


class PeriodStore:
    """The middle of a batch, each row one period. Answers to what `PageStore` does, but never unpacks: see
    `expands`."""

    def __init__(
        self, batch: int, split_k: ChannelSplit, split_v: ChannelSplit, states: int, reserve: int, stretch: bool
    ):
        self.split_k, self.split_v = split_k, split_v
        self.states, self.reserve, self.stretch = states, reserve, stretch
        self.rows = [Row() for _ in range(batch)]

    @property
    def tokens(self) -> list[int]:
        return [row.length for row in self.rows]

    def due(self, row: int, waiting: int) -> int:
        if self.rows[row].length == 0:
            return waiting if waiting > self.states else 0  # fewer tokens than states would take more memory, not less
        return waiting if waiting >= FLUSH else 0

    def append(self, row: int | None, k: torch.Tensor, v: torch.Tensor) -> None:
        for i, r in enumerate(range(len(self.rows)) if row is None else [row]):
            self._append(self.rows[r], k[i : i + 1], v[i : i + 1])

    def _append(self, row: Row, k: torch.Tensor, v: torch.Tensor) -> None:
        end = row.length + k.shape[2]
        if row.length and end > row.period:
            longer = smooth_ge(end + max(self.reserve, end // 4))
            for group in row.groups():
                group.refit(row.period, row.length, longer)
            row.period = longer
        elif not row.length:
            row.period = smooth_ge(end + self.reserve)
        for groups, split, x in ((row.k, self.split_k, k), (row.v, self.split_v, v)):
            for i, (kept, comp) in enumerate(split.split(x)):
                if row.length:
                    groups[i].join(kept[0], comp[0], row.length, row.period)
                else:
                    groups.append(PeriodGroup(kept[0], comp[0], self.states, row.period))
        row.length = end
        for group in row.groups():
            group.correct(row.period, end, self.stretch)

    def _alike(self) -> Iterator[tuple[list[int], int, int, torch.Tensor | None]]:
        """Rows with the same period, which share their transforms: (rows, period, longest, columns to blank).

        Where lengths differ, the last is bool [rows, 1, 1, longest], True after a row's end.
        """
        same: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            if row.length:
                same.setdefault(row.period, []).append(i)
        for period, rows in same.items():
            lengths = [self.rows[i].length for i in rows]
            longest, beyond = max(lengths), None
            if min(lengths) < longest:
                like = self.rows[rows[0]].k[0].kept
                ends = torch.tensor(lengths, device=like.device)[:, None, None, None]
                beyond = torch.arange(longest, device=like.device) >= ends
            yield rows, period, longest, beyond

    def expands(self, q: torch.Tensor) -> bool:
        """Never: rebuilding a period costs as much as attending over it."""
        return False

    def attend(self, *args: object) -> None:
        """No kernel knows a period."""

    def answers(self) -> list[str]:
        return ["plain torch (a period has no kernel)"]

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """q [B, H, R, D] -> unscaled scores [B, H, R, longest]; columns after a row's end are zero."""
        out = q.new_zeros(*q.shape[:3], max(self.tokens))
        for rows, period, longest, beyond in self._alike():
            parts = []
            for groups, (q_kept, q_comp) in zip(
                zip(*(self.rows[i].k for i in rows), strict=True), self.split_k.split(_pick(q, rows)), strict=True
            ):
                gain, shift = stack(groups, "gain"), stack(groups, "shift").to(q.dtype)
                spectrum = (q_comp * gain[..., None, :]) @ stack(groups, "coef").to(q.dtype).mT  # [rows, heads, R, S]
                smooth = resynthesize(spectrum.mT, period, longest).mT
                part = smooth + q_comp @ shift[..., None] + q_kept @ stack(groups, "kept").to(q.dtype).mT
                parts.append(part if beyond is None else part.masked_fill(beyond, 0))
            out[rows, ..., :longest] = self.split_k.stack(parts)
        return out

    def mix(self, p: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, H, R, longest] -> their share of the output [B, H, R, D]."""
        out = p.new_zeros(*p.shape[:3], self.split_v.dim)
        for rows, period, longest, beyond in self._alike():
            own = _pick(p, rows)[..., :longest]
            own = own if beyond is None else own.masked_fill(beyond, 0)
            parts = []
            for groups, part in zip(
                zip(*(self.rows[i].v for i in rows), strict=True), self.split_v.select(own), strict=True
            ):
                spectrum = analyze(part.mT, self.states, period).mT  # [rows, heads, R, S]
                comp = spectrum @ stack(groups, "coef").to(p.dtype) * stack(groups, "gain")[..., None, :]
                comp = comp + part.sum(-1, keepdim=True) * stack(groups, "shift").to(p.dtype)[..., None, :]
                parts.append((part @ stack(groups, "kept").to(p.dtype), comp))
            out[rows] = self.split_v.join(parts)
        return out

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        sides = []
        for name, split in (("k", self.split_k), ("v", self.split_v)):
            rows: list[torch.Tensor | None] = []
            for row in self.rows:
                if not row.length:
                    rows.append(None)
                    continue
                parts = [(g.kept[None], g.channels(row.period, row.length)[None]) for g in getattr(row, name)]
                rows.append(split.join(parts)[0])
            like = next(x for x in rows if x is not None)
            whole = like.new_zeros(len(rows), split.heads, max(self.tokens), split.dim)
            for i, x in enumerate(rows):
                if x is not None:
                    whole[i, :, : x.shape[1]] = x
            sides.append(whole)
        return sides[0], sides[1]

    def index(self) -> Iterator[torch.Tensor]:
        yield from self.split_k.tensors()
        yield from self.split_v.tensors()

    def span(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`materialize` of a row's middle tokens start to stop: [H, stop - start, D] each."""
        own = self.rows[row]
        sides = []
        for groups, split in ((own.k, self.split_k), (own.v, self.split_v)):
            parts = [(g.kept[None], g.channels(own.period, own.length)[None]) for g in groups]
            sides.append(split.join(parts)[0, :, start:stop])
        return sides[0], sides[1]

    def state(self) -> State:
        """Everything held, not copied. Which channels are kept follows from the splits."""
        made: State = {}
        for i, row in enumerate(self.rows):
            made |= under(f"rows.{i}", row.state())
        return made

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave, on the device where it lies. ValueError where it does not fit together."""
        rows = [Row.of_state(within(f"rows.{i}", state)) for i in range(len(self.rows))]
        for row in rows:
            for groups, split in ((row.k, self.split_k), (row.v, self.split_v)):
                fits = len(groups) == (len(split.groups) if row.length else 0)
                demand(fits, f"a row of {row.length} tokens has {len(groups)} groups of channels")
        self.rows = rows
        for group in (group for row in rows for group in row.groups()):
            self.split_k.move(group.kept.device)
            self.split_v.move(group.kept.device)
            break

    def parts(self) -> dict[str, list[torch.Tensor]]:
        groups = [group for row in self.rows for group in row.groups()]
        return {
            "kept": [g.kept for g in groups],
            "coefficients": [g.coef for g in groups],
            "corrections": [x for g in groups for x in (g.mean, g.reach, g.gain, g.shift)],
        }

    def move(self, device: torch.device | str) -> None:
        for row in self.rows:
            for group in row.groups():
                group.move(device)
        self.split_k.move(device)
        self.split_v.move(device)

    def select(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[row].clone() for row in rows.tolist()]
