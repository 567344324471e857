"""LongProc (arXiv 2501.05414): follow a procedure and write all of it down, so that the output is long too.

Sets, with files and templates read unchanged from longproc/ in the data folder, or a folder of the same layout with
SET/SET_LEVEL.json and SET/prompts.yaml:

- "path_traversal": the route between two cities, each with one way out; right if it is the route, line for line.
- "tom_tracking": where somebody believes an object to be, step by step; right if all lines agree in their words.
- "countdown-like": generated. The search and its trace are the benchmark's, byte for byte; the words of the prompt are
  ours, since its template is not at hand. Right if the solution's three equations hold and end in the target.

HTML pages, C++ programs, whose scorer runs what a model wrote, and travel plans are left out.

Small models lose the thread early, and then a score of 0 or 1 says nothing about a method. So rows have the metric
"prefix", the share of the reference's lines that an output begins with; and `longproc-trace` feeds the reference
itself, `step` tokens a pass, and counts where the most likely token is the next one: a compressed cache that grows.
"""

from __future__ import annotations

import random
import string
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from longwave.checks import read_text, whole
from longwave.evals import data
from longwave.evals.documents import mean_over_sets, mean_score
from longwave.evals.task import Judged, LossTask, Sample, Setting, TextTask, chosen
from longwave.evals.tasks.longproc.countdown import solves, trace

PATHS, BELIEFS, COUNTDOWN = "path_traversal", "tom_tracking", "countdown-like"
SETS = (PATHS, BELIEFS, COUNTDOWN)
NEW_TOKENS = {"0.5k": 1024, "2k": 3072, "8k": 9216}
TRACE = {"0.5k": (881, 1399), "2k": (2959, 5806), "8k": (11110, 23121)}  # characters of a countdown trace
PLACES = {PATHS: "{city_context}", BELIEFS: "{story}"}  # of the long text in a template
SHOWN = (([40, 19, 23, 7], 29), ([9, 16, 6, 18], 12))  # the benchmark's own examples
RULES = """Reach a target with four numbers. Take two of them, add, subtract, multiply or divide them, and put the \
result in their place, until one number is left. Each number is used once, results are whole and below 2000. Search \
depth first, write down all that you try as the examples do, and end with the three equations between <Solution> and \
</Solution>, one a line.

"""
SKIPPED = "a an the on in at step thinks think believes believe is are of location know knows belief"


@dataclass(frozen=True)
class Problem:
    """What one sample asks. told: what its score needs beside the reference."""

    before: str
    text: str
    question: str
    reference: str
    told: Mapping[str, Any]


@dataclass(frozen=True)
class LongProc(TextTask):
    """Procedures written down step by step: routes, beliefs, a search (LongProc; the search with our prompt)."""

    name: ClassVar[str] = "longproc"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "set"
    equal_sets: ClassVar[bool] = True

    sets: Any = SETS
    level: str = "0.5k"  # or "2k", "8k": of the output; the data folder has 0.5k
    source: str = "data"  # longproc/ in the data folder; or a folder
    count: int = 20  # countdown-like problems

    def __post_init__(self) -> None:
        check(self)

    def samples(self, setting: Setting) -> list[Sample]:
        made: list[Sample] = []
        new = NEW_TOKENS[self.level]
        for name in self.sets:
            cells = []
            for number, problem in enumerate(setting.limited(list(problems(self, setting, name)))):
                prompt = problem.before + problem.text + problem.question
                ids, before = setting.encode(prompt, problem.question)
                setting.check_fits(len(ids), new, f"{name} at {self.level}")
                meta = {"set": name, **problem.told}
                cells.append(Sample(f"{name}/{number}", ids, before, new, (problem.reference,), meta))
            made += cells
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        gold = sample.answers[0]
        if sample.meta["set"] == BELIEFS:
            said, wanted = belief_lines(output), belief_lines(gold)
            return Judged(float(said == wanted), None, {"prefix": prefix(said, wanted)})
        if sample.meta["set"] == PATHS:
            route = tagged(output, "Route")
            share = prefix((route or "").split("\n"), gold.split("\n"))
            return Judged(float(route == gold), route, {"prefix": share, "extracted": float(route is not None)})
        solution = tagged(output, "Solution")
        lines = [line for line in (solution or "").split("\n") if line.strip()]
        right = solves(lines, sample.meta["numbers"], sample.meta["target"])
        share = prefix(output.strip().split("\n"), gold.strip().split("\n"))
        return Judged(float(right), solution, {"prefix": share, "extracted": float(solution is not None)})

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return mean_over_sets(rows, mean_score)


