import math

import pytest
import torch

import longwave
from longwave.evals.causal import run_loss
from longwave.evals.task import Setting
from longwave.evals.tasks.streaming import Streaming

BOOKS = {"one.txt": "abcdefghij" * 60, "two.txt": "klmnopqrst" * 20, "short.txt": "too short"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("books")
    for name, text in BOOKS.items():
        (path / name).write_text(text)
    return str(path)


@pytest.fixture
def make(tokenizer, folder):
    def samples(limit=None, window=None, **options):
        return Streaming(text=folder, **options).samples(Setting(tokenizer, window, limit=limit))

    return samples


def scored(tokenizer, sample):
    return tokenizer.decode([sample.ids[i] for i in sample.scored])


def test_windows_that_do_not_overlap(make, tokenizer):
    first, second, other = make(lengths=150, windows=2)
    assert [s.meta["text"] for s in (first, second, other)] == ["one.txt", "two.txt", "one.txt"]
    assert tokenizer.decode(first.ids) == BOOKS["one.txt"][:151]
    assert tokenizer.decode(other.ids) == BOOKS["one.txt"][150:301]
    for sample in (first, second, other):
        assert (len(sample.ids), sample.context) == (151, 1)
        assert sample.scored == tuple(range(2, 151))  # one token is read, one fed first
        assert sample.meta["utf8_bytes"] == 149


def test_a_stride_scores_every_token_once(make, tokenizer):
    made = [s for s in make(lengths=100, stride=30, windows=9) if s.meta["text"] == "one.txt"]
    assert [s.meta["start"] for s in made] == [30 * n for n in range(9)]
    assert "".join(scored(tokenizer, s) for s in made) == BOOKS["one.txt"][2 : 100 + 8 * 30 + 1]
    assert [len(s.scored) for s in made] == [99, *[30] * 8]
    assert [s.meta["utf8_bytes"] for s in made] == [99, *[30] * 8]


def test_columns_name_chunk_and_what_lies_beyond_the_window(make):
    samples = make(lengths=(100, 180), chunk=16, windows=1, window=128)
    assert list(dict.fromkeys((s.meta["stream"], s.meta["beyond"]) for s in samples)) == [
        ("100 tokens by 16", False),
        ("180 tokens by 16, beyond the model's 128", True),
    ]
    assert Streaming(chunk=16).feed == 16


def test_limit_takes_the_first_of_each_length(make):
    assert [s.id for s in make(limit=1, lengths=(100, 150))] == ["100/one.txt/0", "150/one.txt/0"]


def test_what_counts_is_scored_through_what_the_method_holds(llama, models, tokenizer, make):
    """The loss of the counted tokens alone, with as many tokens held as the method may hold at each of them."""
    samples = [s for s in make(lengths=120, stride=20, windows=2) if s.meta["text"] == "one.txt"]
    task = Streaming(lengths=120, stride=20)
    held = {"tokens": 24, "sinks": 2, "window": 8, "positions": "slots"}
    makers = {
        "dense": lambda rows: longwave.cache(llama, "dense"),
        "streaming": lambda rows: longwave.cache(llama, "streaming", **held),
    }
    dense, few = run_loss(llama, tokenizer, task, samples, makers)
    for sample, row in zip(samples, dense, strict=True):
        ids = [*sample.ids]
        with torch.no_grad():
            logits = models["llama"][1](torch.tensor([ids])).logits[0].double().log_softmax(-1)
        wanted = [-float(logits[i - 1, ids[i]]) for i in sample.scored]
        assert row["score"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
        assert row["scored"] == len(wanted)
    bound = makers["streaming"](1).method
    holds = sum(bound.layer_bytes(layer, 120) for layer in bound.shape.memory_layers)
    assert [row["bytes"] for row in few] == [holds, holds]
    assert all(abs(one["score"] - other["score"]) > 1e-3 for one, other in zip(dense, few, strict=True))


def test_total_is_the_exponential_of_the_mean_loss():
    rows = [{"score": 2.0, "scored": 10, "meta": {}}, {"score": 3.0, "scored": 30, "meta": {}}]
    assert Streaming().total(rows) == pytest.approx(math.exp(110 / 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": "2k"}, "lengths are ints"),
        ({"lengths": 1}, "at least 2 tokens, got 1"),
        ({"chunk": 0}, "chunk is a whole number"),
        ({"windows": 1.5}, "windows is a whole number"),
        ({"stride": 0}, "stride is a whole number"),
        ({"lengths": (100, 50), "stride": 60}, "leaves some between windows of 50 unscored"),
        ({"lengths": 5000}, "has more than 5000 tokens"),
    ],
    ids=str,
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
