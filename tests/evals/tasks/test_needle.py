import re

import pytest

from longwave.evals.data import pydoc_haystack
from longwave.evals.task import Setting
from longwave.evals.tasks.needle import NUMBER, NUMBER_QUESTION, Needle
from tests.conftest import DATA

HAY = "".join(f"Sentence {chr(65 + i % 26)} of the hay says little. Is it so? It is! " for i in range(40))
LENGTHS, DEPTHS = (200, 333), (0.0, 0.3, 0.5, 1.0)
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no evaluation data at {DATA}")


@pytest.fixture(scope="module")
def hay(tmp_path_factory):
    path = tmp_path_factory.mktemp("hay") / "hay.txt"
    path.write_text(HAY)
    return str(path)


@pytest.fixture(scope="module")
def make(tokenizer, hay):
    def samples(lengths=LENGTHS, depths=DEPTHS, seed=7, window=None, limit=None, **options):
        task = Needle(lengths=lengths, depths=depths, haystack=options.pop("haystack", hay), **options)
        return task.samples(Setting(tokenizer, window, seed, limit, DATA))

    return samples


@pytest.fixture(scope="module")
def samples(make):
    return make(repeats=2)


def hidden(sample):
    return NUMBER.format(key=sample.answers[0])


def test_every_combination_once(samples):
    cells = [(s.meta["length"], s.meta["depth"], s.meta["repeat"]) for s in samples]
    assert sorted(cells) == sorted((n, d, r) for n in LENGTHS for d in DEPTHS for r in range(2))
    assert len({s.id for s in samples}) == len(samples)


def test_prompts_have_the_asked_length(samples):
    assert all(len(s.ids) == s.meta["length"] for s in samples)


@pytest.mark.parametrize("kind", ["number", "classic", "multi", "needlebench"])
def test_real_tokenizer(smollm2, kind):
    if kind != "number" and not DATA.exists():
        pytest.skip(f"no evaluation data at {DATA}")
    _, tokenizer = smollm2
    task = Needle(lengths=(256, 1001), depths=(0.1, 0.9), kind=kind)
    for sample in task.samples(Setting(tokenizer, data=DATA)):
        assert len(sample.ids) == sample.meta["length"]
        text = tokenizer.decode(sample.ids)
        assert ("<|im_start|>assistant" in text) == (kind != "number")
        for answer in sample.answers:
            assert answer.lower() in tokenizer.decode(sample.ids[: sample.context]).lower()
        assert "?" in tokenizer.decode(sample.ids[sample.context :])
        if kind == "number":
            before = text[: text.index(hidden(sample))].rstrip()
            assert not before or before[-1] in ".?!"


def test_needle_is_there_once(samples, tokenizer):
    for sample in samples:
        text = tokenizer.decode(sample.ids)
        assert re.fullmatch("[1-9][0-9]{4}", sample.answers[0])
        assert text.count(hidden(sample)) == 1
        assert text.count(sample.answers[0]) == NUMBER.count("{key}")


def test_question_follows_the_context(samples, tokenizer):
    for sample in samples:
        assert tokenizer.decode(sample.ids[sample.context :]) == NUMBER_QUESTION


def test_needle_follows_a_sentence_near_its_depth(samples, tokenizer):
    longest = max(len(part) for part in re.split(r"[.?!]", HAY)) + 1
    for sample in samples:
        before = tokenizer.decode(sample.ids).index(hidden(sample))
        room = sample.context - len(hidden(sample))
        wanted = int(room * sample.meta["depth"])
        assert wanted - longest <= before <= wanted
        if 0 < before < room:
            assert tokenizer.decode(sample.ids[:before])[-1] in ".?!"


def test_rest_is_one_stretch_of_the_haystack(samples, tokenizer):
    for sample in samples:
        assert tokenizer.decode(sample.ids[: sample.context]).replace(hidden(sample), "") in HAY


def test_depths_share_text_and_key_but_repeats_do_not(samples):
    keys = {}
    for sample in samples:
        keys.setdefault((sample.meta["length"], sample.meta["repeat"]), set()).add(sample.answers[0])
    assert all(len(found) == 1 for found in keys.values())
    assert len(set.union(*keys.values())) == 4


def test_seed_decides_everything(samples, make):
    assert make(repeats=2) == samples
    assert all(a.answers != b.answers for a, b in zip(make(repeats=2, seed=8), samples, strict=True))


