"""Mean and variance of what rows say, feature by feature and lesson by lesson; the last lessons can be taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from longwave.store.state import State, demand

KEPT = 3  # what was known last, and before each of the last two lessons
UNKNOWN = torch.iinfo(torch.int64).max  # a time that no row has come back to


class Running:
    """Every lesson of a row counts as one, up to `horizon` of them; from then on a new one counts 1 / horizon.

    Until a row has `start` tokens nothing is learnt, so that to come back to there is to know nothing.
    """

    def __init__(self, batch: int, features: int, horizon: int, start: int, dtype: torch.dtype, device: torch.device):
        self.horizon, self.start = horizon, start
        self.moments = torch.zeros(batch, KEPT, 2, features, dtype=dtype, device=device)  # newest first
        self.lessons = torch.zeros(batch, KEPT, dtype=torch.int64, device=device)
        self.time = torch.full_like(self.lessons, start)  # tokens of the row by then

    @staticmethod
    def nbytes(features: int, itemsize: int) -> int:
        """Of one row."""
        return KEPT * (2 * features * itemsize + 16)

    @property
    def mean(self) -> torch.Tensor:
        """[batch, features]."""
        return self.moments[:, 0, 0]

    @property
    def variance(self) -> torch.Tensor:
        """[batch, features]."""
        return self.moments[:, 0, 1]

    def learn(self, x: torch.Tensor, there: torch.Tensor, time: torch.Tensor) -> None:
        """A lesson x [batch, n, features], of which those count that are there, bool [batch, n], to rows that have
        `time` tokens [batch] with it. None to a row that has no more than `start`, or of fewer than two."""
        count = there.sum(-1)
        some, weight = count.clamp(min=1)[:, None], there[..., None].to(x.dtype)
        mean = (x * weight).sum(1) / some
        variance = ((x - mean[:, None]).square() * weight).sum(1) / some
        rate = 1 / (self.lessons[:, :1] + 1).clamp(max=self.horizon).to(x.dtype)
        off = mean - self.mean
        spread = (1 - rate) * (self.variance + rate * off.square()) + rate * variance
        new = torch.stack([self.mean + rate * off, spread], 1)[:, None]
        told = ((count > 1) & (time > self.start))[:, None]
        self.moments = torch.where(told[..., None, None], torch.cat([new, self.moments[:, :-1]], 1), self.moments)
        made = torch.cat([self.lessons[:, :1] + 1, self.lessons[:, :-1]], 1)
        self.lessons = torch.where(told, made, self.lessons)
        self.time = torch.where(told, torch.cat([time[:, None], self.time[:, :-1]], 1), self.time)

    def remembers(self, lengths: list[int]) -> list[bool]:
        """Whether it is known of each row what was known when it had so many tokens."""
        first = self.time.amin(-1).tolist()
        return [length <= self.start or time <= length for length, time in zip(lengths, first, strict=True)]

    def back(self, lengths: list[int]) -> None:
        """To what was known then, which it `remembers`."""
        left = torch.tensor(lengths, device=self.time.device)[:, None]
        fresh = left <= self.start
        later = (self.time > left).long().cumprod(-1).sum(-1, keepdim=True)
        at = torch.arange(KEPT, device=left.device) + later
        lost, at = at >= KEPT, at.clamp(max=KEPT - 1)
        moments = self.moments.gather(1, at[..., None, None].expand_as(self.moments))
        self.moments = moments.masked_fill((lost | fresh)[..., None, None], 0)
        self.lessons = self.lessons.gather(1, at).masked_fill(lost | fresh, 0)
        self.time = self.time.gather(1, at).masked_fill(lost, UNKNOWN).masked_fill(fresh, self.start)

    def tensors(self) -> list[torch.Tensor]:
        return [self.moments, self.lessons, self.time]

    def _put(self, tensors: list[torch.Tensor]) -> None:
        self.moments, self.lessons, self.time = tensors

    def move(self, device: torch.device | str) -> None:
        self._put([x.to(device) for x in self.tensors()])

    def select(self, rows: torch.Tensor) -> None:
        self._put([x.index_select(0, rows.to(x.device)) for x in self.tensors()])

    def state(self) -> State:
        return {"moments": self.moments, "lessons": self.lessons, "time": self.time}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """What `state` gave, of as many rows and features."""
        for name, own in self.state().items():
            found = state[name]
            demand(found.shape == own.shape and found.dtype == own.dtype, f"{name} are {list(found.shape)}")
        self._put([state["moments"], state["lessons"], state["time"]])
