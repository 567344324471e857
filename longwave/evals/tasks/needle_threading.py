"""Needle Threading (arXiv 2411.05000): one value, several, or chains of them in a JSON object of uuid pairs.

Kinds:

- "single": the value of a key, at `depths`.
- "multi": the values of `needles` keys that lie anywhere.
- "conditional": the values of all keys that hold a sign which no other key holds.
- "thread": a value may itself be a key; where the chain of `steps` pairs from a key ends. `direction` says how the
  chain lies in the text: "forward", "backward" or "random".
- "multi_thread": the ends of `needles` such chains.

The object is the paper's (its published example is made again, byte for byte), and so is the question of "single"; the
code of the rest was never published, so those prompts and all scores are ours ("-like"). Lengths are characters, 80 a
pair, as in the paper, since tokenizers differ; a prompt's tokens stand in its result. Score: the first uuid of the
answer is the value; of several, the share that is named (with the F1, which extra values cost, as a metric).
"""

from __future__ import annotations

import json
import random
import re
import uuid
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from longwave.checks import whole
from longwave.evals.metrics import overlap_f1
from longwave.evals.task import Judged, Sample, Setting, TextTask, chosen, listed

KINDS = ("single", "multi", "conditional", "thread", "multi_thread")
DIRECTIONS = ("forward", "backward", "random")
PAIR = 80  # characters
NEW_TOKENS = 48  # a value; a uuid takes up to 40
SIGNS = "*#@&%"
UUID = re.compile(r"[0-9a-f*#@&%]{8}(?:-[0-9a-f*#@&%]{4}){3}-[0-9a-f*#@&%]{12}")
ONE = "Extract the value corresponding to the specified key in the JSON object. Key: "
FOLLOW = "The value of a key may itself be a key. "


@dataclass(frozen=True)
class NeedleThreading(TextTask):
    """Values and chains of values in a JSON object of uuid pairs (like Needle Threading)."""

    name: ClassVar[str] = "needle-threading-like"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "kind"
    equal_sets: ClassVar[bool] = True
    heat: ClassVar[tuple[str, str]] = ("kind", "length")

    kinds: Any = KINDS
    lengths: Any = (2000, 4000)  # characters of the object
    depths: Any = (0.0, 0.25, 0.5, 0.75, 1.0)  # single: shares of the pairs before the asked one
    needles: int = 2  # multi, conditional: keys; multi_thread: chains
    steps: int = 3  # pairs of a chain
    direction: str = "forward"
    repeats: int = 5  # objects

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", chosen(self.kinds, KINDS, "the kinds of needle-threading-like"))
        object.__setattr__(self, "lengths", listed(self.lengths, int, "lengths"))
        object.__setattr__(self, "depths", listed(self.depths, float, "depths"))
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths are shares from 0 to 1, got {depth}")
        for name, least in (("needles", 1), ("steps", 2), ("repeats", 1)):
            whole(name, getattr(self, name), least)
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is one of {', '.join(DIRECTIONS)}; got {self.direction!r}")
        if min(self.lengths) // PAIR < self.most:
            raise ValueError(
                f"a length of {min(self.lengths)} characters holds {min(self.lengths) // PAIR} pairs, and {self.most} "
                f"are asked for: {PAIR * self.most} or more"
            )

    @property
    def most(self) -> int:
        """Pairs that a question may be about."""
        several = self.needles * (self.steps if "multi_thread" in self.kinds else 1)
        return max(several, self.steps, 2)

    def samples(self, setting: Setting) -> list[Sample]:
        made: list[Sample] = []
        for kind in self.kinds:
            cells = []
            for length in self.lengths:
                for repeat in range(self.repeats):
                    for depth in self.depths if kind == "single" else (None,):
                        cells.append(self._sample(setting, kind, length, repeat, depth))
            made += setting.limited(cells)
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        named = list(dict.fromkeys(UUID.findall(output.lower())))
        if len(sample.answers) == 1:
            parsed = named[0] if named else None
            return Judged(float(parsed == sample.answers[0]), parsed)
        found = sum(answer in named for answer in sample.answers)
        return Judged(found / len(sample.answers), named, {"f1": overlap_f1(named, sample.answers)})

    def _sample(self, setting: Setting, kind: str, length: int, repeat: int, depth: float | None) -> Sample:
        at = "" if depth is None else f"/{depth:g}"
        draw = random.Random(f"needle_threading/{kind}/{length}/{repeat}{at}/{setting.seed}")
        pairs = make_pairs(length // PAIR, repeat if setting.seed == 42 else draw.getrandbits(64))
        question, answers = self._ask(draw, kind, pairs, depth)
        text = json.dumps(dict(pairs))
        ids, before = setting.encode(f"{text}\n{question}", question.rstrip())
        new = NEW_TOKENS * len(answers)
        setting.check_fits(len(ids), new, f"{self.name} at {length} characters")
        meta = {"kind": kind, "length": length, "repeat": repeat, "characters": len(text)}
        if depth is not None:
            meta["depth"] = depth
        return Sample(f"{kind}/{length}/{repeat}{at}", ids, before, new, tuple(answers), meta)

    def _ask(
        self, draw: random.Random, kind: str, pairs: list[tuple[str, str]], depth: float | None
    ) -> tuple[str, list[str]]:
        """The question and its answers; changes the pairs where the kind wants them changed."""
        if kind == "single":
            key, value = pairs[round((depth or 0.0) * (len(pairs) - 1))]
            return f'{ONE}"{key}"\n Corresponding value: ', [value]
        if kind in ("multi", "conditional"):
            where = sorted(draw.sample(range(len(pairs)), self.needles))
            if kind == "multi":
                keys = json.dumps([pairs[place][0] for place in where])
                asked = f"Extract the values corresponding to the specified keys in the JSON object. Keys: {keys}"
            else:
                sign = draw.choice(SIGNS)
                for place in where:
                    pairs[place] = (signed(draw, pairs[place][0], sign), pairs[place][1])
                asked = f'Extract the values of all keys of the JSON object that contain the character "{sign}".'
            return f"{asked}\n Corresponding values: ", [pairs[place][1] for place in where]
        threads = self.needles if kind == "multi_thread" else 1
        places = draw.sample(range(len(pairs)), threads * self.steps)
        chains = [self._order(places[n * self.steps : (n + 1) * self.steps]) for n in range(threads)]
        for chain in chains:
            for one, following in pairwise(chain):
                pairs[one] = (pairs[one][0], pairs[following][0])
        starts, ends = [pairs[chain[0]][0] for chain in chains], [pairs[chain[-1]][1] for chain in chains]
        if threads == 1:
            start = f'Start at the specified key and follow the values until one is not a key. Key: "{starts[0]}"'
            return f"{FOLLOW}{start}\n Final value: ", ends
        start = f"Start at each specified key and follow the values until one is not a key. Keys: {json.dumps(starts)}"
        return f"{FOLLOW}{start}\n Final values: ", ends

    def _order(self, places: list[int]) -> list[int]:
        if self.direction == "random":
            return places
        return sorted(places, reverse=self.direction == "backward")


def make_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Keys and values drawn in turn, as in the paper: random numbers of 128 bits, no version among them."""
    draw = random.Random(seed)

    def one() -> str:
        return str(uuid.UUID(int=draw.getrandbits(128)))

    return [(one(), one()) for _ in range(count)]


def signed(draw: random.Random, key: str, sign: str) -> str:
    """`key` with one of its digits replaced by `sign`."""
    place = draw.choice([number for number, digit in enumerate(key) if digit != "-"])
    return key[:place] + sign + key[place + 1 :]
