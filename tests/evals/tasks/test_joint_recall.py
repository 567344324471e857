import hashlib
import re

import numpy as np
import pytest
import torch
import transformers

from longwave.evals.causal import _counted
from longwave.evals.loss import Scored
from longwave.evals.task import Setting
from longwave.evals.tasks.joint_recall import VALUES, WORDS, JointRecall, draw, single_tokens
from longwave.models import smollm2


@pytest.fixture(scope="module")
def setting():
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    return lambda limit=None, window=None, seed=42: Setting(tokenizer, window, seed, limit)


def test_draws_are_the_papers():
    """Its first training sequence: BOS, contexts with their keys and values, a separator, all again; padded."""
    told, halves = draw(np.random.RandomState(1), 5, 5)
    ids = [1]
    for number, half in enumerate(halves):
        ids += [4] * number
        for context, order in half:
            ids.append(42 + context)
            for key in order:
                ids += [26 + key, 10 + told[context][key]]
    assert ids[:16] == [1, 45, 29, 12, 30, 14, 27, 16, 26, 22, 28, 19, 43, 30, 10, 29]
    assert len(ids) == 112
    text = " ".join(map(str, ids + [3] * (1058 - len(ids))))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "d03e96337d70eb686ef90f7b82a13ae31bbed488ed08a262b795d227c6a71107"
    )


def pairs(text):
    """(context, key) -> value"""
    lines = re.findall(r"^In (\w+): (.+)\.$", text, re.MULTILINE)
    return {
        (context, key): value
        for context, rest in lines
        for key, value in (pair.split(" is ") for pair in rest.split(", "))
    }


def test_the_second_half_says_the_same_in_another_order(setting):
    tokenizer = setting().tokenizer
    for sample in JointRecall(contexts=4, keys=(1, 8), repeats=3).samples(setting()):
        first, again = tokenizer.decode(sample.ids[: sample.context]), tokenizer.decode(sample.ids[sample.context :])
        assert again.startswith("\nAgain:\n")
        count = 4 * sample.meta["keys"]
        assert pairs(first) == pairs(again)
        assert len(pairs(again)) == len(sample.scored) == count
        values = [tokenizer.decode([sample.ids[place]]).strip() for place in sample.scored]
        assert values == list(pairs(again).values())  # in the order in which they are asked
        assert tokenizer(tokenizer.decode(sample.ids)).input_ids == list(sample.ids)  # as the model would see the text
    assert list(pairs(first)) != list(pairs(again))


def test_a_gap_stands_between(setting):
    near, far = JointRecall(contexts=2, gaps=(0, 300), repeats=1).samples(setting())
    assert [s.meta["size"] for s in (near, far)] == ["2 x 8", "2 x 8, 300 between"]
    assert far.context == near.context + 300
    assert len(far.ids) == len(near.ids) + 300


def test_a_sample_does_not_depend_on_the_others(setting):
    everything = JointRecall(contexts=(1, 4), repeats=5).samples(setting())
    assert JointRecall(contexts=(4,), repeats=2).samples(setting()) == everything[5:7]
    assert JointRecall(contexts=(1, 4), repeats=5).samples(setting(limit=2)) == [*everything[:2], *everything[5:7]]
    assert JointRecall(contexts=(1, 4), repeats=5).samples(setting(seed=7)) != everything


def test_the_score_of_right_and_constant_answers(setting):
    """What the runner counts: all right gives all, and the first value for everything one in sixteen of the others."""
    samples = JointRecall(contexts=8, keys=8, repeats=12).samples(setting())
    right, constant = [], []
    for sample in samples:
        wanted = torch.tensor([list(sample.ids[sample.context + 1 :])])
        index = _counted(sample)
        said = torch.full_like(wanted, int(wanted[0, index][0]))
        for hits, guess in ((right, wanted), (constant, said)):
            scored = Scored(torch.zeros(wanted.shape), guess == wanted)
            hits.append({"score": float(scored.hits.float()[0, index].mean())})
    assert JointRecall().total(right) == 100
    assert JointRecall().total(constant) == pytest.approx(100 * (1 + 63 / VALUES) / 64, abs=2)


def test_words_are_told_apart(setting):
    assert len(set(WORDS.split())) == len(WORDS.split())
    assert len(single_tokens(setting().tokenizer)) >= 48


def test_a_tokenizer_of_letters(tokenizer):
    with pytest.raises(ValueError, match=r"0 of \d+ words are one token of this tokenizer, and 32 are needed"):
        JointRecall().samples(Setting(tokenizer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": 17}, "contexts are from 1 to 16, got 17"),
        ({"keys": 0}, "keys are from 1 to 16, got 0"),
        ({"gaps": -1}, "gaps are from 0 to any number, got -1"),
        ({"step": 0}, "step is a whole number"),
        ({"window": 100}, "more than this model's window of 100"),
    ],
    ids=str,
)
def test_bad_options(setting, options, message):
    window = options.pop("window", None)
    with pytest.raises(ValueError, match=message):
        JointRecall(**options).samples(setting(window=window))
