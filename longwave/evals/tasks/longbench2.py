"""LongBench v2 (arXiv 2412.15204): multiple choice over long texts.

`longbench2` reads the benchmark's data.json as it is. Prompt, cut (the middle of the whole prompt, before a chat
template) and the reading of answers are the benchmark's; answers are greedy, and an empty one is wrong, where the
official code leaves it out. With `lead` the prompt ends in "The correct answer is (", so that a small model, which does
not keep to the format, names a letter. Chance is 25.

`longbench2-like` puts L-Eval's exams with one right letter (tpo, coursera) into the same template.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from longwave.evals import data
from longwave.evals.task import Judged, Sample, Setting, TextTask, chosen
from longwave.evals.tasks.longbench import encode

LETTERS = "ABCD"
LEAD = "The correct answer is ("
NEW_TOKENS = 128
EXAMS = ("tpo", "coursera")
CHOICES = re.compile(r"(.*?)\n?A\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)", re.DOTALL)


@dataclass(frozen=True)
class Choices(TextTask):
    """What both tasks do with a question of four choices."""

    lead: bool = False  # the prompt ends in "The correct answer is ("

    def __post_init__(self) -> None:
        if not isinstance(self.lead, bool):
            raise ValueError(f"lead is True or False, got {self.lead!r}")

    def judge(self, sample: Sample, output: str) -> Judged:
        letter = read_choice((LEAD if self.lead else "") + output)
        return Judged(float(letter == sample.answers[0]), letter)

    def sample(
        self, setting: Setting, id: str, text: str, question: str, choices: list[str], answer: str, meta: dict[str, Any]
    ) -> Sample:
        prompt, asked = write(text, question, choices)
        new = 1 if self.lead else NEW_TOKENS
        prefix = ("" if setting.wraps else "\n\n") + LEAD if self.lead else ""
        ids, before, cut_from = encode(setting, prompt, asked, new, chat=True, prefix=prefix)
        return Sample(id, array("i", ids), before, new, (answer,), meta, cut_from)


@dataclass(frozen=True)
class LongBench2(Choices):
    """Multiple choice over texts of 8k to 2M words (LongBench v2, its data.json)."""

    name: ClassVar[str] = "longbench2"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "length"
    heat: ClassVar[tuple[str, str]] = ("difficulty", "length")

    source: str = ""  # the file data.json, or a folder with it

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.source, (str, Path)) or not str(self.source):
            raise ValueError("give source=PATH of data.json, from huggingface.co/datasets/THUDM/LongBench-v2")
        object.__setattr__(self, "source", str(self.source))

    def samples(self, setting: Setting) -> list[Sample]:
        place = Path(self.source).expanduser()
        path = data.find_records(place, "data") if place.is_dir() else place
        if path is None or not path.is_file():
            raise ValueError(f"there is no {place}: data.json lies at huggingface.co/datasets/THUDM/LongBench-v2")
        sets: dict[str, list[Sample]] = {}
        for number, record in enumerate(data.read_records(path)):
            where = f"{path}, record {number + 1}"
            fields = {
                name: data.text_field(record, name, where)
                for name in ("_id", "domain", "difficulty", "length", "question", "answer", "context")
            }
            if fields["answer"] not in list(LETTERS):
                raise ValueError(f"{where} has answer {fields['answer']!r}, which is none of A, B, C and D")
            mine = sets.setdefault(fields["length"], [])
            if setting.limit is not None and len(mine) >= setting.limit:
                continue
            choices = [data.text_field(record, f"choice_{letter}", where) for letter in LETTERS]
            meta = {name: fields[name] for name in ("length", "difficulty", "domain")}
            told = fields["_id"], fields["context"], fields["question"], choices, fields["answer"]
            mine.append(self.sample(setting, *told, meta))
        return [sample for mine in sets.values() for sample in mine]


@dataclass(frozen=True)
class LongBench2Like(Choices):
    """L-Eval's exams with one right letter in LongBench v2's template."""

    name: ClassVar[str] = "longbench2-like"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "set"
    equal_sets: ClassVar[bool] = False

    sets: Any = EXAMS

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sets", chosen(self.sets, EXAMS, "the sets of longbench2-like"))

    def samples(self, setting: Setting) -> list[Sample]:
        made: list[Sample] = []
        for name in self.sets:
            path = data.require(setting.data, f"leval/closed/{name}.jsonl", self.name)
            cells: list[Sample] = []
            for number, (text, question, choices, answer) in enumerate(exams(path)):
                if setting.limit is not None and len(cells) >= setting.limit:
                    break
                told = f"{name}/{number}", text, question, choices, answer
                cells.append(self.sample(setting, *told, {"set": name}))
            made += cells
        return made


def write(text: str, question: str, choices: list[str]) -> tuple[str, str]:
    """A prompt, and what of it comes after the text."""
    listed = "\n".join(f"({letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=True))
    asked = (
        f"\n</text>\n\nWhat is the correct answer to this question: {question.strip()}\nChoices:\n{listed}\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    head = "Please read the following text and answer the question below.\n\n<text>\n"
    return head + text.strip() + asked, asked


def read_choice(output: str) -> str | None:
    """The letter that an answer in the asked form names, None where there is none. One in brackets goes first."""
    plain = output.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])", plain) or re.search(r"The correct answer is ([A-D])", plain)
    return found[1] if found else None


def exams(path: Path) -> Iterator[tuple[str, str, list[str], str]]:
    """Text, question, choices and letter of every question that has four choices and one right letter."""
    for number, record in enumerate(data.read_records(path)):
        where = f"{path}, record {number + 1}"
        pairs = zip(
            data.list_field(record, "instructions", where), data.list_field(record, "outputs", where), strict=True
        )
        for question, gold in pairs:
            parts = CHOICES.fullmatch(question.strip())
            if parts and gold.strip() in list(LETTERS):
                yield data.text_field(record, "input", where), parts[1], list(parts.groups()[1:]), gold.strip()