def test_a_cell_does_not_depend_on_the_others(samples, make):
    (alone,) = make([333], [0.5])
    assert alone in samples


def test_limit_takes_the_first_of_each_length(samples, make):
    limited = make(repeats=2, limit=3)
    assert [s.meta["length"] for s in limited] == [200] * 3 + [333] * 3
    assert all(s in samples for s in limited)


@pytest.mark.parametrize("start", ["<s>", None])
def test_first_token_that_the_tokenizer_wants(tokenizer, hay, start):
    if start is not None:
        from tokenizers.processors import TemplateProcessing

        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.add_special_tokens([start])
        number = backend.token_to_id(start)
        backend.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, number)])
        tokenizer = type(tokenizer)(tokenizer_object=backend, bos_token=start, pad_token="<pad>")
    for sample in Needle(lengths=200, depths=(0.0, 0.5), haystack=hay).samples(Setting(tokenizer)):
        assert len(sample.ids) == 200
        assert sample.ids.count(tokenizer.bos_token_id or 10**6) == (start is not None)
        assert start is None or sample.ids[0] == tokenizer.bos_token_id


@needs_data
def test_three_needles_lie_between_the_depth_and_the_end(make, tokenizer):
    import json

    needles = json.loads((DATA / "needles" / "classic.json").read_text())["multi_pizza"]["needles"]
    for sample in make([700], [0.0, 0.4], kind="multi"):
        text = tokenizer.decode(sample.ids[: sample.context])
        places = [text.index(needle) / len(text) for needle in needles]
        assert places == sorted(places)
        depth = sample.meta["depth"]
        assert places == pytest.approx([depth + i * (1 - depth) / 3 for i in range(3)], abs=0.2)


@needs_data
def test_needlebench_changes_with_the_repeat(make):
    answers = [s.answers for s in make([700], [0.5], repeats=3, kind="needlebench")]
    assert len(set(answers)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [200, 130]}, "length of 130 tokens leaves no room"),
        ({"lengths": [3000]}, "haystack has .* tokens, too few for a length of 3000"),
        ({"lengths": [200], "window": 207}, "200 tokens and 8 new ones, more than this model's window of 207"),
        ({"haystack": "/nowhere.txt"}, "there is no file '/nowhere.txt'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_samples_that_cannot_be(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_least_length_that_is_named_works(make):
    with pytest.raises(ValueError, match="use ") as told:
        make([100])
    least = int(re.search(r"use (\d+)", str(told.value))[1])
    assert len(make([least], [0.5])[0].ids) == least
    with pytest.raises(ValueError, match="leaves no room"):
        make([least - 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": "1k"}, "lengths are ints"),
        ({"lengths": ()}, "lengths are missing"),
        ({"depths": "deep"}, "depths are floats"),
        ({"depths": 1.5}, "shares from 0 to 1, got 1.5"),
        ({"depths": -0.1}, "shares from 0 to 1, got -0.1"),
        ({"repeats": 0}, "repeats is a whole number"),
        ({"kind": "pin"}, "kind is one of number, classic, multi, needlebench; got 'pin'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Needle(**options)


@pytest.mark.parametrize(
    ("output", "score"),
    [
        *((" 12345.", 1), ("12345", 1), ("is 12345, not 54321", 1), ("It is:\n12345", 1)),
        *(("", 0), ("unknown", 0), ("54321 or 12345", 0), ("123456", 0), ("1234", 0), ("12 345", 0), ("012345", 0)),
    ],
)
def test_first_number_counts(make, output, score):
    sample = make([200], [0.5])[0]
    object.__setattr__(sample, "answers", ("12345",))
    assert Needle().judge(sample, output).score == score


@needs_data
def test_keywords_count_in_any_case(make):
    sample = make([500], [0.5], kind="classic")[0]
    task = Needle(kind="classic")
    assert task.judge(sample, "EAT A SANDWICH in dolores park").score == pytest.approx(2 / 3)
    assert task.judge(sample, "eat a sandwich").parsed == ["eat a sandwich"]
    assert task.judge(sample, "").score == 0


def test_haystack_of_help_topics():
    assert len(pydoc_haystack()) > 400_000
    assert pydoc_haystack() == pydoc_haystack()


def test_numbers_need_no_data(tokenizer):
    assert len(Needle(lengths=300, depths=0.5).samples(Setting(tokenizer, data=None))) == 1
