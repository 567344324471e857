"""Needle in a haystack: sentences hidden at a depth of a long real text and asked for at its end.

Every prompt has exactly the tokens it is asked to have, template and question included. A needle stands after the end
of a sentence. Kinds:

- "number": a five-digit number; right if the first run of digits in the answer is it. No chat template. The wording is
  the one of six that the dense small model answered best, so that there is something to lose.
- "classic": gkamradt's San Francisco sentence; score: share of its three keywords in the answer, in lower case.
- "multi": three ingredients, the first at the depth, the others evenly between it and the end; share named.
- "needlebench": the islands and items of NeedleBench v2, another one in each repeat; right if the item is named.

The last three read their sentences from needles/ in the data folder.
"""

from __future__ import annotations

import random
import re
from array import array
from dataclasses import dataclass
from typing import Any, ClassVar

from longwave.checks import read_json, whole
from longwave.evals import data
from longwave.evals.task import Judged, Sample, Setting, TextTask, listed

NUMBER = " The secret number is {key}. Remember it. {key} is the secret number."
NUMBER_QUESTION = "\n\nWhat is the secret number? The secret number is"
NEW_TOKENS = {"number": 8, "classic": 48, "multi": 48, "needlebench": 32}
MARK = "<<context>>"


@dataclass(frozen=True)
class Hidden:
    """What one prompt hides and asks for. `before` opens the prompt, `question` ends it."""

    needles: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    before: str = ""


@dataclass(frozen=True)
class Needle(TextTask):
    """Sentences hidden in long text: depth x length grids, one needle or several."""

    name: ClassVar[str] = "needle"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "length"
    heat: ClassVar[tuple[str, str]] = ("depth", "length")

    lengths: Any = (1000, 2000, 4000)  # tokens
    depths: Any = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the text before the needle
    repeats: int = 1  # prompts per cell, each with its own stretch of text
    kind: str = "number"
    haystack: str = "pydoc"  # or "essays", or a file

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", listed(self.lengths, int, "lengths"))
        object.__setattr__(self, "depths", listed(self.depths, float, "depths"))
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths are shares from 0 to 1, got {depth}")
        whole("repeats", self.repeats, 1)
        if self.kind not in NEW_TOKENS:
            raise ValueError(f"kind is one of {', '.join(NEW_TOKENS)}; got {self.kind!r}")

    def samples(self, setting: Setting) -> list[Sample]:
        new = NEW_TOKENS[self.kind]
        for length in self.lengths:
            setting.check_fits(length, new, f"needle at {length}")
        tokenizer = setting.tokenizer
        hay = tokenizer(data.haystack(self.haystack, setting.data), add_special_tokens=False, verbose=False).input_ids
        ends = sentence_ends(tokenizer, hay)
        bank = self._bank(setting)
        made: list[Sample] = []
        for length in self.lengths:
            cells = []
            for repeat in range(self.repeats):
                draw = random.Random(f"{setting.seed}/{length}/{repeat}")
                hidden = self._hide(draw, repeat, bank)
                head, tail = self._frame(setting, hidden)
                needles = [tokenizer(text, add_special_tokens=False).input_ids for text in hidden.needles]
                room = length - len(head) - len(tail) - sum(map(len, needles))
                if room < 16:
                    raise ValueError(
                        f"a length of {length} tokens leaves no room for text around the needle; use "
                        f"{length - room + 16} or more"
                    )
                if room > len(hay):
                    raise ValueError(
                        f"the haystack has {len(hay)} tokens, too few for a length of {length}: give a longer text"
                    )
                offset = draw.randrange(len(hay) - room + 1)
                text = hay[offset : offset + room]
                for depth in self.depths:
                    ids = array("i", [*head, *insert(text, needles, depth, ends), *tail])
                    meta = {"length": length, "depth": depth, "repeat": repeat}
                    name = f"{length}/{depth:g}/{repeat}"
                    cells.append(Sample(name, ids, length - len(tail), new, hidden.answers, meta))
            made += setting.limited(cells)
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        if self.kind == "number":
            found = re.search(r"\d+", output)
            parsed = found[0] if found else None
            return Judged(float(parsed == sample.answers[0]), parsed)
        said = output.lower()
        named = [answer for answer in sample.answers if answer.lower() in said]
        return Judged(len(named) / len(sample.answers), named)

    def _bank(self, setting: Setting) -> Any:
        if self.kind == "number":
            return None
        if self.kind == "needlebench":
            path = data.require(setting.data, "needles/needlebench_style.jsonl", "needle:kind=needlebench")
            prompts = data.require(setting.data, "needles/needlebench_prompts.json", "needle:kind=needlebench")
            form = data.field(read_json(prompts, "NeedleBench's prompts"), "v2", prompts)
            template = data.text_field(form, "End", f"v2 in {prompts}")
            return path, data.read_records(path), data.halves(template, "{context}", prompts)
        path = data.require(setting.data, "needles/classic.json", f"needle:kind={self.kind}")
        name = {"classic": "single", "multi": "multi_pizza"}[self.kind]
        return f"{name} in {path}", data.field(read_json(path, "a table of needles"), name, path)

    def _hide(self, draw: random.Random, repeat: int, bank: Any) -> Hidden:
        if self.kind == "number":
            key = f"{draw.randrange(10000, 100000)}"
            return Hidden((NUMBER.format(key=key),), NUMBER_QUESTION, (key,))
        if self.kind in ("classic", "multi"):
            where, told = bank
            needles = [data.text_field(told, "needle", where)] if self.kind == "classic" else None
            needles = needles or data.list_field(told, "needles", where)
            question = "\n\n" + data.text_field(told, "question", where)
            return Hidden(tuple(needles), question, tuple(data.list_field(told, "keywords", where)))
        path, records, (before, after) = bank
        if not records:
            raise ValueError(f"{path} has no records")
        number = repeat % len(records)
        needle, asked, answer = (
            data.text_field(records[number], name, f"{path}, record {number + 1},")
            for name in ("needle", "retrieval_question", "arg2")
        )
        return Hidden((f" {needle} ",), after.replace("{question}", asked), (answer,), before)

    def _frame(self, setting: Setting, hidden: Hidden) -> tuple[list[int], list[int]]:
        """Token ids before and after the text."""
        chat = self.kind != "number"
        first, last = setting.render(hidden.before + MARK + hidden.question, chat=chat).split(MARK)
        head = setting.tokenizer(first, add_special_tokens=False).input_ids if first else []
        if not (chat and setting.wraps):
            head = [*setting.opening, *head]
        return head, setting.tokenizer(last, add_special_tokens=False).input_ids


def sentence_ends(tokenizer: Any, ids: list[int]) -> set[int]:
    """The token ids whose text ends a sentence; tokenizers have several for each sign."""
    return {i for i in set(ids) if str(tokenizer.decode([i])).rstrip().endswith((".", "?", "!"))}


def insert(text: list[int], needles: list[list[int]], depth: float, ends: set[int]) -> list[int]:
    """`text` with the first needle at share `depth` of it and the others evenly between that and its end."""
    cuts = []
    for number in range(len(needles)):
        cut = int(len(text) * (depth + number * (1 - depth) / len(needles)))
        while 0 < cut < len(text) and text[cut - 1] not in ends:  # after the end of a sentence
            cut -= 1
        cuts.append(cut)
    out: list[int] = []
    last = 0
    for cut, needle in zip(cuts, needles, strict=True):
        out += [*text[last:cut], *needle]
        last = cut
    return out + text[last:]
