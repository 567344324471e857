"""qa: a question whose paragraph stands among others.

RULER takes SQuAD v2 and HotpotQA. Here qa_1 is XQuAD-en, a part of SQuAD v1.1; qa_2 is single-hop Natural Questions,
not HotpotQA's two hops, so its scores compare with no published ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longwave.checks import read_json
from longwave.evals import data
from longwave.evals.tasks.ruler.maker import Drawn, Maker, Source


@dataclass(frozen=True)
class Question:
    """gold, near: numbers of its own paragraph, and of others of the same article."""

    text: str
    answers: tuple[str, ...]
    gold: int
    near: tuple[int, ...] = ()


class Questions(Maker):
    """Own paragraph, then the same article's, then any, shuffled. Size: paragraphs."""

    units = "paragraphs"
    least = 1
    step = 10

    def __init__(self, source: Source, parameters: Mapping[str, Any], length: int):
        squad = parameters["dataset"] == "squad"
        self.origin = "xquad" if squad else "nq"
        file = "qa_sources/xquad.en.json" if squad else "qa_sources/nq-open-oracle.jsonl.gz"
        path = data.require(source.setting.data, file, "ruler's " + ("qa_1" if squad else "qa_2"))
        self.paragraphs, self.asked = (read_squad if squad else read_nq)(path)
        self.most, self.questions = len(self.paragraphs), len(self.asked)
        self.template = source.template("qa")

    def draw(self, draw: random.Random, size: int, index: int) -> Drawn:
        asked = self.asked[index]
        chosen = [asked.gold, *draw.sample(asked.near, min(size - 1, len(asked.near)))]
        if size > len(chosen):
            known = set(chosen)
            rest = [number for number in range(len(self.paragraphs)) if number not in known]
            chosen += draw.sample(rest, size - len(chosen))
        draw.shuffle(chosen)
        context = "\n\n".join(f"Document {n}:\n{self.paragraphs[p]}" for n, p in enumerate(chosen, 1))
        return self.template.fill(context, asked.answers, {"source": self.origin}, query=asked.text)


def read_squad(path: Path) -> tuple[list[str], list[Question]]:
    """The paragraphs and questions of a file in SQuAD's format."""
    field = data.field
    articles = [
        field(article, "paragraphs", f"an article of {path}")
        for article in field(read_json(path, "a set of questions"), "data", str(path))
    ]
    where = f"a paragraph of {path}"
    paragraphs = sorted({field(p, "context", where) for article in articles for p in article})
    number = {text: place for place, text in enumerate(paragraphs)}
    asked = []
    for article in articles:
        own = dict.fromkeys(number[p["context"]] for p in article)
        for paragraph in article:
            gold = number[paragraph["context"]]
            near = tuple(place for place in own if place != gold)
            for qa in field(paragraph, "qas", where):
                texts = dict.fromkeys(answer["text"] for answer in field(qa, "answers", f"a question of {path}"))
                if texts:  # SQuAD v2 has questions without an answer
                    asked.append(Question(qa["question"], tuple(texts), gold, near))
    return paragraphs, asked


def read_nq(path: Path) -> tuple[list[str], list[Question]]:
    """The same of Natural Questions with their gold passages, as "lost in the middle" has them."""
    records = data.read_records(path)
    found = []
    for line, record in enumerate(records, 1):
        where = f"{path}:{line}"
        passages = [p for p in data.field(record, "ctxs", where) if p.get("isgold")]
        if not passages:
            raise ValueError(f"{where} has no passage marked isgold")
        text = f"{data.field(passages[0], 'title', where)}\n{data.field(passages[0], 'text', where)}"
        found.append((text, data.field(record, "question", where), data.field(record, "answers", where)))
    paragraphs = sorted({text for text, _, _ in found})
    number = {text: place for place, text in enumerate(paragraphs)}
    return paragraphs, [Question(question, tuple(answers), number[text]) for text, question, answers in found]