@dataclass(frozen=True)
class LongProcTrace(LossTask):
    """The same problems with the reference fed: where its next token is the most likely (LongProc, teacher-forced)."""

    name: ClassVar[str] = "longproc-trace"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "set"
    equal_sets: ClassVar[bool] = True
    unit: ClassVar[str] = "% of the reference's tokens"
    lower: ClassVar[bool] = False
    recalls: ClassVar[bool] = True
    metric: ClassVar[str] = "hit"

    sets: Any = SETS
    level: str = "0.5k"
    source: str = "data"
    count: int = 20
    step: int = 16  # tokens fed at a time

    def __post_init__(self) -> None:
        check(self)
        whole("step", self.step, 1, "tokens")

    @property
    def feed(self) -> int | None:
        return self.step

    def samples(self, setting: Setting) -> list[Sample]:
        made: list[Sample] = []
        for name in self.sets:
            for number, problem in enumerate(setting.limited(list(problems(self, setting, name)))):
                prompt = problem.before + problem.text + problem.question
                ids, before = setting.encode(prompt, problem.question)
                answer = f"<Route>\n{problem.reference}\n</Route>" if name == PATHS else problem.reference
                opening = "" if setting.wraps else "\n"
                told = setting.tokenizer(opening + answer, add_special_tokens=False, verbose=False).input_ids
                whole_ids = array("i", [*ids, *told])
                setting.check_fits(len(whole_ids), 0, f"{name} at {self.level}")
                scored = tuple(range(len(ids), len(whole_ids)))
                made.append(Sample(f"{name}/{number}", whole_ids, before, meta={"set": name}, scored=scored))
        return made

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return mean_over_sets(rows, mean_score)


def check(task: Any) -> None:
    """The options that both tasks have."""
    object.__setattr__(task, "sets", chosen(task.sets, SETS, "the sets of LongProc"))
    if task.level not in NEW_TOKENS:
        raise ValueError(f"level is one of {', '.join(NEW_TOKENS)}; got {task.level!r}")
    if not isinstance(task.source, (str, Path)) or not str(task.source):
        raise ValueError(f'source is "data" or a folder; got {task.source!r}')
    object.__setattr__(task, "source", str(task.source))
    whole("count", task.count, 1)


def problems(task: Any, setting: Setting, name: str) -> Iterator[Problem]:
    if name == COUNTDOWN:
        for index in range(task.count if setting.limit is None else min(task.count, setting.limit)):
            yield countdown(random.Random(f"longproc/{name}/{task.level}/{index}/{setting.seed}"), task.level)
        return
    if task.source == "data":
        folder = data.require(setting.data, "longproc", "longproc")
    else:
        folder = Path(task.source).expanduser()
    path, prompts = folder / name / f"{name}_{task.level}.json", folder / name / "prompts.yaml"
    for file in (path, prompts):
        if not file.is_file():
            raise ValueError(
                f"there is no {file}: give source=FOLDER, the folder data of github.com/princeton-pli/LongProc"
            )
    template = data.text_field(read_yaml(prompts), "USER_PROMPT", prompts)
    before, after = data.halves(template, PLACES[name], prompts)
    before = data.fill(before, prompts)
    for number, record in enumerate(data.read_records(path)):
        where = f"{path}, record {number + 1}"
        if name == PATHS:
            towns = data.list_field(record, "question_repr", where)
            if len(towns) != 2:
                raise ValueError(f"{where} has question_repr {towns!r}, which are not two cities")
            question = data.fill(after, prompts, src_city=towns[0], dst_city=towns[1])
            yield Problem(before, data.text_field(record, "context_nl", where), question, _gold(record, where), {})
        else:
            question = data.fill(after, prompts, question=data.text_field(record, "question", where))
            told = data.text_field(record, "solution", where)
            yield Problem(before, data.text_field(record, "story", where), question, told, {})


def _gold(record: Mapping[str, Any], where: str) -> str:
    return data.text_field(record, "answer_nl", where).strip()


def countdown(draw: random.Random, level: str) -> Problem:
    """A problem whose trace has the length of its level."""
    shown = "".join(f"# Example\nNumbers: {n}\nTarget: {t}\n\n{trace(n, t)}\n" for n, t in SHOWN)
    least, most = TRACE[level]
    while True:
        numbers, target = [draw.randint(1, 49) for _ in range(4)], draw.randint(10, 50)
        reference = trace(numbers, target)
        if reference is not None and least <= len(reference) <= most:
            asked = f"# Problem\nNumbers: {numbers}\nTarget: {target}\n\n"
            return Problem(RULES, shown, asked, reference, {"numbers": numbers, "target": target})


def read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None


def tagged(output: str, tag: str) -> str | None:
    """The text between the first opening and the first closing tag, None where one of them is missing."""
    _, opened, rest = output.partition(f"<{tag}>")
    inside, closed, _ = rest.partition(f"</{tag}>")
    return inside.strip() if opened and closed else None


def belief_lines(text: str) -> list[str]:
    """The steps of a trace without signs and without words that say nothing."""
    found = []
    for line in text.split("\n"):
        if line.startswith("-"):
            bare = line[1:].lower().translate(str.maketrans("", "", string.punctuation))
            found.append(" ".join(word for word in bare.split() if word not in SKIPPED.split()))
    return found


def prefix(said: Sequence[str], gold: Sequence[str]) -> float:
    """The share of the reference's lines that an output begins with."""
    same = 0
    for one, other in zip(said, gold, strict=False):
        if one != other:
            break
        same += 1
    return same / len(gold)
