"""Passkey retrieval as Landmark attention and LongLoRA measure it: a number stated twice among repeated noise.

Lines: the task's sentence, noise, the key, noise, the question. The protocol places the key by characters: the noise
before it is the repeated text cut at a uniform share of all noise characters, that after it the same text from its
start again. The noise is as long as the prompt's tokens allow. Right if the first run of digits in the answer is the
key. No chat template.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from longwave.checks import read_json, whole
from longwave.evals import data
from longwave.evals.task import Judged, Sample, Setting, TextTask, listed

KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
HIGHEST = 50000
NEW_TOKENS = 8
SHRINK = 8  # characters of noise dropped at a time where a prompt is longer than the measured one


@dataclass(frozen=True)
class Passkey(TextTask):
    """A pass key stated twice among repeated noise, anywhere in the text."""

    name: ClassVar[str] = "passkey"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "length"
    heat: ClassVar[tuple[str, str]] = ("depth", "length")

    lengths: Any = (1000, 2000, 4000)  # tokens of the prompt, at most
    repeats: int = 10  # prompts a length

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", listed(self.lengths, int, "lengths"))
        whole("repeats", self.repeats, 1)

    def samples(self, setting: Setting) -> list[Sample]:
        path = data.require(setting.data, "infinitebench/templates.json", "passkey")
        family = data.field(read_json(path, "a table of templates"), "gpt4_templates", path)
        task = data.text_field(family, "passkey", f"gpt4_templates in {path}").partition("\n")[0]
        path = data.require(setting.data, "ruler/templates_and_tasks.json", "passkey")
        line = data.text_field(read_json(path, "RULER's texts"), "noise", path)
        made: list[Sample] = []
        for length in self.lengths:
            setting.check_fits(length, NEW_TOKENS, f"passkey at {length}")
            noise = " ".join([line] * (1 + length // 4))  # a line has more tokens than that
            most = most_noise(setting, task, noise, length)
            for repeat in setting.limited(range(self.repeats)):
                draw = random.Random(f"{setting.seed}/{length}/{repeat}")
                key, share, total = str(draw.randint(1, HIGHEST)), draw.random(), most
                while len((encoded := encode(setting, task, noise, total, share, key))[0]) > length:
                    total -= SHRINK
                meta = {"length": length, "depth": round(share, 1), "repeat": repeat}
                made.append(Sample(f"{length}/{repeat}", *encoded, NEW_TOKENS, (key,), meta))
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        found = re.search(r"\d+", output)
        parsed = found[0] if found else None
        return Judged(float(parsed == sample.answers[0]), parsed)


def encode(setting: Setting, task: str, noise: str, total: int, share: float, key: str) -> tuple[Any, int]:
    """The prompt with `total` characters of noise, a share of them before the key."""
    before = int(total * share)
    lines = [task, noise[:before], KEY.format(key=key), noise[: total - before]]
    return setting.encode("\n".join(lines) + QUESTION, QUESTION, chat=False)


def most_noise(setting: Setting, task: str, noise: str, length: int) -> int:
    """Characters of noise that a prompt of `length` tokens has room for."""

    def tokens(total: int) -> int:
        return len(encode(setting, task, noise, total, 0.5, str(HIGHEST))[0])

    if (least := tokens(0)) + 16 > length:
        raise ValueError(f"a length of {length} tokens is too short for a pass key prompt: use {least + 32} or more")
    fits, over = 0, len(noise)
    while over - fits > 1:
        middle = (fits + over) // 2
        if tokens(middle) > length:
            over = middle
        else:
            fits = middle
    return fits
