"""How masks become tokens: LLaDA's sampler and Dream's. Both see one row at a time, and only its masks.

A sampler draws a token for every mask of a block, says how sure it is of each, and after each step says how many stay.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longwave.checks import nearest, whole
from longwave.diffusion import confidence
from longwave.diffusion.noise import Draws, categorical


@dataclass(frozen=True)
class Moment:
    """Where a block stands: step `step` of `steps`, of a block that began with `first` masks in this row."""

    step: int
    steps: int
    first: int


class Sampler(ABC):
    """What `generate` asks of a sampler."""

    guidance: float = 0.0  # of classifier-free guidance; 0: the prompt is never hidden

    @abstractmethod
    def draw(self, logits: torch.Tensor, draws: Draws, ends: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """For n masks of logits [n, vocabulary]: tokens int64 [n], and how sure it is of each, float64 [n].

        ends: the tokens that end an answer.
        """

    @abstractmethod
    def count(self, masked: int, at: Moment) -> int | None:
        """How many of a row's `masked` masks become tokens now; None where chance decides."""

    @abstractmethod
    def keep(self, sure: torch.Tensor, at: Moment, draws: Draws) -> torch.Tensor:
        """Which of the drawn tokens stay, by sure [n]: bool [n]."""

    @abstractmethod
    def why_no_threshold(self) -> str | None:
        """Why its confidence is none that a threshold could be set to; None where it is."""


