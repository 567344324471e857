"""LongBench: 21 sets of real tasks in English, Chinese and code, and LongBench-E, 13 of them in three length buckets.

The order is the official one: the template is filled, the whole prompt loses its middle where it is too long, and only
then a chat template goes around it; few-shot and code prompts get none. Prompts and answer lengths are read from
longbench/config in the data folder.

What is seen after the compression is the template's text behind {context}, filled. Ready-made prompts (mini) do not
say where that begins, and their wording differs a little from the templates. There it is the last place where the first
fixed line behind {context} opens; in few-shot sets, which have no such line, the last example; where neither is found,
the last 64 tokens. A prompt cut so short that its last half begins inside the question keeps what is left of it.

Of several answers the best match counts. A score of several sets is the plain mean of theirs, whatever their sizes.
"""

from __future__ import annotations

import difflib
import re
import zipfile
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from longwave.checks import read_json
from longwave.evals import data
from longwave.evals.documents import mean_over_sets, mean_score
from longwave.evals.metrics import first_line, jieba, rouge_l, rouge_l_zh, token_f1, token_f1_zh
from longwave.evals.task import Judged, Sample, Setting, TextTask, chosen

GROUPS: dict[str, tuple[str, ...]] = {
    "Single-Doc QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "Multi-Doc QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "Summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "Few-shot": ("trec", "triviaqa", "samsum", "lsht"),
    "Synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "Code": ("lcc", "repobench-p"),
}
SETS = tuple(name for names in GROUPS.values() for name in names)
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
ENGLISH = tuple(name for name in SETS if name not in CHINESE)  # and code
E_SETS = tuple(name for name in ENGLISH if name not in ("narrativeqa", "musique", "qmsum"))
FEW_SHOT, CODE = GROUPS["Few-shot"], GROUPS["Code"]
NO_CHAT = FEW_SHOT + CODE

TEXT_SCORES: dict[str, Callable[[str, str], float]] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), token_f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    **dict.fromkeys(("dureader", "vcsum"), rouge_l_zh),
    "multifieldqa_zh": token_f1_zh,
    "triviaqa": token_f1,
}
CLASSES = ("trec", "lsht")
NUMBERS = {  # where the number that is asked for stands in an answer
    "passage_count": r"(\d+)",
    "passage_retrieval_en": r"Paragraph (\d+)",
    "passage_retrieval_zh": r"段落(\d+)",
}
LAST_EXAMPLE = {"trec": "Question:", "triviaqa": "Passage:", "samsum": "Dialogue:", "lsht": "新闻内容"}  # opens a line
OPENING = 20  # characters in which ready-made prompts and templates agree
FALLBACK = 64  # tokens

REPOSITORY, ARCHIVE = "THUDM/LongBench", "data.zip"


