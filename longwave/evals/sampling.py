"""How a masked-diffusion model answers: options that stand in a method's spec beside its own, as in
"fourier:budget=0.25,steps=64,keep=dual". What is left out is filled in, so that a label says how an answer came about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longwave.checks import nearest, whole
from longwave.evals.spec import parse_spec

STEPS, BLOCK = 64, 32
KEEPS = ("prefix", "dual")


@dataclass(frozen=True)
class Sampling:
    """Options of `longwave.diffusion.generate`, greedy, by the sampler that the model's logits are for.

    steps: of the whole answer, at most as many as it has tokens, the same number in every block. threshold: instead of
    steps. block_length: tokens of a block; an answer of fewer is one block. keep: what a cache holds while a block is
    written, "prefix" or "dual"; None: nothing is held, and all is read in every pass. refresh, delay: of the cache.
    """

    steps: int | None = None
    threshold: float | None = None
    block_length: int = BLOCK
    keep: str | None = None
    refresh: int | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        if self.threshold is None:
            whole("steps", STEPS if self.steps is None else self.steps, 1, "steps of an answer")
            object.__setattr__(self, "steps", self.steps or STEPS)
        elif self.steps is not None:
            raise ValueError("steps decide nothing where a threshold says how many tokens a step keeps: give one")
        elif isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise ValueError(f"threshold is a confidence, got {self.threshold!r}")
        elif not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is a confidence above 0 and at most 1, such as 0.9; got {self.threshold!r}")
        whole("block_length", self.block_length, 1, "tokens")
        whole("delay", self.delay, 0, "passes")
        if self.refresh is not None:
            whole("refresh", self.refresh, 1, "passes")
        if self.keep is None:
            for name, value in (("refresh", self.refresh), ("delay", self.delay or None)):
                if value is not None:
                    raise ValueError(f"{name}={value} decides nothing where nothing is held: give keep with it")
        elif self.keep not in KEEPS:
            raise ValueError(f"unknown keep {self.keep!r}: {nearest(str(self.keep), KEEPS)}")

    def lengths(self, new_tokens: int) -> tuple[int, int, int | None]:
        """Tokens that are written so that there are `new_tokens`, in whole blocks; those of a block; steps in all."""
        length = min(self.block_length, new_tokens)
        count = -(-new_tokens // length)
        steps = None if self.steps is None else count * min(length, -(-self.steps // count))
        return count * length, length, steps

    def __str__(self) -> str:
        many = (
            f"{self.steps} steps" if self.threshold is None else f"all tokens of confidence {self.threshold:g} a step"
        )
        held = "nothing held" if self.keep is None else f"{self.keep} held"
        more = f", anew after {self.refresh} passes" if self.refresh else ""
        more += f", from pass {self.delay + 1} of a block on" if self.delay else ""
        return f"{many}, blocks of {self.block_length}, {held}{more}"


def split(spec: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A method's name, its own options with the budget, and those of sampling; a name that both have is the method's
    (`keep` of fourier-paper)."""
    from longwave.methods import METHODS

    name, options = parse_spec(spec)
    own = METHODS[name].__dataclass_fields__ if name in METHODS else {}
    sampled = {key: options.pop(key) for key in Sampling.__dataclass_fields__ if key in options and key not in own}
    return name, options, sampled


def read_sampling(spec: str) -> Sampling:
    """What a spec says and leaves out: a method other than "dense" holds what comes before a block unless it says
    otherwise; "dense" by itself is the model without a cache."""
    name, _, given = split(spec)
    try:
        return Sampling(**({} if name == "dense" else {"keep": KEEPS[0]}) | given)
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from None


def completed(spec: str) -> str:
    """A spec with what it leaves out of sampling: "dense" -> "dense:steps=64,block_length=32"."""
    sampling, (_, _, given) = read_sampling(spec), split(spec)
    _, options = parse_spec(spec)
    names = ("steps" if sampling.threshold is None else "threshold", "block_length", "keep")
    missing = {name: getattr(sampling, name) for name in names if name not in given and name not in options}
    added = ",".join(f"{name}={value}" for name, value in missing.items() if value is not None)
    return spec + (("," if ":" in spec else ":") + added if added else "")
