"""InfiniteBench: 12 tasks of 100k tokens and more, with its two families of templates.

Records are read from files SET.jsonl as published (id, context, input, answer, options). Prompts that do not fit lose
their middle, in the document; questions of one document see it cut alike. The templates lie in infinitebench/ in the
data folder.

Four sets are generated where there is no file, or where `size` asks for another length: in the benchmark's form, with
our seeds, and for kv_retrieval and math_find our wording of the question, so scores are near the published ones, not
comparable to the point. Their samples come in a shuffled order, so that a limit takes a fair share of all places.

- passkey, number_string: n lines of noise (RULER's, of the data folder), the line with the key after j of them.
- kv_retrieval: pairs of UUIDs, the place of the one asked for swept over the list.
- math_find: numbers from 0 to 99. With thousands of them, as in the benchmark, the answer is nearly always 99, 98, 97,
  0, 1, 2 or about 49.5: a good score does not show that the list was read.

Sets weigh the same in a score of several sets. math_calc compares signed numbers; the reference drops their signs.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import string
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from longwave.checks import read_json, whole
from longwave.evals import data
from longwave.evals.documents import ask, mean_over_sets, mean_score
from longwave.evals.metrics import CJK_PUNCTUATION, overlap_f1, rouge_scores, token_f1
from longwave.evals.task import Judged, Sample, Setting, TextTask, chosen

NEW_TOKENS = {
    "passkey": 6,
    "number_string": 12,
    "kv_retrieval": 50,
    "math_find": 3,
    "math_calc": 30000,
    "code_run": 5,
    "code_debug": 5,
    "longbook_qa_eng": 40,
    "longbook_qa_chn": 40,
    "longbook_choice_eng": 40,
    "longbook_sum_eng": 1200,
    "longdialogue_qa_eng": 40,
}
UNITS = {"passkey": 5220, "number_string": 5220, "kv_retrieval": 2500, "math_find": 60000}  # lines, pairs, numbers
LEAST = 4
SYNTHETIC = tuple(UNITS)
CHOICE = ("code_debug", "longbook_choice_eng")
TEMPLATES = {"chat": "gpt4_templates", "base": "yarn_mistral_templates"}
KEYS = {"passkey": "pass key", "number_string": "sequence of digits"}
POSITIONS, REPEATS = 58, 10  # steps over the noise, keys per place
PAIRS_ASKED = 500
FINDS = ("largest", "second largest", "third largest", "smallest", "second smallest", "third smallest", "median")
LISTS = 50  # per kind of number


@dataclass(frozen=True)
class InfiniteBench(TextTask):
    """Retrieval, maths, code, books and dialogue in 100k tokens and more (InfiniteBench); four sets are generated."""

    name: ClassVar[str] = "infinitebench"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "set"
    equal_sets: ClassVar[bool] = True

    sets: Any = "synthetic"  # passkey, number_string, kv_retrieval, math_find; or "all"; or names
    source: str = "data"  # infinitebench/ in the data folder; or a folder with files SET.jsonl
    templates: str = "chat"  # or "base", for models without a chat template: they end in an opening of the answer
    size: Any = None  # tokens of generated prompts, chat template included; None for the benchmark's own

    def __post_init__(self) -> None:
        names = SYNTHETIC if self.sets == "synthetic" else chosen(self.sets, tuple(NEW_TOKENS), "InfiniteBench's sets")
        object.__setattr__(self, "sets", tuple(dict.fromkeys(names)))
        if not isinstance(self.source, (str, Path)) or not str(self.source):
            raise ValueError(f'source is "data" or a folder; got {self.source!r}')
        object.__setattr__(self, "source", str(self.source))
        if self.templates not in TEMPLATES:
            raise ValueError(f"templates is one of {', '.join(TEMPLATES)}; got {self.templates!r}")
        if self.size is not None:
            whole("size", self.size, 1, "tokens")
            for name in self.sets:
                if name not in SYNTHETIC:
                    raise ValueError(f"size is for the sets {', '.join(SYNTHETIC)}; {name} is read from a file")

    def samples(self, setting: Setting) -> list[Sample]:
        path = data.require(setting.data, "infinitebench/templates.json", "infinitebench")
        family = TEMPLATES[self.templates]
        templates = data.field(read_json(path, "a table of templates"), family, path)
        folder = path.parent if self.source == "data" else Path(self.source).expanduser()
        if not folder.is_dir():
            raise ValueError(f'source is "data" or a folder; there is no folder {self.source!r}')
        made: list[Sample] = []
        for name in self.sets:
            template = data.text_field(templates, name, f"{family} in {path}")
            found = data.find_records(folder, name) if self.size is None else None
            if found is not None:
                made += self._read(setting, name, found, template)
            elif name in SYNTHETIC:
                made += self._generate(setting, name, template)
            else:
                raise ValueError(
                    f"there is no {name}.jsonl in {folder}: put the published file there, or name its folder as "
                    f"source=FOLDER. Only {', '.join(SYNTHETIC)} can be generated"
                )
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        score, parsed = SCORERS[sample.meta["set"]](output, sample.answers)
        return Judged(float(score), parsed)

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return mean_over_sets(rows, mean_score)

    @property
    def _chat(self) -> bool:
        return self.templates == "chat"

    def _read(self, setting: Setting, name: str, path: Path, template: str) -> list[Sample]:
        records = data.read_records(path)
        books: dict[tuple[str, str], list[int]] = {}  # what stands before the question -> numbers of records
        parts = []
        for number, record in enumerate(records):
            before, document, question = fill(template, name, record, f"{path}, record {number + 1},")
            books.setdefault((before, document), []).append(number)
            parts.append(question)
        made: dict[int, Sample] = {}
        wanted = len(setting.limited(records))
        for (before, document), numbers in books.items():
            if numbers[0] >= wanted:
                continue
            where = f"{path}, record {numbers[0] + 1}"
            questions = [parts[number] for number in numbers]
            new = NEW_TOKENS[name]
            prompts = ask(setting, before, document, questions, new, where, "ends", chat=self._chat)
            for number, prompt in zip(numbers, prompts, strict=True):
                gold = answers(name, records[number], f"{path}, record {number + 1},")
                id, meta = f"{name}/{number}", {"set": name}
                made[number] = Sample(id, prompt.ids, prompt.context, new, gold, meta, prompt.cut_from)
        return [made[number] for number in range(wanted)]

    def _generate(self, setting: Setting, name: str, template: str) -> list[Sample]:
        noise = ""
        if name in KEYS:
            path = data.require(setting.data, "ruler/templates_and_tasks.json", f"infinitebench:sets={name}")
            noise = data.text_field(read_json(path, "RULER's texts"), "noise", path)

        def prompt(units: int, place: float, seed: str) -> tuple[Any, int, tuple[str, ...]]:
            record = generated(name, units, place, random.Random(seed), noise)
            before, document, question = fill(template, name, record, name)
            ids, context = setting.encode(before + document + question, question, chat=self._chat)
            return ids, context, answers(name, record, name)

        def tokens(units: int) -> int:
            return len(prompt(units, 0, f"{setting.seed}/{name}")[0])

        units = UNITS[name]
        if self.size is not None:
            most = int(15 * self.size / (tokens(20) - tokens(10))) + 2  # half as many again as there should be
            units = bisect_right(range(most), self.size, lo=1, key=tokens) - 1
            if units < LEAST:
                raise ValueError(f"{name} takes at least {tokens(LEAST)} tokens; got size={self.size}")
        cells = list(enumerate(places(name, units)))
        random.Random(f"{setting.seed}/{name}/order").shuffle(cells)
        made = []
        for number, place in setting.limited(cells):
            left = units
            ids, context, gold = prompt(left, place, f"{setting.seed}/{name}/{number}")
            while self.size is not None and len(ids) > self.size:  # other digits take other tokens
                left -= 1
                ids, context, gold = prompt(left, place, f"{setting.seed}/{name}/{number}")
            setting.check_fits(len(ids), NEW_TOKENS[name], f"infinitebench's {name} (size=TOKENS makes it shorter)")
            meta: dict[str, Any] = {"set": name, "units": left}
            meta |= {"find": FINDS[int(place)]} if name == "math_find" else {"depth": round(place, 4)}
            made.append(Sample(f"{name}/{number}", ids, context, NEW_TOKENS[name], gold, meta))
        return made


def fill(template: str, name: str, record: dict[str, Any], where: str) -> tuple[str, str, str]:
    """A record's prompt: what stands before the document, the document, the question behind it."""
    before, after = data.halves(template, "{context}", f"the template of {name}")
    fields = {"input": str(record.get("input", "")), "question": str(record.get("input", ""))}
    if name in CHOICE:
        options = data.field(record, "options", where)
        if not isinstance(options, list) or len(options) != 4:
            raise ValueError(f"{where} has options {options!r}, which are not four")
        fields |= {f"OPTION_{letter}": str(option) for letter, option in zip("ABCD", options, strict=True)}
    elif name == "code_run":
        call = re.search(r"(func_\d+)\(-?\d+\)", fields["input"])
        if call is None:
            raise ValueError(f"{where} has no call such as func_1(2) in its input")
        fields |= {"func_call": call[0], "func": call[1]}
    elif name == "math_find":
        wanted = re.search(r"\bThe (.+?) of\b", fields["input"])
        if wanted is None:
            raise ValueError(f'{where} does not ask for "The ... of" in its input')
        fields["prefix"] = f"What is the {wanted[1].lower()} in the following list?"
    before, after = (data.fill(part, f"the template of {name}", **fields) for part in (before, after))
    return before, str(data.field(record, "context", where)), after


