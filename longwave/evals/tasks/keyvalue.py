"""Exact look-ups in stored test cases: "lost in the middle" key-value pairs, and LongEval's lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from longwave.checks import read_json
from longwave.evals import data
from longwave.evals.task import Judged, Sample, Setting, TextTask, listed

PAIRS = "kv_retrieval/kv-retrieval-75_keys.first100.jsonl.gz"
NEW_TOKENS = 100  # both papers' own; a uuid takes up to 36 tokens


@dataclass(frozen=True)
class KeyValue(TextTask):
    """The value of a key in a JSON object of 75 uuid pairs; score: whether the value is in the answer."""

    name: ClassVar[str] = "kv"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "depth"

    depths: Any = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the pairs before the asked one

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", listed(self.depths, float, "depths"))
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths are shares from 0 to 1, got {depth}")

    def samples(self, setting: Setting) -> list[Sample]:
        path = data.require(setting.data, PAIRS, "kv")
        source = data.require(setting.data, "infinitebench/templates.json", "kv")
        family = data.field(read_json(source, "a table of templates"), "gpt4_templates", source)
        template = data.text_field(family, "kv_retrieval", f"gpt4_templates in {source}")
        records = setting.limited(data.read_records(path))
        made = []
        for depth in self.depths:
            for line, record in enumerate(records, 1):
                pairs, key, value = (
                    data.field(record, n, f"{path}:{line}") for n in ("ordered_kv_records", "key", "value")
                )
                context = "JSON data:\n" + as_json(moved(pairs, key, depth, f"{path}:{line}"))
                question = f'Key: "{key}"\nCorresponding value:'
                prompt = template.replace("{input}", question).replace("{context}", context)
                ids, before = setting.encode(prompt, question)
                setting.check_fits(len(ids), NEW_TOKENS, f"kv (record {line})")
                made.append(Sample(f"{depth:g}/{line}", ids, before, NEW_TOKENS, (value,), {"depth": depth}))
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        found = sample.answers[0].lower() in output.lower()
        return Judged(float(found), sample.answers[0] if found else None)


@dataclass(frozen=True)
class Lines(TextTask):
    """LongEval: the number that one of many registered lines holds; right if the answer's last number is it."""

    name: ClassVar[str] = "lines"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "lines"

    sizes: Any = (200,)  # lines of a prompt; the data folder has 200 and 600

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", listed(self.sizes, int, "sizes"))

    def samples(self, setting: Setting) -> list[Sample]:
        made = []
        for size in self.sizes:
            folder = data.require(setting.data, "longeval", "lines")
            path = data.find_records(folder, f"{size}_lines")
            if path is None:
                there = sorted(int(p.name.partition("_")[0]) for p in folder.glob("*_lines.*"))
                raise ValueError(
                    f"{folder} has no cases of {size} lines; it has {', '.join(map(str, there)) or 'none'}"
                )
            for line, record in enumerate(setting.limited(data.read_records(path)), 1):
                where = f"{path}:{line}"
                prompt, number = (data.field(record, name, where) for name in ("prompt", "expected_number"))
                question = str(prompt).rpartition("\n\n")[2]
                ids, before = setting.encode(prompt, question)
                setting.check_fits(len(ids), NEW_TOKENS, f"lines at {size} (record {line})")
                made.append(Sample(f"{size}/{line}", ids, before, NEW_TOKENS, (str(number),), {"lines": size}))
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        numbers = re.findall(r"\d+", output)
        parsed = numbers[-1] if numbers else None
        return Judged(float(parsed == sample.answers[0]), parsed)


def moved(pairs: Sequence[Sequence[str]], key: str, depth: float, where: str) -> list[Sequence[str]]:
    """The pairs with the asked one at share `depth` of the others."""
    asked = [pair for pair in pairs if pair[0] == key]
    if len(asked) != 1:
        raise ValueError(f"{where}: the key {key} is there {len(asked)} times, not once")
    others = [pair for pair in pairs if pair[0] != key]
    place = round(depth * len(others))
    return [*others[:place], asked[0], *others[place:]]


def as_json(pairs: Sequence[Sequence[str]]) -> str:
    """One pair a line, as the paper prints them."""
    return "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in pairs) + "}"
