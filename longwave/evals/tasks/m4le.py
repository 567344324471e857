"""M4LE (arXiv 2310.19240): five abilities, from finding one stated place to the whole text, at growing lengths.

`m4le` reads the benchmark's files SET.jsonl from a folder. Nothing is cut: samples that do not fit are left
out, as the benchmark leaves them. Outputs are cut and scored its way: equal, contained, F1 of a set of ids, recall of
ROUGE-L (with its F beside it, since longer outputs gain in recall; Chinese goes through jieba). Two of its flaws are
mended: of the "explicit-single" news only the first line counts, and the last online-shopping id loses its full stop.
Translations, which BLEU scores, are left out, and so is its normalised total, whose reference was not published.

`m4le-like` is generated: "wikitext" by the benchmark's rules from the text it is made of, with our own draws, as its
ids are lost, and without a second right answer; "single", "multiple" and "count" ask for items of made-up lists.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from longwave.checks import read_text, whole
from longwave.evals import data
from longwave.evals.documents import mean_over_sets, mean_score
from longwave.evals.metrics import cut_chinese
from longwave.evals.task import Judged, Sample, Setting, TextTask, chosen, listed

EXACT, CONTAINS, IDS, RECALL = "exact", "contains", "ids", "recall"
DOT, STOP = ".", "。"
GROUPS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {  # ability -> set -> score, and where outputs are cut
    "Explicit single": {
        **dict.fromkeys(("mnds-news_explicit-single", "thucnews_explicit-single"), (EXACT, ("\n",))),
        "newsqa": (CONTAINS, ("\n", DOT)),
        "c3": (CONTAINS, ("\n", STOP)),
        "wow": (CONTAINS, (",", "\n")),
        "drcd_explicit-single": (CONTAINS, ("，", "\n")),
        **dict.fromkeys(("cnnnews", "cepsum", "lcsts", "ncls"), (RECALL, ("\n",))),
    },
    "Explicit multiple": {
        **dict.fromkeys(("mnds-news_explicit-multiple", "marc"), (IDS, (DOT,))),
        **dict.fromkeys(("thucnews_explicit-multiple", "online-shopping"), (IDS, (STOP,))),
    },
    "Semantic single": {
        "wikitext-103": (EXACT, (DOT,)),
        "wiki2019zh": (EXACT, (STOP,)),
        **dict.fromkeys(("duorc", "nq-open"), (CONTAINS, ("\n", DOT))),
        **dict.fromkeys(("dureader", "drcd_semantic-single"), (CONTAINS, ("\n", STOP))),
        **dict.fromkeys(("wikihow", "news2016"), (RECALL, ("\n",))),
    },
    "Semantic multiple": {
        "mnds-news_semantic-multiple": (EXACT, (DOT,)),
        "thucnews_semantic-multiple": (EXACT, (STOP,)),
        "hotpotqa": (CONTAINS, ("\n", DOT)),
    },
    "Global": {
        "bigpatent_global_cls": (CONTAINS, (":",)),
        "triviaqa": (CONTAINS, ("\n", DOT)),
        **dict.fromkeys(("arxiv", "pubmed", "booksum", "bigpatent_global_sum"), (RECALL, ("\n",))),
        **dict.fromkeys(("cnewsum", "clts+"), (RECALL, ("\n", "新闻"))),
    },
}
RULES = {name: rule for sets in GROUPS.values() for name, rule in sets.items()}
LIKE = {"wikitext": (EXACT, (DOT,)), "single": (CONTAINS, ("\n",)), "multiple": (IDS, (DOT,)), "count": (EXACT, (DOT,))}

CONTINUES = (
    "You are given a query paragraph and multiple candidate paragraphs. One candidate paragraph is the continuation of "
    "the query paragraph. You need to return the paragraph ID of the candidate paragraph that continues the query "
    "paragraph.\n"
)
SHOWN = ("C29BD6", "37B155")  # ids of the example's wrong and right paragraph
OPENINGS = (  # of the three paragraphs that its sentences are taken from
    "In 2006 , Boulter starred alongside Whishaw in the play Citizenship",
    "The An Lushan Rebellion began in December 755",
    "He appeared on a 2006 episode of the television series , Doctors",
)
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
SIZES = ("tiny", "small", "large", "huge")
PLACES = ("the attic", "the cellar", "the garden", "the kitchen", "the shed", "the hall")
ITEMS = "You are given a list of items. Answer the question about them.\n"
EXAMPLE = "Item 0A1B2C: colour red, size small, place the hall.\n"


@dataclass(frozen=True)
class Scored(TextTask):
    """Sets whose outputs are cut and scored by a rule."""

    def judge(self, sample: Sample, output: str) -> Judged:
        name = sample.meta["set"]
        rule, cuts = (RULES | LIKE)[name]
        return score(name, rule, cuts, output, sample.answers)

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return mean_over_sets(rows, mean_score)


@dataclass(frozen=True)
class M4LE(Scored):
    """Classification, retrieval, questions and summaries by ability and length (M4LE, its files)."""

    name: ClassVar[str] = "m4le"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "set"
    equal_sets: ClassVar[bool] = True
    heat: ClassVar[tuple[str, str]] = ("set", "bucket")
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {name: tuple(sets) for name, sets in GROUPS.items()}

    source: str = ""  # a folder with files SET.jsonl
    sets: Any = "all"  # those of them that are found; or names
    buckets: Any = (1000, 2000, 4000)  # words of a sample, characters of a Chinese one

    def __post_init__(self) -> None:
        if not isinstance(self.source, (str, Path)) or not str(self.source):
            raise ValueError("give source=FOLDER with files SET.jsonl, from huggingface.co/datasets/wckwan/M4LE")
        object.__setattr__(self, "source", str(self.source))
        if self.sets != "all":
            object.__setattr__(self, "sets", chosen(self.sets, tuple(RULES), "the sets of M4LE"))
        object.__setattr__(self, "buckets", listed(self.buckets, int, "buckets"))

    def samples(self, setting: Setting) -> list[Sample]:
        folder = Path(self.source).expanduser()
        made: list[Sample] = []
        for name in RULES if self.sets == "all" else self.sets:
            path = data.find_records(folder, name)
            if path is None:
                if self.sets == "all":
                    continue
                raise ValueError(
                    f"there is no {name}.jsonl in {folder}: it lies at huggingface.co/datasets/wckwan/M4LE"
                )
            cells: list[Sample] = []
            for number, record in enumerate(data.read_records(path)):
                if setting.limit is not None and len(cells) >= setting.limit:
                    break
                where = f"{path}, record {number + 1}"
                bucket = data.count_field(record, "length_bucket", where)
                if bucket not in self.buckets:
                    continue
                head, text = (data.text_field(record, part, where) for part in ("instruction", "input"))
                answers = tuple(data.list_field(record, "answers", where))
                meta = {"set": name, "bucket": bucket}
                sample = build(setting, f"{name}/{number}", f"{head}\n{text}", RULES[name][0], answers, meta)
                if setting.window is None or len(sample.ids) + sample.max_new_tokens <= setting.window:
                    cells.append(sample)
            made += cells
        if not made:
            raise ValueError(f"{folder} has no files such as newsqa.jsonl with samples of these buckets that fit")
        return made


@dataclass(frozen=True)
class M4LELike(Scored):
    """The paragraph that continues another, and items of made-up lists (like M4LE)."""

    name: ClassVar[str] = "m4le-like"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "set"
    equal_sets: ClassVar[bool] = True
    heat: ClassVar[tuple[str, str]] = ("set", "bucket")

    sets: Any = tuple(LIKE)
    buckets: Any = (1000, 2000)  # words of a sample, at most
    count: int = 10  # samples of a set and bucket

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", chosen(self.sets, tuple(LIKE), "the sets of m4le-like"))
        object.__setattr__(self, "buckets", listed(self.buckets, int, "buckets"))
        whole("count", self.count, 1)
        if min(self.buckets) < 1000:
            raise ValueError(f"buckets are at least 1000 words, got {min(self.buckets)}")

    def samples(self, setting: Setting) -> list[Sample]:
        made: list[Sample] = []
        articles: list[list[str]] = []
        if "wikitext" in self.sets:
            path = data.require(setting.data, "wikitext2/wiki.test.raw", "m4le-like:sets=wikitext")
            articles = read_articles(read_text(path))
        for name in self.sets:
            cells = []
            for bucket in self.buckets:
                for index in range(self.count):
                    draw = random.Random(f"m4le/{name}/{bucket}/{index}/{setting.seed}")
                    if name == "wikitext":
                        prompt, answers, place = continuation(draw, articles, bucket, index)
                    else:
                        prompt, answers, place = items(draw, name, bucket, index)
                    meta = {"set": name, "bucket": bucket, "place": place}
                    sample = build(setting, f"{name}/{bucket}/{index}", prompt, LIKE[name][0], answers, meta)
                    setting.check_fits(len(sample.ids), sample.max_new_tokens, f"{name} at {bucket} words")
                    cells.append(sample)
            made += setting.limited(cells)
        return made


def build(setting: Setting, id: str, prompt: str, rule: str, answers: tuple[str, ...], meta: dict[str, Any]) -> Sample:
    """The question is a prompt's last paragraph; where it asks first, its last line."""
    question = prompt.rstrip().rpartition("\n\n" if "\n\nQuestion" in prompt else "\n")[2]
    ids, before = setting.encode(prompt, question, chat=False)
    each = {IDS: 16 + 12 * (answers[0].count(",") + answers[0].count("，") + 1), RECALL: 256}
    return Sample(id, ids, before, each.get(rule, 32), answers, meta)


