"""Aggregation: cwe asks for the most common words of a list, fwe for the most frequent made-up ones."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Mapping, Sequence
from typing import Any

from longwave.checks import read_text
from longwave.evals import data
from longwave.evals.tasks.ruler.maker import SHORT, Drawn, Maker, Source, words

MORE_WORDS = "wordlists/english_words_nltk_3_10.txt"


class CommonWords(Maker):
    """cwe: a numbered list in which some words come more often, after one solved example. Size: different words."""

    units = "words"
    step = 10

    def __init__(self, source: Source, parameters: Mapping[str, Any], length: int):
        self.source = source
        self.common = parameters["num_cw"]
        self.times, self.example = (parameters["freq_cw"], parameters["freq_ucw"]), (40, (10, 3))
        if length < SHORT:
            self.times, self.example = (6, 1), (20, (3, 1))
        self.template = source.template("common_words_extraction")
        self.least = self.common + 1
        self.words: Sequence[str] = sorted({word for kind in ("noun", "adjective", "verb") for word in words(kind)})
        self.more: Sequence[str] = ()  # read where the words are too few

    def draw(self, draw: random.Random, size: int, index: int) -> Drawn:
        solved = self._task(draw, *self.example)
        task = self._task(draw, size, self.times)
        example = f"{solved.prompt}{solved.prefix} {numbered(solved.answers)}"
        return Drawn(f"{example}\n{task.prompt}", task.question, task.prefix, task.answers)

    def _task(self, draw: random.Random, size: int, times: tuple[int, int]) -> Drawn:
        picked = draw.sample(self._bank(size), size)
        common, others = picked[: self.common], picked[self.common :]
        listed = common * times[0] + others * times[1]
        draw.shuffle(listed)
        return self.template.fill(numbered(listed), common, {})

    def _bank(self, size: int) -> Sequence[str]:
        if size <= len(self.words):
            return self.words
        if not self.more:
            path = data.require(self.source.setting.data, MORE_WORDS, "ruler's cwe at this length")
            self.more = read_text(path).split()
        if size > len(self.more):
            raise ValueError(
                f"cwe needs {size} different words, {MORE_WORDS} has {len(self.more)}: use a shorter length"
            )
        return self.more


class FrequentWords(Maker):
    """fwe: made-up words whose counts fall as their rank squared; the first rank is noise. Size: words counted."""

    units = "words"
    least = 100  # fewer leave ties among the ranks that are asked for

    def __init__(self, source: Source, parameters: Mapping[str, Any], length: int):
        self.alpha = parameters["alpha"]
        self.template = source.template("freq_words_extraction")
        self.vocabulary = max(length // 50, 5)
        self.step = max(length // 32, 1)

    def draw(self, draw: random.Random, size: int, index: int) -> Drawn:
        made = ["..."]
        while len(made) < self.vocabulary:
            word = "".join(draw.choices(string.ascii_lowercase, k=6))
            if word not in made:
                made.append(word)
        counts = zipf_counts(size, len(made), self.alpha)
        text = [word for word, count in zip(made, counts, strict=True) for _ in range(count)]
        draw.shuffle(text)
        return self.template.fill(" ".join(text), made[1:4], {})


def numbered(items: Sequence[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, 1))


def zipf_counts(total: int, ranks: int, alpha: float) -> list[int]:
    """floor(total * rank^-alpha / zeta(alpha)) for the ranks from 1."""
    return [int(total * rank**-alpha / zeta(alpha)) for rank in range(1, ranks + 1)]


def zeta(alpha: float, terms: int = 64) -> float:
    """Riemann's zeta function for alpha > 1: its first terms, the others by Euler and Maclaurin."""
    head = math.fsum(k**-alpha for k in range(1, terms))
    return head + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2 + alpha * terms ** (-alpha - 1) / 12