@dataclass(frozen=True)
class LongBench(TextTask):
    """Question answering, summaries, few-shot, synthetic and code tasks over real long texts (LongBench, -E)."""

    name: ClassVar[str] = "longbench"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "set"
    equal_sets: ClassVar[bool] = True
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = GROUPS

    sets: Any = "all"  # "all", or "en" for English and code: those of them that the source has; or names
    source: str = "data"  # longbench/ in the data folder; "mini", "hub" (downloads); a folder with files SET.jsonl
    e: bool = False  # LongBench-E

    def __post_init__(self) -> None:
        if not isinstance(self.e, bool):
            raise ValueError(f"e is True or False, got {self.e!r}")
        if not isinstance(self.source, (str, Path)) or not str(self.source):
            raise ValueError(f'source is "data", "mini", "hub" or a folder; got {self.source!r}')
        object.__setattr__(self, "source", str(self.source))
        if self.sets not in ("all", "en"):
            what = f"the sets of LongBench{'-E' if self.e else ''}"
            object.__setattr__(self, "sets", chosen(self.sets, E_SETS if self.e else SETS, what))
        if self.e:
            object.__setattr__(self, "heat", ("set", "bucket"))

    def samples(self, setting: Setting) -> list[Sample]:
        config = [
            data.require(setting.data, f"longbench/config/dataset2{kind}.json", "longbench")
            for kind in ("prompt", "maxlen")
        ]
        prompts, lengths = (read_json(path, "a table of sets") for path in config)
        places = self._places(setting)
        optional = isinstance(self.sets, str)
        names = (E_SETS if self.e else ENGLISH if self.sets == "en" else SETS) if optional else self.sets
        made: list[Sample] = []
        for name in names:
            stem = f"{name}_e" if self.e else name
            found = read_set(places, stem)
            if found is None:
                if optional:
                    continue
                raise ValueError(f"there is no set {name!r} in this source: {looked_for(places, stem)}")
            where, records = found
            if not records:
                raise ValueError(f"{where} has no records")
            if TEXT_SCORES.get(name) in (rouge_l_zh, token_f1_zh):
                jieba()  # what is not installed is said before anything is measured
            new = data.count_field(lengths, name, config[1])
            template = data.text_field(prompts, name, config[0])
            for number, record in enumerate(setting.limited(records)):
                at = f"{where}, record {number + 1},"
                made.append(self._sample(setting, name, f"{stem}/{number}", record, at, template, new))
        if not made:
            raise ValueError(f"no set of LongBench is in this source: {looked_for(places, stem)}, and so on")
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        """parsed: what is scored of the output, None where all of it is."""
        name, answers = sample.meta["set"], sample.answers
        parsed: Any = None
        metrics = {}
        if name in FEW_SHOT:
            output = parsed = first_line(output)
        if name in CLASSES:
            parsed = [label for label in sample.meta["classes"] if label in output]
            score = max(class_score(parsed, answer) for answer in answers)
        elif name in NUMBERS:
            parsed = re.findall(r"\d+", output)
            score = max(number_share(parsed, re.findall(NUMBERS[name], answer)[0]) for answer in answers)
        elif name in CODE:
            parsed = code_line(output)
            score = max(edit_similarity(parsed, answer) for answer in answers)
            metrics["indel"] = max(indel_similarity(parsed, answer) for answer in answers)
        else:
            score = max(TEXT_SCORES[name](output, answer) for answer in answers)
        return Judged(score, parsed, metrics)

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return mean_over_sets(rows, mean_score)

    def _places(self, setting: Setting) -> list[Path]:
        """Folders, or one zip file, to look for sets in."""
        if self.source == "hub":
            return [download()]
        if self.source == "mini":
            return [data.require(setting.data, "longbench/mini", "longbench:source=mini")]
        if self.source == "data":
            folder = data.require(setting.data, "longbench", "longbench")
            return [folder / "full", folder]
        place = Path(self.source).expanduser()
        if not place.is_dir() and place.suffix != ".zip":
            raise ValueError(f'source is "data", "mini", "hub" or a folder; there is no folder {self.source!r}')
        return [place]

    def _sample(
        self, setting: Setting, name: str, id: str, record: dict[str, Any], where: str, template: str, new: int
    ) -> Sample:
        meta: dict[str, Any] = {"set": name}
        if record.get("length") is not None:
            meta["length"] = record["length"]
        if self.e:
            meta["bucket"] = bucket(data.field(record, "length", where), where)
        if name in CLASSES:
            meta["classes"] = data.list_field(record, "all_classes", where)
        answers = data.list_field(record, "answers", where)
        if name in NUMBERS and not all(re.search(NUMBERS[name], answer) for answer in answers):
            raise ValueError(f"{where} has answers {answers!r}, of which one has no number of the form {NUMBERS[name]}")
        if "prompt" in record and "context" not in record:
            prompt = data.text_field(record, "prompt", where)
            question = ready_question(setting.tokenizer, name, prompt, template)
        else:
            fields = {key: data.text_field(record, key, where) for key in ("context", "input")}
            told = f"the template of {name}"
            before, question = (data.fill(part, told, **fields) for part in data.halves(template, "{context}", told))
            prompt = before + fields["context"] + question
        ids, context, cut_from = encode(setting, prompt, question, new, chat=name not in NO_CHAT)
        return Sample(id, ids, context, new, tuple(answers), meta, cut_from, stop_at_newline=name == "samsum")


def encode(
    setting: Setting, prompt: str, question: str, new: int, chat: bool, prefix: str = ""
) -> tuple[array[int], int, int | None]:
    """Token ids of the prompt, cut in its middle where it has to be, those before the question, and those it had.
    prefix: opens the model's turn."""
    around = setting.added(chat) + (setting.count(prefix) if prefix else 0)
    while True:
        shown, cut_from = setting.cut_middle(prompt, setting.room(new, around))
        asked = question
        if cut_from is not None:  # as the tokenizer gives it back
            ids = setting.tokenizer(question, add_special_tokens=False).input_ids
            asked = setting.tokenizer.decode(ids, skip_special_tokens=True)
        tokens, context = setting.encode(shown, common_end(shown, asked), prefix, chat=chat)
        over = 0 if setting.window is None else len(tokens) + new - setting.window
        if over <= 0:
            return tokens, context, cut_from
        around += over  # where the halves meet, text can take more tokens than before


