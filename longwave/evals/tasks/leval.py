"""L-Eval: exams, questions and summaries over real documents; what an LLM or a human has to judge is left out.

A document that is too long loses words at its end. All questions of a document see it cut alike, for the longest of
them, so that it is read once for all.

The score of a rouge set is the geometric mean of its mean rouge1, rouge2 and rougeL. Sets weigh the same in a score of
several sets. Topics carry meta "part" (first, second, third), and sci_fi asks everything twice, with the document
("loyalty") and without it ("fact"). codeU is not there: our data has neither the set nor the rule of its score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

from longwave.checks import read_json
from longwave.evals import data
from longwave.evals.documents import Prompt, ask, mean_over_sets, mean_score
from longwave.evals.metrics import rouge_scores, token_f1
from longwave.evals.task import Judged, Sample, Setting, TextTask, chosen

CHOICE = ("coursera", "quality", "tpo")
GSM, TOPIC, SCI_FI = "gsm100", "topic_retrieval_longchat", "sci_fi"
CLOSED = (*CHOICE, SCI_FI, GSM, TOPIC)
F1 = ("financial_qa", "legal_contract_qa", "multidoc_qa", "narrative_qa", "natural_question", "scientific_qa")
SUMMARIES = (
    "gov_report_summ",
    "meeting_summ",
    "news_summ",
    "paper_assistant",
    "patent_summ",
    "review_summ",
    "tv_show_summ",
)
OPEN = F1 + SUMMARIES
FOLDERS = ("", "closed", "open", "Closed-ended-tasks", "Open-ended-tasks")  # ours and the official repository's
SCORED = ("exam", "f1", "rouge")
ROUGES = ("rouge1", "rouge2", "rougeL")
PARTS = ("first", "second", "third")
OFFICIAL = 512  # new tokens of every set
IN_THE_DOCUMENT = "based on the world described in the document."
IN_THE_WORLD = "based on the real-world knowledge and facts up until your last training"


@dataclass(frozen=True)
class LEval(TextTask):
    """Exams, questions and summaries over real documents of 3k to 60k tokens (L-Eval, closed and open sets)."""

    name: ClassVar[str] = "leval"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "set"
    equal_sets: ClassVar[bool] = True
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {"Closed": CLOSED, "Open": OPEN}

    sets: Any = "closed"  # or "open", "all": those of them that are found; or names
    source: str = "data"  # leval/ in the data folder; or a folder with files SET.jsonl
    max_new: Any = "official"  # 512; "short": 10 for choices, 30 for topics, 128 for f1 sets, else 512; or a number

    def __post_init__(self) -> None:
        if self.sets not in ("closed", "open", "all"):
            names = chosen(self.sets, CLOSED + OPEN, "the sets of L-Eval")
            object.__setattr__(self, "sets", tuple(dict.fromkeys(names)))
        if not isinstance(self.source, (str, Path)) or not str(self.source):
            raise ValueError(f'source is "data" or a folder; got {self.source!r}')
        object.__setattr__(self, "source", str(self.source))
        number = isinstance(self.max_new, int) and not isinstance(self.max_new, bool) and self.max_new > 0
        if not number and self.max_new not in ("official", "short"):
            raise ValueError(f'max_new is "official", "short" or a number of tokens, at least 1; got {self.max_new!r}')

    def samples(self, setting: Setting) -> list[Sample]:
        optional = isinstance(self.sets, str)
        names = {"closed": CLOSED, "open": OPEN, "all": CLOSED + OPEN}[self.sets] if optional else self.sets
        folder = self._folder(setting)
        path = data.require(setting.data, "leval/system_prompts.json", "leval")
        systems: dict[str, str] = read_json(path, "L-Eval's system prompts")
        for name in systems:
            data.text_field(systems, name, path)
        data.text_field(systems, "else", path)
        made: list[Sample] = []
        for name in names:
            paths = (data.find_records(folder / inner, name) for inner in FOLDERS)
            found = next((path for path in paths if path), None)
            if found is not None:
                made += setting.limited(self._set(setting, name, found, systems))
            elif not optional:
                raise ValueError(
                    f"there is no set {name!r} in {folder}: looked for {name}.jsonl there, in closed/, open/"
                )
        if not made:
            raise ValueError(
                f"{folder} has none of the sets {', '.join(names)}: looked for files such as {names[0]}.jsonl"
            )
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        name, gold = sample.meta["set"], sample.answers[0]
        if name in CHOICE:
            letters = parse_choice(output, several=name == "coursera")
            return Judged(choice_score(letters, gold_letters(gold)), letters)
        if name == GSM:
            number = parse_number(output)
            return Judged(float(number is not None and number == parse_number(gold)), number)
        if name == TOPIC:
            return Judged(float(squeeze(gold) in squeeze(output)), None)
        if name == SCI_FI:
            word = true_or_false(output)
            of_document, _, of_world = gold.partition("[fact:")
            right = true_or_false(of_document if sample.meta["part"] == "loyalty" else of_world)
            return Judged(float(word is not None and word == right), word)
        if sample.meta["evaluation"] == "rouge":
            metrics = rouge_scores(output, gold, ROUGES)
            return Judged(geometric_mean([metrics[kind] for kind in ROUGES]), None, metrics)
        return Judged(token_f1(output, gold), None)

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return mean_over_sets(rows, set_score)

    def _folder(self, setting: Setting) -> Path:
        if self.source == "data":
            return data.require(setting.data, "leval", "leval")
        folder = Path(self.source).expanduser()
        if not folder.is_dir():
            raise ValueError(f'source is "data" or a folder; there is no folder {self.source!r}')
        return folder

    def _set(self, setting: Setting, name: str, path: Path, systems: Mapping[str, str]) -> list[Sample]:
        made: list[Sample] = []
        for number, record in enumerate(data.read_records(path)):
            if setting.limit is not None and len(made) >= setting.limit:
                break
            where = f"{path}, record {number + 1},"
            if data.field(record, "evaluation", where) in SCORED:
                made += self._record(setting, name, f"{name}/{number}", record, where, systems)
        return made

    def _record(
        self, setting: Setting, name: str, id: str, record: dict[str, Any], where: str, systems: Mapping[str, str]
    ) -> list[Sample]:
        document, asked, golds = (data.field(record, key, where) for key in ("input", "instructions", "outputs"))
        if not (isinstance(document, str) and isinstance(asked, list) and isinstance(golds, list)):
            raise ValueError(f"{where} is malformed: input is a text, instructions and outputs are lists")
        if len(asked) != len(golds) or not asked:
            raise ValueError(
                f"{where} has {len(asked)} instructions and {len(golds)} outputs; there has to be one each"
            )
        evaluation = record["evaluation"]
        system = system_prompt(systems, name, evaluation)
        before = "" if name in (GSM, TOPIC) else "Document is as follows. "
        new = self._new_tokens(name)

        def prompts(before: str, document: str, questions: Sequence[str]) -> list[Prompt]:
            return ask(setting, before, document, questions, new, where.rstrip(","), "start", system)

        made = []
        tails = [question_text(name, evaluation, text, gold) for text, gold in zip(asked, golds, strict=True)]
        for number, prompt in enumerate(prompts(before, document, tails)):
            meta = {"set": name, "evaluation": evaluation}
            if name == TOPIC:
                meta["part"] = PARTS[number % 3]
            elif name == SCI_FI:
                meta["part"] = "loyalty"
            gold = (golds[number],)
            made.append(Sample(f"{id}/{number}", prompt.ids, prompt.context, new, gold, meta, cut_from=prompt.cut_from))
            if name == SCI_FI:
                text = asked[number].replace(IN_THE_DOCUMENT, IN_THE_WORLD)
                (alone,) = prompts("", "", [question_text(name, evaluation, text, golds[number])])
                meta = {**meta, "part": "fact"}
                made.append(Sample(f"{id}/{number}/fact", alone.ids, alone.context, new, gold, meta))
        return made

    def _new_tokens(self, name: str) -> int:
        if self.max_new == "official":
            return OFFICIAL
        if self.max_new == "short":
            short = {**dict.fromkeys((*CHOICE, SCI_FI), 10), TOPIC: 30, **dict.fromkeys(F1, 128)}
            return short.get(name, OFFICIAL)
        return int(self.max_new)


def system_prompt(systems: Mapping[str, str], name: str, evaluation: str) -> str:
    """The entry of system_prompts.json, whose keys are conditions, that is the first to hold for a set."""
    for condition, text in systems.items():
        part = re.fullmatch(r"'(\w+)' in file_name", condition)
        if (part and part[1] in name) or (condition == "'exam' in args.metric" and evaluation == "exam"):
            return text
    return systems["else"]


def question_text(name: str, evaluation: str, instruction: str, gold: str) -> str:
    """What a prompt says behind the document."""
    if name in (GSM, TOPIC):
        return f"\n\n{instruction}"
    if evaluation == "exam":
        rule = "Please directly give the answer without any additional output or explanation "
        return f" \nQuestion: {instruction}.  {rule}\nAnswer:"
    return f" Instruction: {instruction} \nAnswer this question with {len(gold.split())} words."


def parse_choice(output: str, several: bool) -> str:
    """The letters an output names, "None" where it is empty, "A" where nothing else is found."""
    said = output.strip()
    if not said:
        return "None"
    if said in "ABCD":
        return said
    if not several:
        return next((sign for sign in said if sign in "ABCD"), "A")
    lead = re.match("[ABCD]*", said)
    named = list(lead[0]) if lead else []
    if len(named) < 2:
        named = re.findall(r"[ABCD](?=[\s.)\]]|$)", said.split("Question")[0])
    return "".join(sorted(set(named))) or "A"


def gold_letters(gold: str) -> str:
    """ "(B) Their ..." -> "B" """
    word = (gold.split() or [""])[0]
    return "".join(sign for sign in word if sign in "ABCD")


def choice_score(letters: str, gold: str) -> float:
    """A quarter where only right letters, but not all of them, are named."""
    if letters == gold:
        return 1.0
    return 0.25 if set(letters) < set(gold) else 0.0


def parse_number(output: str) -> float | None:
    """The number a chain of thought ends in, None where there is none."""
    _, told, answer = output.partition("The answer is ")
    if told:
        digits = re.sub(r"\D", "", answer.split("\n")[0].split(".")[0])
    else:
        words = [word for word in output.strip().split("\n\n")[0].split() if re.search(r"\d", word)]
        digits = re.sub(r"[^\d.]", "", words[-1]).strip(".") if words else ""
    try:
        return float(digits)
    except ValueError:
        return None


def squeeze(text: str) -> str:
    return text.lower().replace(" ", "")


def true_or_false(text: str) -> str | None:
    found = re.search("true|false", text.lower())
    return found[0] if found else None


def geometric_mean(values: Sequence[float]) -> float:
    return float(prod(values) ** (1 / len(values)))


def set_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of one set, from 0 to 100."""
    if ROUGES[0] not in rows[0].get("metrics", {}):
        return mean_score(rows)
    return 100 * geometric_mean([sum(row["metrics"][kind] for row in rows) / len(rows) for kind in ROUGES])
