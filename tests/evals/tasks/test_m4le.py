import json
import re

import pytest
import transformers

from longwave.evals.task import Setting
from longwave.evals.tasks.m4le import LIKE, M4LE, RULES, M4LELike, read_articles, score
from longwave.models import smollm2
from tests.conftest import DATA

needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no evaluation data at {DATA}")


@pytest.fixture(scope="module")
def setting():
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    return lambda limit=None, window=None: Setting(tokenizer, window, 42, limit, DATA)


def of(name, output, *answers):
    return score(name, *(RULES | LIKE)[name], output, answers).score


@pytest.mark.parametrize(
    ("name", "output", "answers", "expected"),
    [
        ("newsqa", "2: performing operations", ["2"], 1),
        ("newsqa", "12", ["1"], 1),  # the official flaw
        ("newsqa", "anything", [""], 1),  # and another
        ("newsqa", "nothing\nthe answer", ["answer"], 0),
        ("wow", "Paris, France", ["france"], 0),
        ("marc", ".", ["."], 1),  # no review is positive
        ("marc", "A, B", ["B,A."], 1),
        ("marc", "A, B. C", ["A, B, C, D."], pytest.approx(2 / 3)),
        ("online-shopping", "A1，B2。", ["A1，B2。"], 1),
        ("mnds-news_explicit-single", "sport\nand more", ["Sport"], 1),
        ("wikitext-103", " 37B155. More", ["37B155"], 1),
        ("wikitext-103", "37B156", ["37B155"], 0),
        ("mnds-news_semantic-multiple", "3.", ["3."], 1),
        ("bigpatent_global_cls", "Physics: yes", ["physics"], 1),
        *((name, "", ["x"], 0) for name in RULES),
    ],
)
def test_scores(name, output, answers, expected):
    assert of(name, output, *answers) == expected


def test_longer_outputs_gain_recall_and_lose_f():
    gold = "the river rose in the night"
    short = score("arxiv", *RULES["arxiv"], "the river rose", [gold])
    longer = score("arxiv", *RULES["arxiv"], "the river rose because rain fell in the night for days and weeks", [gold])
    assert longer.score > short.score
    assert longer.metrics["f1"] < short.metrics["f1"]
    assert of("lcsts", "河水上涨", "河水上涨") == 1
    assert of("news2016", 'he said "the river rose" and left', "the river rose") == 1


@needs_data
def test_the_text_is_the_official_one():
    articles = read_articles((DATA / "wikitext2/wiki.test.raw").read_text(encoding="utf-8"))
    assert (len(articles), sum(map(len, articles))) == (61, 1770)
    words = [len(paragraph.split()) for article in articles for paragraph in article]
    assert (min(words), max(words), round(sum(words) / len(words))) == (31, 481, 131)


@needs_data
def test_generated_sets(setting):
    task = M4LELike(count=3)
    samples = task.samples(setting())
    decode = setting().tokenizer.decode
    assert len(samples) == 4 * 2 * 3
    for sample in samples:
        text, question = decode(sample.ids), decode(sample.ids[sample.context :])
        assert len(text.split()) <= sample.meta["bucket"]
        assert len(text.split()) > sample.meta["bucket"] / 3
        assert task.judge(sample, f" {sample.answers[0]}.").score == 1
        assert task.judge(sample, "").score == 0
        if sample.meta["set"] == "wikitext":
            ids = re.findall(r"^Candidate Paragraph (\w+):", text, re.MULTILINE)[2:]
            assert ids[sample.meta["place"]] == sample.answers[0]
            assert "Answer: 37B155.\n\nQuery Paragraph:" in text
            continue
        listed = re.findall(r"^Item (\w+): colour (\w+), size \w+, place (.+)\.$", text, re.MULTILINE)[1:]
        if sample.meta["set"] == "single":
            asked = re.search(r"item (\w+)\?", question)[1]
            assert sample.answers == tuple(place for id, _, place in listed if id == asked)
        else:
            colour = re.search(r"(?:all|many) (\w+) items", question)[1]
            named = [id for id, shade, _ in listed if shade == colour]
            assert sample.answers == ((", ".join(named) if sample.meta["set"] == "multiple" else str(len(named))),)
    assert [s.id for s in M4LELike(count=3).samples(setting(limit=1))] == [f"{name}/1000/0" for name in LIKE]


def test_the_users_files(setting, tmp_path):
    with pytest.raises(ValueError, match="has no files such as newsqa"):
        M4LE(source=tmp_path).samples(setting())
    record = {"instruction": "Read.", "input": "Article 1: x\n\nQuestion: Who?\nAnswer:", "answers": ["me"]}
    records = [{**record, "length_bucket": bucket} for bucket in (1000, 8000, 2000)]
    (tmp_path / "newsqa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    task = M4LE(source=tmp_path)
    samples = task.samples(setting())
    assert [(s.id, s.meta["bucket"]) for s in samples] == [("newsqa/0", 1000), ("newsqa/2", 2000)]
    decode = setting().tokenizer.decode
    assert decode(samples[0].ids) == "Read.\nArticle 1: x\n\nQuestion: Who?\nAnswer:"
    assert decode(samples[0].ids[samples[0].context :]).strip().startswith("Question: Who?")
    with pytest.raises(ValueError, match=r"there is no wow\.jsonl in"):
        M4LE(source=tmp_path, sets="wow").samples(setting())
    with pytest.raises(ValueError, match="of these buckets that fit"):
        M4LE(source=tmp_path).samples(setting(window=20))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: M4LE(), "give source=FOLDER with files SET.jsonl"),
        (lambda: M4LE(source="x", sets="wows"), "there is no 'wows' among the sets of M4LE"),
        (lambda: M4LELike(buckets=500), "buckets are at least 1000 words, got 500"),
        (lambda: M4LELike(count=0), "count is a whole number"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
