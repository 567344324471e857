"""Needles in a haystack: sentences that give a key its value, among essays, repeated noise or more such sentences."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Mapping
from typing import Any

from longwave.evals import data
from longwave.evals.tasks.ruler.maker import SHORT, TEXTS, Drawn, Maker, Source, words

DEPTHS = [round(100 * number / 39) for number in range(40)]  # percent
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Niah(Maker):
    def __init__(self, source: Source, parameters: Mapping[str, Any], length: int):
        self.keys, self.queries = parameters["num_needle_k"], parameters["num_needle_q"]
        self.keys = max(self.keys, self.queries)
        self.values = parameters["num_needle_v"]
        self.key_kind, self.value_kind = parameters["type_needle_k"], parameters["type_needle_v"]
        self.haystack = parameters["type_haystack"]
        self.sentence, self.noise = source.text("needle"), source.text("noise")
        self.template = source.template("niah")
        self.shown = self.value_kind
        if self.queries * self.values == 1:
            self.template, self.shown = self.template.singular(), self.value_kind.removesuffix("s")
        self.least = self.keys * self.values
        self.words: list[str] = []
        if self.haystack == "essay":
            self.words = source.words
            self.most, self.units = len(self.words), "words of the haystack"
            self.step = 500 if length >= SHORT else 50
        else:
            self.units = "lines"
            self.step = 25 if length >= SHORT else 5

    def draw(self, draw: random.Random, size: int, index: int) -> Drawn:
        taken: set[str] = set()
        keys = [fresh(draw, self.key_kind, taken) for _ in range(self.keys)]
        values = {key: [fresh(draw, self.value_kind, taken) for _ in range(self.values)] for key in keys}
        hidden = [(key, value) for key in keys for value in values[key]]
        draw.shuffle(hidden)
        needles = [self._needle(key, value) for key, value in hidden]
        if self.haystack == "essay":
            context, depths = self._among_sentences(draw, " ".join(self.words[:size]), needles)
        else:
            if self.haystack == "noise":
                lines = [self.noise] * size
            else:
                made = ((fresh(draw, self.key_kind, taken), fresh(draw, self.value_kind, taken)) for _ in range(size))
                lines = [self._needle(key, value) for key, value in made]
            context, depths = self._among_lines(draw, lines, needles)
        asked = draw.sample(keys, self.queries)
        answers = [value for key in asked for value in values[key]]
        at = {value: depth for (_, value), depth in zip(hidden, depths, strict=True)}
        meta = {"depths": [at[value] for value in answers]}
        return self.template.fill(context, answers, meta, type_needle_v=self.shown, query=listing(asked))

    def _needle(self, key: str, value: str) -> str:
        return data.fill(self.sentence, f"needle in {TEXTS}", type_needle_v=self.value_kind, key=key, value=value)

    def _among_sentences(self, draw: random.Random, text: str, needles: list[str]) -> tuple[str, list[int]]:
        sentences = SENTENCE_END.split(text)
        depths = sorted(draw.sample(DEPTHS, len(needles)))
        places = [int(len(sentences) * depth / 100) for depth in depths]
        for needle, place in reversed(list(zip(needles, places, strict=True))):
            sentences.insert(place, needle)
        return " ".join(sentences), depths

    def _among_lines(self, draw: random.Random, lines: list[str], needles: list[str]) -> tuple[str, list[int]]:
        places = sorted(draw.sample(range(len(lines)), len(needles)))
        depths = [round(100 * place / len(lines)) for place in places]
        for needle, place in reversed(list(zip(needles, places, strict=True))):
            lines.insert(place, needle)
        return "\n".join(lines), depths


def fresh(draw: random.Random, kind: str, taken: set[str]) -> str:
    """A key or value that this prompt does not have yet."""
    while True:
        if kind == "numbers":
            made = str(draw.randrange(10**6, 10**7))
        elif kind == "uuids":
            made = str(uuid.UUID(int=draw.getrandbits(128), version=4))
        elif kind == "words":
            made = f"{draw.choice(words('adjective'))}-{draw.choice(words('noun'))}"
        else:
            raise ValueError(f"needles are made of words, numbers or uuids, not {kind!r}")
        if made not in taken:
            taken.add(made)
            return made


def listing(names: list[str]) -> str:
    """ "a", or "a, b, and c"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
