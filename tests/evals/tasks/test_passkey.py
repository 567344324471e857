import json
import re

import pytest
import transformers

from longwave.evals.task import Sample, Setting
from longwave.evals.tasks.passkey import KEY, NEW_TOKENS, QUESTION, Passkey
from longwave.models import smollm2
from tests.conftest import DATA

LENGTHS = (150, 1000)
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no evaluation data at {DATA}")


@pytest.fixture(scope="module")
def real():
    return transformers.AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def make(real):
    def some(lengths=LENGTHS, seed=42, limit=None, window=None, tokenizer=real, folder=DATA, **options):
        return Passkey(lengths=lengths, **options).samples(Setting(tokenizer, window, seed, limit, folder))

    return some


@needs_data
def test_lines_of_the_prompt(real, make):
    noise = json.loads((DATA / "ruler/templates_and_tasks.json").read_text())["noise"]
    hay = " ".join([noise] * 100)
    for sample in make():
        task, before, key, after, question = real.decode(sample.ids).split("\n")
        number = sample.answers[0]
        assert "important info" in task
        assert key == KEY.format(key=number)
        assert key.count(number) == 2
        assert 1 <= int(number) <= 50000
        assert "\n" + question == QUESTION
        assert hay.startswith(before)
        assert hay.startswith(after)
        assert abs(len(before) / (len(before) + len(after)) - sample.meta["depth"]) < 0.051
        assert real.decode(sample.ids[sample.context :]) == QUESTION


@needs_data
def test_prompts_fill_their_length(make):
    samples = make()
    assert len(samples) == 20
    assert len({sample.id for sample in samples}) == 20
    for sample in samples:
        assert sample.meta["length"] - 6 <= len(sample.ids) <= sample.meta["length"]
        assert sample.max_new_tokens == NEW_TOKENS


@needs_data
def test_keys_and_positions_differ(make):
    samples = make(1000, repeats=40)
    assert len({sample.answers for sample in samples}) > 35
    depths = {sample.meta["depth"] for sample in samples}
    assert len(depths) > 8
    assert all(depth == round(depth, 1) and 0 <= depth <= 1 for depth in depths)


@needs_data
def test_limit_and_lengths_change_no_sample(make):
    whole = make()
    assert make(limit=3) == [sample for sample in whole if sample.meta["repeat"] < 3]
    assert make(1000) == [sample for sample in whole if sample.meta["length"] == 1000]
    assert [s.ids for s in make(seed=43)] != [s.ids for s in whole]


@needs_data
def test_one_id_a_character(tokenizer, make):
    (sample,) = make(900, tokenizer=tokenizer, limit=1)
    assert 900 - 16 <= len(sample.ids) <= 900


@needs_data
def test_errors(make):
    with pytest.raises(ValueError, match="a length of 60 tokens is too short") as caught:
        make(60)
    assert make(int(re.search(r"use (\d+)", str(caught.value))[1]))
    with pytest.raises(ValueError, match="passkey at 1000"):
        make(window=1007)
    with pytest.raises(ValueError, match="give --data FOLDER"):
        make(folder=None)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True])
def test_repeats_are_checked(repeats):
    with pytest.raises(ValueError, match="repeats is a whole number"):
        Passkey(repeats=repeats)


@pytest.mark.parametrize(
    ("output", "score", "parsed"),
    [
        (" 4821. 4821", 1.0, "4821"),
        ("the key is 4821", 1.0, "4821"),
        (" 48210", 0.0, "48210"),
        (" 48 21", 0.0, "48"),
        (" none", 0.0, None),
        ("", 0.0, None),
    ],
)
def test_judge(output, score, parsed):
    judged = Passkey().judge(Sample("x", [1, 2], 1, 8, ("4821",)), output)
    assert (judged.score, judged.parsed) == (score, parsed)