def score(name: str, rule: str, cuts: Sequence[str], output: str, answers: Sequence[str]) -> Judged:
    said = output.strip() if "\n" in cuts else output
    for mark in cuts:
        said = said.split(mark)[0]
    said = said.strip()
    if rule == EXACT:
        return Judged(float(any(said.lower() == answer.strip().lower().rstrip(DOT + STOP) for answer in answers)), said)
    if rule == CONTAINS:
        return Judged(float(any(answer.strip().lower() in said.lower() for answer in answers)), said)
    if rule == IDS:
        return Judged(max(id_f1(said, answer) for answer in answers), said)
    if name == "news2016":  # only what stands between the first two quotation marks
        said = said.split('"')[1] if said.count('"') > 1 else said
    recall, f1 = (max(part) for part in zip(*(rouge_l(said, answer) for answer in answers), strict=True))
    return Judged(recall, said, {"f1": f1})


def id_f1(said: str, gold: str) -> float:
    """F1 of two sets of ids; an empty one is the set of one empty id."""
    one, other = (
        {part.strip() for part in re.split("[,，]", text.strip().rstrip(DOT + STOP))} for text in (said, gold)
    )
    return 2 * len(one & other) / (len(one) + len(other))


def rouge_l(said: str, gold: str) -> tuple[float, float]:
    """Recall and F of the package `rouge`, of Chinese over jieba's words; 0 for texts without words."""
    from rouge import Rouge

    if re.search("[一-鿿]", gold):
        said, gold = (" ".join(cut_chinese(text)) for text in (said, gold))
    try:
        found = Rouge().get_scores(said, gold)[0]["rouge-l"]
    except (ValueError, RecursionError):  # its way of saying that a side is empty, or too long for it
        return 0.0, 0.0
    return float(found["r"]), float(found["f"])


