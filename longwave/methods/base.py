"""What a method is to the rest of the package: `Method`, what the user sets, and `Bound`, what follows for a model."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from longwave.frame import MemoryLayer, Needs
from longwave.plan.profile import Profile
from longwave.shape import CacheShape

__all__ = ["Bound", "CacheShape", "Method"]


class Unmeasured(ValueError):
    """Options that cannot be bound without a measurement of the model."""


@dataclass(frozen=True)
class Method(ABC):
    """Options of a method: frozen, comparable, and checked when built."""

    name: ClassVar[str]
    uses_profile: ClassVar[bool] = False  # whether a measurement of the model decides anything
    learns: ClassVar[bool] = False  # whether `known` looks at the model
    steps_alone: ClassVar[bool] = False  # whether it is itself in steps of one token only, and else reads all

    @abstractmethod
    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> Bound:
        """Everything decided, for a model's shape and what was measured on it. `budget` is a fraction of the dense
        bytes of the middle; None leaves it to the method. Raises ValueError for a budget that cannot be met."""

    def check(self, device: torch.device) -> None:
        """Raise ValueError for a model on `device` that these options mean nothing to."""
        return None

    def beforehand(self) -> str | None:
        """What has to be done before a model can read a prompt into its cache, for whoever does not do it; None where
        nothing has to."""
        return None

    def known(self, model: PreTrainedModel, shape: CacheShape, tokenizer: Any) -> Method:
        """The same options with what they need to know of the model's own numbers, found out once."""
        return self

    def measured_by(self) -> Any:
        """The method whose pages' costs a plan is made of, which `longwave.cache` measures on a model that has no
        profile; None where no plan is."""
        return None

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        """The smallest fraction that `bind` accepts."""
        return 0.0

    def near(self) -> Method:
        """The same options with all that is held on the device; itself where none of them says otherwise."""
        return self

    def fits_budget(self) -> bool:
        """Whether a budget decides how many bytes are held: False where the options already say everything."""
        return True


@dataclass(frozen=True, eq=False)
class Bound(ABC):
    """A method bound to a model's shape, a measurement and a budget: every decision made, exact to the byte.

    budget: the fraction it was bound to. profile: digest of the measurement that decided, "" for none. Two of them are
    equal if all that they decide is: see `digest`.
    """

    method: Method
    shape: CacheShape
    budget: float | None = None
    profile: str = ""

    @abstractmethod
    def layer(self, index: int) -> MemoryLayer:
        """An empty layer for the model's layer `index`."""

    @abstractmethod
    def layer_bytes(self, index: int, tokens: int) -> int:
        """Bytes that layer `index` holds for one row after a prompt of `tokens`, to the byte."""

    def shared_bytes(self, index: int, tokens: int) -> int:
        """Of `layer_bytes`, what all rows of a batch share."""
        return 0

    def decisions(self) -> Iterator[bytes]:
        """What was decided beyond method, shape and budget, for the digest."""
        return iter(())

    @property
    def needs(self) -> Needs:
        """What its layers ask of the frame."""
        return Needs()

    @property
    def reads_exactly(self) -> bool:
        """Whether a prompt given in one call is read with full attention: then one reading serves many methods."""
        return True

    def reach(self, limit: int) -> int | None:
        """Tokens that a model which knows `limit` positions reads at most with it, prompt and answer together; None for
        any number."""
        return limit

    def at_once(self, limit: int) -> int | None:
        """Tokens that one pass may bring of a text longer than the `limit` positions that a model knows; None for any
        number."""
        return None

    def passes(self, tokens: int, limit: int | None, asked: int | None = None) -> int | None:
        """The same of a text of so many tokens; a model may name no limit. asked: what a user wants instead; ValueError
        where that is more."""
        most = None if limit is None or tokens <= limit else self.at_once(limit)
        if asked is not None and most is not None and asked > most:
            raise ValueError(
                f"a pass of {asked:,} tokens beside what {self.method.name} holds would take more than the model's "
                f"{limit:,} positions: read {most:,} tokens a pass, or fewer"
            )
        return most if asked is None else asked

    @property
    def warning(self) -> str | None:
        """What a user should know before relying on it."""
        return None

    @property
    def digest(self) -> str:
        """Hex digest of everything that decides what is stored: two different plans never share one."""
        found = hashlib.sha256(f"{self.method!r} {self.shape!r} {self.budget!r}".encode())
        for part in self.decisions():
            found.update(len(part).to_bytes(8, "little") + part)
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bound) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return self.method.name

    def nbytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of the whole cache for `batch` rows of `tokens` each, sliding layers included."""
        memory = sum(self.layer_bytes(index, tokens) for index in self.shape.memory_layers)
        once = sum(self.shared_bytes(index, tokens) for index in self.shape.memory_layers) if batch > 1 else 0
        return batch * (memory + self.shape.sliding_bytes(tokens)) - (batch - 1) * once

    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        """The most that the cache holds on the way to `tokens`."""
        return self.nbytes(tokens, batch)

    def device_bytes(self, tokens: int, batch: int = 1) -> int:
        """Of `peak_bytes`, what counts against a budget given as a size: all, unless options put it elsewhere."""
        return self.peak_bytes(tokens, batch)
