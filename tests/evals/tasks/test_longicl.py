import json

import pytest
import transformers

from longwave.evals.task import Sample, Setting
from longwave.evals.tasks.longicl import LongICL, in_rounds, read_entities
from longwave.models import smollm2
from tests.conftest import DATA

needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no evaluation data at {DATA}")


@pytest.fixture(scope="module")
def setting():
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    return lambda limit=2, window=None, seed=42: Setting(tokenizer, window, seed, limit, DATA)


@needs_data
def test_fewnerd(setting):
    task = LongICL(rounds=(1, 2))
    samples = task.samples(setting())
    assert [s.id for s in samples] == ["1/0", "1/1", "2/0", "2/1"]
    decode = setting().tokenizer.decode
    first, later = (decode(samples[n].ids[: samples[n].context]) for n in (0, 2))
    assert (first.count("\nSentence: ") + 0, later.count("\nSentence: ")) == (57, 114)
    assert later.startswith(first)  # rounds are prefixes of each other
    assert decode(samples[0].ids[samples[0].context :]).startswith("Sentence: In the early 1930s the band")
    assert samples[0].answers[1] == "Taft Hotel: building-hotel"
    assert samples[0].ids != LongICL(order="reversed").samples(setting(1))[0].ids
    for sample in task.samples(setting(limit=50))[:50]:
        judged = task.judge(sample, "\n".join(sample.answers))
        assert judged.score == 1
        assert task.judge(sample, "").score == 0
    with pytest.raises(ValueError, match="longicl at 1 rounds takes"):
        LongICL().samples(setting(window=2048))


@pytest.mark.parametrize("order", ["scattered", "grouped", "reversed"])
def test_made_up_labels(setting, order):
    task = LongICL(set="synthetic-like", labels=5, rounds=3, order=order)
    for sample in task.samples(setting(6)):
        text = setting().tokenizer.decode(sample.ids)
        notes = [block.split("\nclass:") for block in text.split("note: ")[1:]]
        labels = [label.strip() for _, label in notes[:-1]]
        assert len(labels) == 15
        assert len(set(labels)) == 5
        assert notes[-1][1].strip() == ""
        assert order != "grouped" or labels == sorted(labels)
        known = {label: {w for t, other in notes[:-1] if other.strip() == label for w in t.split()} for label in labels}
        assert sample.answers[0] in labels
        assert all(len(words) > 8 for words in known.values())
        assert task.judge(sample, f" {sample.answers[0].upper()}\nnote: more").score == 1
        assert task.judge(sample, "").score == 0
    assert task.samples(setting(2)) == task.samples(setting(6))[:2]


def test_rounds_take_from_others_what_a_label_lacks():
    items = [("1", "a"), ("2", "b"), ("3", "a"), ("4", "a"), ("5", "c"), ("6", "c")]
    assert [text for text, _ in in_rounds(items, 1)] == ["1", "2", "5"]
    assert [text for text, _ in in_rounds(items, 2)] == ["1", "2", "5", "3", "6", "4"]
    assert len(in_rounds(items, 9)) == 6


def test_banking77_of_a_folder(setting, tmp_path):
    rows = [{"text": "Where is my card?", "label": 1}, {"text": "Why a fee?", "label": 0}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "names.json").write_text('["card_fee", "card_arrival"]')
    task = LongICL(set="banking77", source=tmp_path)
    with pytest.raises(ValueError, match=r"there is no test\.jsonl in"):
        task.samples(setting())
    (tmp_path / "test.jsonl").write_text('{"text": "A fee?", "label": "card_fee"}\n')
    (sample,) = task.samples(setting())
    assert (
        setting()
        .tokenizer.decode(sample.ids)
        .endswith(
            "as follows: \nservice query: Where is my card?\nintent category: card_arrival\n"
            "service query: Why a fee?\nintent category: card_fee\nservice query: A fee?\nintent category: "
        )
    )
    cases = {"Card_Fee\nservice query: x": 1, "card_fee service query": 1, "card": 0, "card_fee.": 0, "": 0}
    assert [task.judge(sample, text).score for text in cases] == list(cases.values())
    (tmp_path / "names.json").write_text("[]")
    with pytest.raises(ValueError, match=r"record 1 has label 1, which .*names\.json does not name"):
        task.samples(setting())


def test_entities():
    assert read_entities("A: x\nB: y: z\n\nC: w") == {"A": "x", "B": "y"}
    assert read_entities("\nA: x\nA: y\nSentence: more") == {"A": "y"}
    assert read_entities("none") == {}
    task = LongICL()
    gold = Sample("x", [1, 2], 1, 100, ("A: x", "B: y", "C: d: z"), {"set": "fewnerd"})
    one, none = task.judge(gold, "A: x\nB: z\nD: x\nC: d: z"), task.judge(gold, "")
    assert (one.metrics, one.score) == ({"right": 1, "named": 4, "gold": 3}, pytest.approx(2 / 7))
    rows = [{"metrics": judged.metrics, "score": judged.score} for judged in (one, none)]
    assert task.total(rows) == pytest.approx(100 * 2 / 10)
    assert task.total(rows[1:]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set": "trec"}, "there is no 'trec' among the sets"),
        ({"set": "all"}, "there is no 'all' among the sets"),
        ({"set": ("fewnerd", "banking77")}, "the sets of LongICLBench"),
        ({"rounds": 6}, "rounds are from 1 to 5, got 6"),
        ({"order": "sorted"}, "order is one of scattered, grouped, reversed"),
        ({"order": "grouped"}, "several labels each"),
        ({"set": "banking77"}, "banking77 is not in the data folder"),
        ({"labels": 1}, "labels is a whole number, at least 2"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LongICL(**options)
