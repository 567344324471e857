"""What the thirteen tasks share: the protocol's texts, word lists, and the shape of a maker of prompts."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

from longwave.evals import data
from longwave.evals.task import Setting

SHORT = 4096  # the protocol's shortest length; below it smaller steps are taken
TEXTS = "ruler/templates_and_tasks.json"


@dataclass(frozen=True)
class Drawn:
    """One prompt, which ends with `question`. `prefix` opens the model's turn."""

    prompt: str
    question: str
    prefix: str
    answers: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Template:
    """The parts of a protocol text around the context, with places for values."""

    before: str
    question: str
    prefix: str
    new_tokens: int

    def singular(self) -> Template:
        """The form that asks for one value."""

        def one(text: str) -> str:
            return text.replace("Some", "A").replace("are all", "is").replace("are", "is")

        return replace(self, before=one(self.before), question=one(self.question), prefix=one(self.prefix))

    def fill(self, context: str, answers: Sequence[str], meta: Mapping[str, Any], **values: Any) -> Drawn:
        question = self.question.format(**values)
        prompt = self.before.format(**values) + context + question
        return Drawn(prompt, question, self.prefix.format(**values), tuple(answers), meta)


@dataclass(frozen=True)
class Source:
    """Where makers read: the protocol's texts and the haystack, each once."""

    setting: Setting
    haystack: str = "essays"

    @cached_property
    def texts(self) -> dict[str, Any]:
        return data.read_object(data.require(self.setting.data, TEXTS, "ruler"))

    def text(self, name: str) -> Any:
        return data.field(self.texts, name, TEXTS)

    def parameters(self, task: str) -> dict[str, Any]:
        return dict(data.field(self.text("tasks"), task, f"tasks in {TEXTS}"))

    def template(self, kind: str) -> Template:
        where = f"template {kind} in {TEXTS}"
        found = data.field(self.text("templates"), kind, f"templates in {TEXTS}")
        before, place, question = str(data.field(found, "template", where)).partition("{context}")
        if not place:
            raise ValueError(f"{where} has no place for {{context}}")
        prefix, new_tokens = (data.field(found, key, where) for key in ("answer_prefix", "tokens_to_generate"))
        return Template(before, question, prefix, new_tokens)

    @cached_property
    def words(self) -> list[str]:
        return data.haystack(self.haystack, self.setting.data).split()


class Maker(ABC):
    """Draws prompts of one task at one length; their size is a number of haystack units.

    least: the smallest size. most: the units there are, None for any number.
    step: what a prompt loses that turns out too long. units: what they are called. questions: how many there are.
    """

    template: Template
    least: int
    step: int
    units: str
    most: int | None = None
    questions: int | None = None

    @abstractmethod
    def draw(self, draw: random.Random, size: int, index: int) -> Drawn:
        """Prompt number `index` with `size` units."""


@lru_cache
def words(kind: str) -> tuple[str, ...]:
    """The nouns, adjectives or verbs of the package wonderwords."""
    try:
        text = (files("wonderwords") / "assets" / f"{kind}list.txt").read_text(encoding="utf-8")
    except ModuleNotFoundError:
        raise ValueError("ruler draws words from the package wonderwords: pip install 'longwave[eval]'") from None
    return tuple(word for word in map(str.strip, re.split(r"[\r\n]+", text)) if word)
