import json

import pytest
import transformers

from longwave.evals.task import Sample, Setting
from longwave.evals.tasks.longbench2 import LongBench2, LongBench2Like, read_choice, write
from longwave.models import smollm2
from tests.conftest import DATA

RECORD = {
    **{"_id": "a1", "domain": "Code", "difficulty": "easy", "length": "short", "question": " Who? ", "answer": "B"},
    **{f"choice_{letter}": f" choice {letter}" for letter in "ABCD"},
    "context": "A text that says $Q$. " * 50,
}


@pytest.fixture(scope="module")
def setting():
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    return lambda limit=None, window=None, chat=False: Setting(tokenizer, window, 42, limit, DATA, chat=chat)


@pytest.fixture
def file(tmp_path):
    def save(*changes):
        records = [{**RECORD, **change} for change in changes]
        (tmp_path / "data.json").write_text(json.dumps(records))
        return tmp_path

    return save


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("**The correct answer is (B)**", "B"),
        ("The correct answer is B.", "B"),
        ("the correct answer is (B)", None),
        ("The correct answer is (insert answer here)", None),
        ("The correct answer is C, no: The correct answer is (D)", "D"),
        ("The correct answer is (A). The correct answer is (D)", "A"),
        ("", None),
        ("B", None),
    ],
)
def test_choices_are_read(output, letter):
    assert read_choice(output) == letter


def test_prompts(setting, file):
    (sample,) = LongBench2(source=file({})).samples(setting())
    decode = setting().tokenizer.decode
    assert decode(sample.ids) == write(RECORD["context"], "Who?", ["choice " + x for x in "ABCD"])[0]
    assert decode(sample.ids[sample.context :]).endswith(
        "</text>\n\nWhat is the correct answer to this question: Who?\nChoices:\n(A) choice A\n(B) choice B\n"
        '(C) choice C\n(D) choice D\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
    )
    assert (sample.id, sample.answers, sample.max_new_tokens) == ("a1", ("B",), 128)
    assert sample.meta == {"length": "short", "difficulty": "easy", "domain": "Code"}


@pytest.mark.parametrize("chat", [True, False])
def test_a_lead_leaves_only_the_letter(setting, file, chat):
    task = LongBench2(source=file({}), lead=True)
    (sample,) = task.samples(setting(chat=chat))
    assert setting().tokenizer.decode(sample.ids).endswith("The correct answer is (")
    assert "</text>" in setting().tokenizer.decode(sample.ids[sample.context - 3 :])
    assert sample.max_new_tokens == 1
    assert [task.judge(sample, text).score for text in ("B", "A", "", "(B")] == [1, 0, 0, 0]


@pytest.mark.parametrize("lead", [True, False])
def test_long_texts_lose_their_middle(setting, file, lead):
    (sample,) = LongBench2(source=file({"context": "word " * 5000}), lead=lead).samples(setting(window=1000))
    assert len(sample.ids) + sample.max_new_tokens <= 1000
    assert sample.cut_from > 5000
    assert setting().tokenizer.decode(sample.ids).startswith("Please read the following text")


def test_limit_is_of_every_length(setting, file):
    lengths = ["short", "long", "short", "long", "short"]
    folder = file(*({"_id": str(n), "length": length} for n, length in enumerate(lengths)))
    assert [s.id for s in LongBench2(source=folder).samples(setting(limit=2))] == ["0", "2", "1", "3"]
    assert [s.id for s in LongBench2(source=folder / "data.json").samples(setting(limit=1))] == ["0", "1"]


@pytest.mark.skipif(not DATA.exists(), reason=f"no evaluation data at {DATA}")
def test_exams_in_the_same_template(setting):
    task = LongBench2Like()
    samples = task.samples(setting(limit=3))
    assert [s.id for s in samples] == [f"{name}/{n}" for name in ("tpo", "coursera") for n in range(3)]
    text = setting().tokenizer.decode(samples[0].ids[samples[0].context :])
    assert (
        "question: why did frantzen go to the sales barn\nChoices:\n(A) to study human form and movement\n(B)" in text
    )
    assert samples[0].answers == ("A",)
    for sample in samples:
        assert task.judge(sample, f"The correct answer is ({sample.answers[0]}).").score == 1


def test_errors(setting, file, tmp_path):
    with pytest.raises(ValueError, match=r"give source=PATH of data\.json, from huggingface"):
        LongBench2()
    with pytest.raises(ValueError, match=r"there is no .*: data\.json lies at huggingface"):
        LongBench2(source=tmp_path / "nothing").samples(setting())
    with pytest.raises(ValueError, match="record 1 has answer 'E', which is none of A, B, C and D"):
        LongBench2(source=file({"answer": "E"})).samples(setting())
    with pytest.raises(ValueError, match="lead is True or False, got 1"):
        LongBench2Like(lead=1)
    assert LongBench2(source="x").judge(Sample("x", [1, 2], 1, 1, ("B",)), "The correct answer is (B)").score == 1