def read_articles(text: str) -> list[list[str]]:
    """Paragraphs of more than 30 words, article by article, of a WikiText file."""
    articles: list[list[str]] = []
    for line in (line.strip() for line in text.split("\n")):
        if re.fullmatch(r"= [^=].*[^=] =", line):
            articles.append([])
        elif articles and not line.startswith("= ") and len(line.split()) > 30:
            articles[-1].append(line)
    return [article for article in articles if article]


def continuation(
    draw: random.Random, articles: list[list[str]], bucket: int, index: int
) -> tuple[str, tuple[str, ...], int]:
    """A paragraph, others, and among them the one that follows it; as many as the bucket's words hold."""
    sentences = {
        opening: paragraph[paragraph.index(opening) :].split(" . ")[0] + " ."
        for article in articles
        for paragraph in article
        for opening in OPENINGS
        if opening in paragraph
    }
    if len(sentences) != len(OPENINGS):
        raise ValueError("wikitext2/wiki.test.raw lacks the paragraphs of the example: is it the official file?")
    query, wrong, right = (sentences[opening] for opening in OPENINGS)
    example = listing(query, [(SHOWN[0], wrong), (SHOWN[1], right)]) + f" {SHOWN[1]}.\n\n"
    longer = [article for article in articles if len(article) > 1]
    count = -(-bucket // 230)
    while True:
        own = draw.choice(longer)
        place = draw.randrange(len(own) - 1)
        pool = [p for article in articles for p in article if p not in (own[place], own[place + 1])]
        candidates = draw.sample(pool, count)
        at = (5 * index) % (count + 1)
        candidates.insert(at, own[place + 1])
        ids = [f"{draw.randrange(16**6):06X}" for _ in candidates]
        prompt = CONTINUES + example + listing(own[place], list(zip(ids, candidates, strict=True)))
        if len(set(ids)) == len(ids) and len(prompt.split()) < bucket:
            return prompt, (ids[at],), at
        count = max(2, count - (len(prompt.split()) >= bucket))


def listing(query: str, candidates: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f"Candidate Paragraph {id}: {paragraph}\n" for id, paragraph in candidates)
    return f"Query Paragraph: {query}\n{shown}Answer:"


def items(draw: random.Random, kind: str, bucket: int, index: int) -> tuple[str, tuple[str, ...], int]:
    """A list of items, and a question for the place of one, for the ids of a colour, or for their number."""
    count = (bucket - 60) // 10
    colour = draw.choice(COLOURS)
    wanted = 1 if kind == "single" else 1 + index % 5
    others = [name for name in COLOURS if name != colour]
    places = sorted(draw.sample(range(count), wanted))
    ids = [f"{number:06X}" for number in draw.sample(range(16**6), count)]
    lines, asked = [], []
    for place, id in enumerate(ids):
        shade = colour if place in places else draw.choice(others)
        where = draw.choice(PLACES)
        lines.append(f"Item {id}: colour {shade}, size {draw.choice(SIZES)}, place {where}.\n")
        if place in places:
            asked.append((id, where))
    if kind == "single":
        question, answer = f"Question: What is the place of item {asked[0][0]}?", asked[0][1]
        shown = "Question: What is the place of item 0A1B2C?\nAnswer: the hall\n"
    elif kind == "multiple":
        question, answer = f"Question: What are the ids of all {colour} items?", ", ".join(id for id, _ in asked)
        shown = "Question: What are the ids of all red items?\nAnswer: 0A1B2C.\n"
    else:
        question, answer = f"Question: How many {colour} items are there?", str(len(asked))
        shown = "Question: How many red items are there?\nAnswer: 1.\n"
    return f"{ITEMS}{EXAMPLE}{shown}\n{''.join(lines)}\n{question}\nAnswer:", (answer,), places[0]