def answers(name: str, record: dict[str, Any], where: str) -> tuple[str, ...]:
    """The right answers as text; of a choice, the right option and its letter."""
    gold = data.field(record, "answer", where)
    items = list(gold) if isinstance(gold, (list, tuple)) else [gold]
    if items and isinstance(items[0], list):  # math_calc
        items = items[0]
    if not items:
        raise ValueError(f"{where} has no answer")
    if name not in CHOICE or (len(items) == 2 and items[1] in list("ABCD")):
        return tuple(map(str, items))
    if items[0] not in record["options"]:
        raise ValueError(f"{where} has the answer {items[0]!r}, which is none of its options")
    return str(items[0]), "ABCD"[record["options"].index(items[0])]


def places(name: str, units: int) -> Iterator[float]:
    """Where the samples of a generated set hide what they ask for, as a share; in math_find, the kind of number."""
    if name in KEYS:
        step = max(1, round(units / POSITIONS))
        return (line / units for line in range(0, units + 1, step) for _ in range(REPEATS))
    if name == "kv_retrieval":
        return (rank / PAIRS_ASKED for rank in range(PAIRS_ASKED))
    return (float(kind) for kind in range(len(FINDS)) for _ in range(LISTS))


def generated(name: str, units: int, place: float, draw: random.Random, noise: str) -> dict[str, Any]:
    """A record in the published form."""
    if name in KEYS:
        key = "".join(draw.choices(string.digits, k=5))
        if name == "number_string":
            for _ in range(5):
                at = draw.randrange(len(key))
                key = key[:at] + key[at] + key[at:]
        what = KEYS[name]
        lines = [noise] * units
        lines.insert(round(place * units), f"The {what} is {key}. Remember it. {key} is the {what}.")
        return {"context": "\n".join(lines), "input": f"What is the {what}?", "answer": key}
    if name == "kv_retrieval":
        pairs = [(random_uuid(draw), random_uuid(draw)) for _ in range(units)]
        key, value = pairs[int(place * units)]
        return {"context": json.dumps(dict(pairs)), "input": f'Key: "{key}"\nIts value is:', "answer": value}
    numbers = [draw.randrange(100) for _ in range(units)]
    kind = FINDS[int(place)]
    request = f"Answer with one number and nothing else. The {kind} number of the list is:"
    return {"context": str(numbers), "input": request, "answer": f"{find(numbers, kind):g}"}


