"""LooGLE: short and long dependency questions, clozes and summaries of recent documents.

The data folder has five documents a set, a sample of the benchmark that is far too small to rank methods on: compare
methods on the same questions. A folder with the whole benchmark in the same form can be named.

A document that is too long loses its middle, so that half of the room is before and half behind it; all questions of a
document see it cut alike. Prompts and answer lengths are read from loogle/config in the data folder; prompts go into
the chat template.

Scores: of clozes the share of masks that are named exactly, with the share that have a word in common as metric
"partial". Of the others recall of ROUGE-L by the package `rouge`, with ROUGE-1 and -2 and the token F1 as metrics: long
answers gain in recall, so look at both. BLEU, METEOR, BERTScore and the LLM judge of the benchmark are left out.
The first {...} of an output is read as the answer to a cloze; the reference wants nothing around it. Sets weigh the
same in a score of several sets.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from longwave.checks import read_json
from longwave.evals import data
from longwave.evals.documents import ask, mean_over_sets, mean_score
from longwave.evals.metrics import token_f1
from longwave.evals.task import Judged, Sample, Setting, TextTask, chosen

CLOZE = "shortdep_cloze"
SETS = ("shortdep_qa", "longdep_qa", CLOZE, "longdep_summarization")


@dataclass(frozen=True)
class LooGLE(TextTask):
    """Questions, clozes and summaries of documents of 10k to 40k tokens (LooGLE; a sample too small to rank)."""

    name: ClassVar[str] = "loogle"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "set"
    equal_sets: ClassVar[bool] = True
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Short dependency": ("shortdep_qa", CLOZE),
        "Long dependency": ("longdep_qa", "longdep_summarization"),
    }

    sets: Any = "all"  # shortdep_qa, longdep_qa, shortdep_cloze, longdep_summarization
    source: str = "data"  # loogle/ in the data folder; or a folder with files SET.jsonl

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", tuple(dict.fromkeys(chosen(self.sets, SETS, "the sets of LooGLE"))))
        if not isinstance(self.source, (str, Path)) or not str(self.source):
            raise ValueError(f'source is "data" or a folder; got {self.source!r}')
        object.__setattr__(self, "source", str(self.source))

    def samples(self, setting: Setting) -> list[Sample]:
        config = [
            data.require(setting.data, f"loogle/config/task2{kind}.json", "loogle") for kind in ("prompt", "maxlen")
        ]
        prompts, lengths = (read_json(path, "a table of sets") for path in config)
        if self.source == "data":
            folder = data.require(setting.data, "loogle", "loogle")
        else:
            folder = Path(self.source).expanduser()
        if not folder.is_dir():
            raise ValueError(f'source is "data" or a folder; there is no folder {self.source!r}')
        made: list[Sample] = []
        for name in self.sets:
            path = data.find_records(folder, name)
            if path is None:
                raise ValueError(f"there is no {name}.jsonl in {folder}: is it the folder of LooGLE's records?")
            template = data.text_field(prompts, name, config[0])
            new = data.count_field(lengths, name, config[1])
            mine: list[Sample] = []
            for number, record in enumerate(data.read_records(path)):
                if setting.limit is not None and len(mine) >= setting.limit:
                    break
                where = f"{path}, record {number + 1}"
                mine += self._record(setting, name, f"{name}/{number}", record, where, template, new)
            made += setting.limited(mine)
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        if sample.meta["set"] == CLOZE:
            wanted: dict[str, str] = json.loads(sample.answers[0])
            named = parse_masks(output)
            exact = sum(named.get(mask) == name for mask, name in wanted.items())
            partial = sum(bool(set(named.get(mask, "").split()) & set(name.split())) for mask, name in wanted.items())
            metrics = {"exact": exact, "partial": partial / len(wanted), "masks": len(wanted)}
            return Judged(exact / len(wanted), named, metrics)
        recall = rouge_recall(output or "None", sample.answers[0])
        return Judged(recall["rougeL"], None, {**recall, "f1": token_f1(output, sample.answers[0])})

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return mean_over_sets(rows, set_score)

    def _record(
        self, setting: Setting, name: str, id: str, record: dict[str, Any], where: str, template: str, new: int
    ) -> list[Sample]:
        pairs = question_pairs(record, where)
        before, after = data.halves(template, "{input}", f"the template of {name}")
        questions = [data.fill(after, f"the template of {name}", Q=question) for question, _ in pairs]
        document = str(data.field(record, "input", where))
        prompts = ask(setting, data.fill(before, f"the template of {name}"), document, questions, new, where, "ends")
        meta = {"set": name}
        return [
            Sample(f"{id}/{number}", prompt.ids, prompt.context, new, (gold,), meta, prompt.cut_from)
            for number, (prompt, (_, gold)) in enumerate(zip(prompts, pairs, strict=True))
        ]


def question_pairs(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Questions and answers; the names behind the masks of a cloze as JSON; a summary has an empty question."""
    written = data.field(record, "qa_pairs", where)
    if written == "none":
        return [("", str(data.field(record, "output", where)))]
    try:
        pairs = ast.literal_eval(written) if isinstance(written, str) else written
        found = [(str(pair["Q"]), pair["A"]) for pair in pairs]
    except (ValueError, SyntaxError, TypeError, KeyError):
        raise ValueError(f"{where} has qa_pairs that are no list of Q and A: {str(written)[:60]!r}") from None
    if not found:
        raise ValueError(f"{where} has no questions")
    return [(q, json.dumps(a, ensure_ascii=False) if isinstance(a, dict) else str(a)) for q, a in found]


def parse_masks(output: str) -> dict[str, str]:
    """The first {...} of an output, as Python or JSON writes it; empty where there is none."""
    found = re.search(r"\{.*?\}", output, re.DOTALL)
    if not found:
        return {}
    for read in (ast.literal_eval, json.loads):
        try:
            named = read(found[0])
        except (ValueError, SyntaxError):
            continue
        if isinstance(named, dict):
            return {str(mask): str(name) for mask, name in named.items()}
    return {}


def rouge_recall(output: str, gold: str) -> dict[str, float]:
    """Recall of ROUGE-1, -2 and -L by the package `rouge`; 0 for texts without words."""
    from rouge import Rouge

    try:
        scores = Rouge().get_scores(output, gold)[0]
    except (ValueError, RecursionError):  # its way of saying that a side is empty, or too long for it
        return dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0)
    return {f"rouge{kind.upper()}": float(scores[f"rouge-{kind}"]["r"]) for kind in ("1", "2", "l")}


def set_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of one set, from 0 to 100; clozes count by masks."""
    masks = sum(row.get("metrics", {}).get("masks", 0) for row in rows)
    return 100 * float(sum(row["metrics"]["exact"] for row in rows)) / masks if masks else mean_score(rows)