@dataclass(frozen=True)
class LLaDA(Sampler):
    """LLaDA's sampler (arXiv 2502.09992): each step of a block turns as many masks into tokens as any other.

    temperature: of the drawn tokens; 0 takes the likeliest.
    remasking: "low_confidence": the likeliest of the drawn tokens stay; "random": any.
    guidance: w of classifier-free guidance (arXiv 2410.18514): logits u + (w + 1) (c - u), where u are those of the
        text with its prompt masked; every pass then reads twice as many rows.
    eos: "any": an end is a token as others; "last": of the drawn tokens those that end the answer are the least sure;
        "never": no such token is drawn.
    """

    temperature: float = 0.0
    remasking: str = "low_confidence"
    guidance: float = 0.0
    eos: str = "any"

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, math.inf)
        _number("guidance", self.guidance, 0, math.inf)
        _among("remasking", self.remasking, ("low_confidence", "random"))
        _among("eos", self.eos, ("any", "last", "never"))
        if self.eos == "last" and self.remasking == "random":
            raise ValueError('eos="last" is about how sure the sampler is, and remasking="random" does not ask')

    def draw(self, logits: torch.Tensor, draws: Draws, ends: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        last = list(ends)
        if self.eos == "never":
            logits = logits.index_fill(-1, torch.tensor(last, device=logits.device), float("-inf"))
        tokens = categorical(logits, self.temperature, draws)
        if self.remasking == "random":
            return tokens, draws.uniform(len(tokens))
        if self.eos == "last":
            logits = logits.index_fill(-1, torch.tensor(last, device=logits.device), float("-inf"))
        return tokens, confidence.probability(torch.softmax(logits.double(), -1), tokens)

    def count(self, masked: int, at: Moment) -> int:
        return min(masked, at.first // at.steps + (at.step < at.first % at.steps))

    def keep(self, sure: torch.Tensor, at: Moment, draws: Draws) -> torch.Tensor:
        return confidence.surest(sure, self.count(len(sure), at))

    def why_no_threshold(self) -> str | None:
        return 'remasking="random" is sure of nothing' if self.remasking == "random" else None


_SURE = {
    "maskgit_plus": confidence.probability,
    "topk_margin": confidence.margin,
    "entropy": confidence.order,
}


@dataclass(frozen=True)
class Dream(Sampler):
    """Dream's sampler (arXiv 2508.15487): noise t falls from 1 to `eps`; a step from t to s leaves s / t of the masks.

    algorithm: which of the drawn tokens stay. "origin": each by itself, with probability 1 - s / t; else that share of
        them, the surest by the token's probability ("maskgit_plus"), by the likeliest one's lead ("topk_margin") or by
        the least entropy ("entropy").
    temperature: of the drawn tokens; 0 takes the likeliest. top_p, top_k: what is drawn from, and what probabilities
        are of: the fewest tokens that make up so much, and so many at most.
    choice_temperature: of which tokens stay, drawn by softmax(sure / it) without repetition; 0 takes the surest.
    eps: noise that is left at the last step, where all masks go.
    """

    algorithm: str = "entropy"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    choice_temperature: float = 0.0
    eps: float = 1e-3

    def __post_init__(self) -> None:
        _among("algorithm", self.algorithm, ("origin", *_SURE))
        _number("temperature", self.temperature, 0, math.inf)
        _number("choice_temperature", self.choice_temperature, 0, math.inf)
        if not isinstance(self.eps, float) or not 0 < self.eps < 1:
            raise ValueError(f"eps is the noise that is left at the end, above 0 and below 1; got {self.eps!r}")
        if self.top_p is not None:
            _number("top_p", self.top_p, 0, 1)
            if not self.top_p:
                raise ValueError("top_p=0 leaves no token to draw: give a share above 0")
        if self.top_k is not None:
            whole("top_k", self.top_k, 1, "tokens")
        if self.algorithm == "origin":
            if self.choice_temperature:
                raise ValueError('choice_temperature decides nothing where algorithm="origin" asks chance alone')
            if not self.temperature and (self.top_p is not None or self.top_k is not None):
                raise ValueError('top_p and top_k decide nothing at temperature 0 with algorithm="origin"')

    def draw(self, logits: torch.Tensor, draws: Draws, ends: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.double() / (self.temperature or 1)
        if self.top_p is not None:
            logits = _nucleus(logits, self.top_p)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        tokens = categorical(logits, 1.0 if self.temperature else 0.0, draws)
        if self.algorithm == "origin":
            return tokens, logits.new_zeros(len(tokens))
        return tokens, _SURE[self.algorithm](torch.softmax(logits, -1), tokens)

    def _share(self, at: Moment) -> float:
        """Of the masks, what step `at` turns into tokens: 1 - s / t, and all at the last."""
        if at.step == at.steps - 1:
            return 1.0
        noise = torch.linspace(1, self.eps, at.steps + 1)
        return float(1 - noise[at.step + 1] / noise[at.step])

    def count(self, masked: int, at: Moment) -> int | None:
        return None if self.algorithm == "origin" else int(masked * self._share(at))

    def keep(self, sure: torch.Tensor, at: Moment, draws: Draws) -> torch.Tensor:
        count = self.count(len(sure), at)
        if count is None:
            return draws.uniform(len(sure)) < self._share(at)
        if self.choice_temperature:
            sure = sure / self.choice_temperature + draws.gumbel(len(sure))
        return confidence.surest(sure, count)

    def why_no_threshold(self) -> str | None:
        if self.algorithm in ("origin", "entropy"):
            return f'algorithm="{self.algorithm}" gives no probability: take "maskgit_plus" or "topk_margin"'
        return "choice_temperature draws what stays" if self.choice_temperature else None


def _nucleus(logits: torch.Tensor, share: float) -> torch.Tensor:
    """logits [n, vocabulary] of the fewest tokens that make up `share` of their softmax, -inf for the others."""
    ranked, where = logits.sort(dim=-1, descending=True)
    p = torch.softmax(ranked, -1)
    beyond = p.cumsum(-1) - p > share  # what comes before a token is enough
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, where, beyond), float("-inf"))


def _number(name: str, value: Any, least: float, most: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not least <= value <= most
        or value == math.inf
    ):
        bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} is a number {bounds}; got {value!r}")


def _among(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: {nearest(str(value), known)}")
