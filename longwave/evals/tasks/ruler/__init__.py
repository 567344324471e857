"""RULER, made offline: thirteen synthetic tasks of set lengths.

A length holds the chat template, the answer's opening and the tokens to generate. The number of haystack units is
found once for a task and length, by bisection with the model's own tokenizer; a prompt that turns out longer is drawn
again with one step less. Below the protocol's shortest length, 4096, steps are smaller; where a step would leave
nothing, a tenth of the units goes.

The texts, the task parameters and the scoring are RULER's. Haystack, sentence splitting, question sets and the long
word list are stand-ins, and positions that RULER shuffles with one seed are drawn for every prompt: name results
"RULER-like". qa_2 is single-hop Natural Questions, not HotpotQA.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar

from longwave.checks import whole
from longwave.evals.task import Judged, Sample, Setting, TextTask, chosen, listed
from longwave.evals.tasks.ruler.counting import CommonWords, FrequentWords
from longwave.evals.tasks.ruler.maker import Maker, Source
from longwave.evals.tasks.ruler.niah import Niah
from longwave.evals.tasks.ruler.qa import Questions
from longwave.evals.tasks.ruler.tracing import Tracing

GROUPS = {
    "retrieval": (
        *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        *("niah_multivalue", "niah_multiquery"),
    ),
    "tracing": ("vt",),
    "aggregation": ("cwe", "fwe"),
    "qa": ("qa_1", "qa_2"),
}
NAMES = [name for names in GROUPS.values() for name in names]
MAKERS: dict[str, Callable[[Source, Mapping[str, Any], int], Maker]] = {
    "niah": Niah,
    "variable_tracking": Tracing,
    "common_words_extraction": CommonWords,
    "freq_words_extraction": FrequentWords,
    "qa": Questions,
}
THRESHOLD = 85.6  # Llama-2-7B at 4k: what RULER calls effective


@dataclass(frozen=True)
class Ruler(TextTask):
    """RULER-like: needles, variable chains, word counts and questions of up to a set length."""

    name: ClassVar[str] = "ruler"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "task"
    heat: ClassVar[tuple[str, str]] = ("task", "length")
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = GROUPS

    lengths: Any = (4096,)  # tokens, prompt and answer together
    tasks: Any = "all"
    repeats: int = 500  # prompts a task and length
    haystack: str = "essays"  # or "pydoc", or a file

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", listed(self.lengths, int, "lengths"))
        object.__setattr__(self, "tasks", chosen(self.tasks, NAMES, "tasks"))
        for length in self.lengths:
            if length < 1:
                raise ValueError(f"lengths are numbers of tokens, at least 1; got {length}")
        whole("repeats", self.repeats, 1)

    def samples(self, setting: Setting) -> list[Sample]:
        source = Source(setting, self.haystack)
        return [
            sample
            for length in self.lengths
            for name in self.tasks
            for sample in make(source, name, length, setting.limited(range(self.repeats)))
        ]

    def judge(self, sample: Sample, output: str) -> Judged:
        said = re.sub(r"[\x00-\x1f]", "\n", output.strip()).strip().lower()
        found = [answer for answer in sample.answers if answer.lower() in said]
        if sample.meta["task"] in GROUPS["qa"]:
            return Judged(float(bool(found)), found)
        return Judged(len(found) / len(sample.answers), found)


def make(source: Source, name: str, length: int, indices: Sequence[int]) -> list[Sample]:
    """The prompts of one task and length. Each draws from its own random numbers."""
    setting = source.setting
    parameters = source.parameters(name)
    maker = MAKERS[parameters["task"]](source, parameters, length)
    new = maker.template.new_tokens
    setting.check_fits(length - new, new, f"ruler's {name} at {length}")
    if maker.questions is not None and len(indices) > maker.questions:
        raise ValueError(f"{name} has {maker.questions} questions, fewer than {len(indices)}: use fewer repeats")

    def tokens(size: int, index: int, draw: random.Random) -> int:
        return len(encode(setting, maker, draw, size, index).ids) + new

    def too_short() -> ValueError:
        least = max(tokens(maker.least, index, random.Random(index)) for index in indices)
        return ValueError(
            f"a length of {length} tokens is too short for ruler's {name}, whose smallest prompts and answers take up "
            f"to {least}: use {-(-(least + 32) // 64) * 64} or more"
        )

    size = fit(lambda size: tokens(size, 0, random.Random(f"{setting.seed}/{name}/{length}")), length, maker, name)
    if size is None:
        raise too_short()
    made = []
    for index in indices:
        draw = random.Random(f"{setting.seed}/{name}/{length}/{index}")
        used = size
        while len((sample := encode(setting, maker, draw, used, index)).ids) + new > length:
            if used == maker.least:
                raise too_short()
            used = max(maker.least, used - (maker.step if used > maker.step else max(1, used // 10)))
        meta = {"task": name, "length": length, **sample.meta}
        made.append(replace(sample, id=f"{name}/{length}/{index}", meta=meta))
    return made


def encode(setting: Setting, maker: Maker, draw: random.Random, size: int, index: int) -> Sample:
    drawn = maker.draw(draw, size, index)
    ids, context = setting.encode(drawn.prompt, drawn.question, prefix=drawn.prefix)
    return Sample("", ids, context, maker.template.new_tokens, drawn.answers, drawn.meta)


def fit(tokens: Callable[[int], int], length: int, maker: Maker, name: str) -> int | None:
    """The largest size whose prompt and answer take at most `length` tokens, None where the smallest takes more."""
    fits, over = maker.least, maker.least * 2
    if tokens(fits) > length:
        return None
    while maker.most is None or over < maker.most:
        if tokens(over) > length:
            break
        fits, over = over, over * 2
    else:
        over = maker.most
        if (whole := tokens(over)) <= length:
            raise ValueError(
                f"all {over} {maker.units} of {name} take {whole} tokens, too few for a length of {length}: use a "
                "shorter length, or leave this task out"
            )
    while over - fits > 1:
        middle = (fits + over) // 2
        if tokens(middle) > length:
            over = middle
        else:
            fits = middle
    return fits


def means(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Length -> RULER's score of it, 0 to 100: the mean over tasks of the mean over samples."""
    scores: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        at = scores.setdefault(row["meta"]["length"], {})
        at.setdefault(row["meta"]["task"], []).append(row["score"])
    if len({frozenset(tasks) for tasks in scores.values()}) > 1:
        raise ValueError("the lengths were measured with different tasks: their means do not compare")
    return {length: 100 * fmean(map(fmean, scores[length].values())) for length in sorted(scores)}


def weighted(by_length: Mapping[int, float]) -> tuple[float, float]:
    """Means whose weights 1, 2, 3, ... rise with the length, and fall with it."""
    values = [by_length[length] for length in sorted(by_length)]
    rising = range(1, len(values) + 1)
    return fmean(values, rising), fmean(values, rising[::-1])


def effective_length(by_length: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """The longest length whose mean reaches the threshold, None where none does."""
    return max((length for length, score in by_length.items() if score >= threshold), default=None)
