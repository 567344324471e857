import math

import pytest

from longwave.evals.task import Setting
from longwave.evals.tasks.perplexity import Perplexity

BOOKS = {"one.txt": "abcdefghij" * 60, "two.txt": "klmnopqrst" * 50, "short.txt": "too short"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("books")
    for name, text in BOOKS.items():
        (path / name).write_text(text)
    return str(path)


@pytest.fixture
def make(tokenizer, folder):
    def samples(limit=None, window=None, **options):
        return Perplexity(text=options.pop("text", folder), **options).samples(Setting(tokenizer, window, limit=limit))

    return samples


def test_every_length_scores_the_same_tokens(make):
    samples = make(lengths=(100, 200, 400), scored=50, windows=2)
    assert len(samples) == 3 * 2 * 2
    scored = {}
    for sample in samples:
        length, text, number = sample.meta["length"], sample.meta["text"], sample.meta["window"]
        assert len(sample.ids) == length + 1  # `length` are fed
        assert len(sample.ids) - sample.context == 51
        scored.setdefault((text, number), []).append(sample.ids[-51:])
    for same in scored.values():
        assert same[0] == same[1] == same[2]


def test_windows_follow_each_other(make, tokenizer):
    first, second = (s for s in make(lengths=100, scored=50, windows=2) if s.meta["text"] == "one.txt")
    assert tokenizer.decode(first.ids) == BOOKS["one.txt"][:101]
    assert tokenizer.decode(second.ids) == BOOKS["one.txt"][50:151]
    assert first.meta["utf8_bytes"] == 50


def test_stream_scores_all_but_the_first_token(make):
    task = Perplexity(mode="stream", lengths=80, step=4)
    assert task.feed == 4
    assert Perplexity().feed is None
    for sample in make(mode="stream", lengths=80, windows=1):
        assert (len(sample.ids), sample.context) == (81, 1)


def test_texts_and_windows_that_are_too_short_are_left_out(make):
    assert {s.meta["text"] for s in make(lengths=400, scored=50, windows=1)} == {"one.txt", "two.txt"}
    assert len(make(lengths=400, scored=50, windows=9)) == 4 + 2  # what 600 and 500 tokens hold
    with pytest.raises(ValueError, match="has more than 5000 tokens"):
        make(lengths=5000)


def test_limit_takes_the_first_of_each_length(make):
    everything = make(lengths=(100, 200), scored=50)
    limited = make(limit=3, lengths=(100, 200), scored=50)
    assert limited == [s for n in (100, 200) for s in [x for x in everything if x.meta["length"] == n][:3]]


def test_longer_than_the_window(make):
    with pytest.raises(ValueError, match="more than this model's window of 128"):
        make(lengths=200, scored=50, window=128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": "2k"}, "lengths are ints"),
        ({"mode": "sideways"}, "mode is"),
        ({"scored": 0}, "scored is a whole number"),
        ({"step": 1.5}, "step is a whole number"),
        ({"lengths": 512}, "leaves no context"),
        ({"text": "/nowhere"}, "there is no '/nowhere'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_total_is_the_exponential_of_the_mean_loss():
    rows = [
        {"score": 2.0, "scored": 10, "meta": {"utf8_bytes": 40}},
        {"score": 3.0, "scored": 30, "meta": {"utf8_bytes": 60}},
    ]
    assert Perplexity().total(rows) == pytest.approx(math.exp(110 / 40))
