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

from longwave.checks import nearest, read_json
from longwave.evals import data
from longwave.evals.task import Setting

SHORT = 4096  # the protocol's shortest length; below it smaller steps are taken
TEXTS = "ruler/templates_and_tasks.json"
PARAMETERS: dict[str, dict[str, type]] = {  # kind of task -> what it has to say, and of what type
    "niah": {
        **dict.fromkeys(("num_needle_k", "num_needle_v", "num_needle_q"), int),
        **dict.fromkeys(("type_haystack", "type_needle_k", "type_needle_v"), str),
    },
    "variable_tracking": {"num_hops": int},
    "common_words_extraction": dict.fromkeys(("num_cw", "freq_cw", "freq_ucw"), int),
    "freq_words_extraction": {"alpha": float},
    "qa": {"dataset": str},
}


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
        before, question, prefix = (
            data.fill(part, f"a template in {TEXTS}", **values) for part in (self.before, self.question, self.prefix)
        )
        return Drawn(before + context + question, question, prefix, tuple(answers), meta)


@dataclass(frozen=True)
class Source:
    """Where makers read: the protocol's texts and the haystack, each once."""

    setting: Setting
    haystack: str = "essays"

    @cached_property
    def texts(self) -> dict[str, Any]:
        return read_json(data.require(self.setting.data, TEXTS, "ruler"), "RULER's texts")

    def text(self, name: str) -> str:
        return data.text_field(self.texts, name, TEXTS)

    def parameters(self, task: str) -> dict[str, Any]:
        """What the protocol says of a task: its kind, and what that kind of maker reads."""
        found = data.field(data.field(self.texts, "tasks", TEXTS), task, f"tasks in {TEXTS}")
        where = f"task {task} in {TEXTS}"
        kind = data.text_field(found, "task", where)
        if kind not in PARAMETERS:
            raise ValueError(f"{where} is of an unknown kind {kind!r}; {nearest(kind, PARAMETERS)}")
        for name, of in PARAMETERS[kind].items():
            good = isinstance(data.field(found, name, where), (int, float) if of is float else of)
            if not good or isinstance(found[name], bool):
                raise ValueError(f"{where} has {name} {found[name]!r}, which is not of type {of.__name__}")
        return dict(found)

    def template(self, kind: str) -> Template:
        where = f"template {kind} in {TEXTS}"
        found = data.field(data.field(self.texts, "templates", TEXTS), kind, f"templates in {TEXTS}")
        before, question = data.halves(data.text_field(found, "template", where), "{context}", where)
        prefix = data.text_field(found, "answer_prefix", where)
        return Template(before, question, prefix, data.count_field(found, "tokens_to_generate", where))

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
