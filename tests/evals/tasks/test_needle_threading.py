import json
import re

import pytest
import transformers

from longwave.evals.task import Sample, Setting
from longwave.evals.tasks.needle_threading import KINDS, NEW_TOKENS, NeedleThreading, make_pairs
from longwave.models import smollm2

A, B, C = (value for _, value in make_pairs(3, 9))


@pytest.fixture(scope="module")
def setting():
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    return lambda limit=None, window=None, seed=42: Setting(tokenizer, window, seed, limit)


def test_pairs_are_those_of_the_published_example():
    pairs = make_pairs(25, 0)
    assert pairs[0] == ("e3e70682-c209-4cac-629f-6fbed82c07cd", "f728b4fa-4248-5e3a-0a5d-2f346baa9455")
    assert pairs[12] == ("247a8333-f7b0-b7d2-cda8-056c3d15eef7", "1759edc3-72ae-2244-8b01-63c1cd9d2b7d")
    assert pairs[-1][1] == "964a870c-7c87-9b74-1d87-8f9f9cdf5a86"
    assert len(json.dumps(dict(pairs))) == 2000


def parts(setting, sample):
    """The object, and the question as it comes after the compression."""
    decode = setting().tokenizer.decode
    context, question = decode(sample.ids[: sample.context]), decode(sample.ids[sample.context :])
    return json.loads(context[context.index("{") : context.rindex("}") + 1]), question


def make(setting, **options):
    limit = options.pop("limit", None)
    return NeedleThreading(**options).samples(setting(limit))


def test_a_single_value_at_every_depth(setting):
    for sample in make(setting, kinds="single", lengths=2000, repeats=2):
        pairs, question = parts(setting, sample)
        key = re.search(r'Key: "([^"]+)"\n Corresponding value:', question)[1]
        assert sample.answers == (pairs[key],)
        assert list(pairs).index(key) == round(24 * sample.meta["depth"])
        assert sample.max_new_tokens == NEW_TOKENS
        assert sample.meta["characters"] == 2000
    assert list(pairs.items()) == make_pairs(25, 1)


def test_several_values(setting):
    (sample,) = make(setting, kinds="multi", lengths=2000, needles=3, limit=1)
    pairs, question = parts(setting, sample)
    keys = json.loads(re.search(r"Keys: (\[.+\])", question)[1])
    assert sample.answers == tuple(pairs[key] for key in keys)
    assert sample.max_new_tokens == 3 * NEW_TOKENS


def test_a_sign_that_no_other_key_holds(setting):
    for sample in make(setting, kinds="conditional", lengths=2000, needles=3):
        pairs, question = parts(setting, sample)
        sign = re.search(r'character "(.)"', question)[1]
        assert sample.answers == tuple(value for key, value in pairs.items() if sign in key)
        assert len(sample.answers) == 3


@pytest.mark.parametrize("direction", ["forward", "backward", "random"])
@pytest.mark.parametrize("kind", ["thread", "multi_thread"])
def test_threads_can_be_followed(setting, kind, direction):
    for sample in make(setting, kinds=kind, lengths=2000, steps=4, direction=direction, repeats=2):
        pairs, question = parts(setting, sample)
        starts = re.findall(r'"([0-9a-f-]{36})"', question)
        assert len(starts) == len(sample.answers) == (2 if kind == "multi_thread" else 1)
        places = []
        for start, answer in zip(starts, sample.answers, strict=True):
            chain = [start]
            while chain[-1] in pairs:
                chain.append(pairs[chain[-1]])
            assert (len(chain), chain[-1]) == (5, answer)
            places.append([list(pairs).index(key) for key in chain[:-1]])
        rising = [chain == sorted(chain) for chain in places]
        falling = [chain == sorted(chain, reverse=True) for chain in places]
        assert direction != "forward" or all(rising)
        assert direction != "backward" or all(falling)


def test_a_sample_does_not_depend_on_the_others(setting):
    everything = make(setting, lengths=(2000, 4000))
    assert [s.id for s in make(setting, limit=2)] == [
        s.id for kind in KINDS for s in [s for s in everything if s.meta["kind"] == kind][:2]
    ]
    assert make(setting, kinds="thread", lengths=4000) == [
        s for s in everything if (s.meta["kind"], s.meta["length"]) == ("thread", 4000)
    ]
    assert NeedleThreading(kinds="thread").samples(setting(seed=7))[0].ids != everything[50].ids


def test_judge():
    task = NeedleThreading()
    one = Sample("x", [1, 2], 1, 48, (A,))
    cases = {A: 1, f'"{A.upper()}"': 1, f"It is {A}, not {B}": 1, f"{B} {A}": 0, A[:-1]: 0, "": 0}
    assert [task.judge(one, text).score for text in cases] == list(cases.values())
    two = Sample("x", [1, 2], 1, 96, (A, B))
    judged = [task.judge(two, text) for text in (f"{B}, {A}", f"{A} {A}", f"{A} {B} {C}", "none", "")]
    assert [j.score for j in judged] == [1, 0.5, 1, 0, 0]
    assert [j.metrics["f1"] for j in judged] == pytest.approx([1, 2 / 3, 0.8, 0, 0])
    assert task.judge(Sample("x", [1, 2], 1, 48, (A.replace("-", "*", 0),)), A).score == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": "triple"}, "there is no 'triple' among the kinds"),
        ({"depths": 2}, r"shares from 0 to 1, got 2"),
        ({"steps": 1}, "steps is a whole number, at least 2"),
        ({"direction": "up"}, "direction is one of forward, backward, random; got 'up'"),
        ({"needles": 9}, "holds 25 pairs, and 27 are asked for: 2160 or more"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        NeedleThreading(**options)


def test_longer_than_the_window(setting):
    with pytest.raises(ValueError, match="needle-threading-like at 2000 characters takes"):
        NeedleThreading().samples(setting(window=1024))