def ready_question(tokenizer: Any, name: str, prompt: str, template: str) -> str:
    """What ends a ready-made prompt, see the top of this file."""
    _, after = data.halves(template, "{context}", f"the template of {name}")
    if name in LAST_EXAMPLE:
        start = prompt.rfind("\n" + LAST_EXAMPLE[name]) + 1
    else:
        lines = (line.strip() for line in after.replace("{input}", "\n").split("\n"))
        fixed = next(filter(None, lines), None)
        start = prompt.rfind(fixed[:OPENING]) if fixed else -1
    if start > 0:
        gap = after[: len(after) - len(after.lstrip())]
        return prompt[start - len(gap) if prompt[:start].endswith(gap) else start :]
    return str(tokenizer.decode(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids[-FALLBACK:]))


def common_end(text: str, other: str) -> str:
    """The longest text that both end with."""
    size = 0
    for one, two in zip(reversed(text), reversed(other), strict=False):
        if one != two:
            break
        size += 1
    return text[len(text) - size :]


def bucket(length: Any, where: str) -> str:
    """LongBench-E's length bucket; lengths are words."""
    if not isinstance(length, (int, float)):
        raise ValueError(f"{where} has length {length!r}, which is not a number of words")
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"


def read_set(places: Sequence[Path], stem: str) -> tuple[str, list[dict[str, Any]]] | None:
    """The file where a set lies, and its records; None where it is in none of the places."""
    for place in places:
        if place.suffix == ".zip" and not place.is_dir():
            return read_zipped(place, stem)
        if path := data.find_records(place, stem):
            return str(path), data.read_records(path)
    return None


def read_zipped(archive: Path, stem: str) -> tuple[str, list[dict[str, Any]]] | None:
    try:
        with zipfile.ZipFile(archive) as opened:
            name = next((name for name in opened.namelist() if name.split("/")[-1] == f"{stem}.jsonl"), None)
            if name is None:
                return None
            inside = archive / name
            return str(inside), list(data.json_lines(inside, opened.read(name).decode("utf-8")))
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {archive}: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{archive / str(name)} is not UTF-8 text") from None


def looked_for(places: Sequence[Path], stem: str) -> str:
    endings = (".jsonl",) if places[0].suffix == ".zip" else data.FORMATS
    return f"looked for {', '.join(stem + ending for ending in endings)} in {' and '.join(map(str, places))}"


def download() -> Path:
    """The archive of the Hugging Face hub, or its copy in the local cache."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
    except Exception as error:  # of the network, in many kinds
        why = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot download {ARCHIVE} of {REPOSITORY} ({type(error).__name__}: {why}): go online once, or give "
            "source=FOLDER with its files"
        ) from None


def class_score(named: Sequence[str], gold: str) -> float:
    """1 / the number of classes named, 0 where the right one is not among them. Classes that are a part of the right
    one do not count, but as in the reference, the one after each of these is not looked at."""
    left = list(named)
    at = 0
    while at < len(left):
        if left[at] in gold and left[at] != gold:
            left.remove(left[at])
        at += 1
    return 1 / len(left) if gold in left else 0.0


def number_share(numbers: Sequence[str], gold: str) -> float:
    """The share of the numbers in an output that are the right one."""
    return numbers.count(gold) / len(numbers) if numbers else 0.0


def code_line(output: str) -> str:
    """The first line without signs of a comment or of Markdown."""
    lines = output.lstrip("\n").split("\n")
    return next((line for line in lines if not any(sign in line for sign in ("`", "#", "//"))), "")


def edit_similarity(line: str, gold: str) -> float:
    """In whole percent, by difflib, as the official requirements have it."""
    if line == gold:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, gold).ratio()) / 100 if line and gold else 0.0


def indel_similarity(line: str, gold: str) -> float:
    """What the same code gives where a Levenshtein package is installed."""
    from rapidfuzz.fuzz import ratio

    return round(ratio(line, gold)) / 100