def random_uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def find(numbers: Sequence[int], kind: str) -> float:
    """Equal numbers count once, except for the median."""
    if kind == "median":
        return statistics.median(numbers)
    ordered = sorted(set(numbers), reverse=kind.endswith("largest"))
    rank = ("second" in kind) + 2 * ("third" in kind)
    return ordered[min(rank, len(ordered) - 1)]


Scorer = Callable[[str, Sequence[str]], tuple[float, Any]]  # output, answers -> score, what was read out of the output


def score_digits(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    found = re.search(r"[0-9]+", output)
    parsed = found[0] if found else None
    return parsed == gold[0], parsed


def words_of(text: str, signs: str = "\n:\"'.,?!{}") -> list[str]:
    """The words of a text in which the signs are spaces."""
    return text.translate(dict.fromkeys(map(ord, signs), " ")).split()


def score_value(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    return gold[0] in words_of(output), None


def score_number(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    found = re.search(r"\d+\.\d+|\d+", output)
    parsed = float(found[0]) if found else None
    return parsed == float(gold[0]), parsed


def score_steps(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    """The share of the values that are right before the first wrong one."""
    said = [int(number) for number in re.findall(r"(?<!\d)-?[0-9]+", output)]
    right = 0
    for value, number in zip(map(int, gold), said, strict=False):
        if value != number:
            break
        right += 1
    return right / len(gold), right


def score_return(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    words = words_of(output, "\n.`'\":")
    parsed = int(words[-1]) if words and re.fullmatch(r"[+-]?[0-9]+", words[-1]) else None
    return parsed == int(gold[0]), parsed


def after_prefix(text: str, prefixes: Sequence[str]) -> str | None:
    """What follows the first of the prefixes that a text has."""
    found = next((prefix for prefix in prefixes if prefix in text), None)
    return None if found is None else text.partition(found)[2].strip()


def score_bug(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    name, letter = gold
    if output[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0, letter
    plain = " ".join(re.sub(r"[\n`'\"*-]|[Oo]ption", " ", output).split())
    said = after_prefix(plain, ("answer is:", "is:", "answer:"))
    return said is not None and said.startswith((letter, name)), said


def score_option(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    text, letter = gold
    said = output.strip()
    if not said:
        return 0.0, None
    if said[0] in "ABCD":
        return said[0] == letter, said[0]
    if said == text:
        return 1.0, letter
    plain = " ".join(re.sub(r"[\n\"'.,?!{}]", " ", said).split())
    told = after_prefix(plain, ("answer is:", "answer:", "answer is", "option is"))
    if told is not None:
        return told.startswith((letter, text)), told
    parsed = next((word for word in plain.split() if word in tuple("ABCD")), None)
    return parsed == letter, parsed


def score_f1(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    return max(token_f1(output, answer) for answer in gold), None


def score_f1_chinese(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    """F1 over characters."""
    removed = set(string.punctuation + CJK_PUNCTUATION)

    def signs(text: str) -> list[str]:
        return [sign for sign in text.lower() if sign not in removed and not sign.isspace()]

    return max(overlap_f1(signs(output), signs(answer)) for answer in gold), None


def score_summary(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    return max(rouge_scores(output, answer, ("rougeLsum",))["rougeLsum"] for answer in gold), None


def score_name(output: str, gold: Sequence[str]) -> tuple[float, Any]:
    said = f" {' '.join(words_of(output.upper()))} "
    return any(f" {' '.join(words_of(name.upper()))} " in said for name in gold), None


SCORERS: dict[str, Scorer] = {
    "passkey": score_digits,
    "number_string": score_digits,
    "kv_retrieval": score_value,
    "math_find": score_number,
    "math_calc": score_steps,
    "code_run": score_return,
    "code_debug": score_bug,
    "longbook_qa_eng": score_f1,
    "longbook_qa_chn": score_f1_chinese,
    "longbook_choice_eng": score_option,
    "longbook_sum_eng": score_summary,
    "longdialogue_qa_eng": score_name,
}
