import pytest

from longwave.evals.task import Setting
from longwave.evals.tasks.divergence import Divergence

TEXT = "".join(f"Line {i} of a text. " for i in range(200))


@pytest.fixture
def make(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT.upper())
    (tmp_path / "c.txt").write_text("short")

    def samples(seed=42, limit=None, window=None, **options):
        options = {"contexts": (300, 600), "scored": 20, "windows": 6, "text": str(tmp_path), **options}
        return Divergence(**options).samples(Setting(tokenizer, window, seed, limit))

    return samples


def test_windows_are_stretches_of_the_texts(make, tokenizer):
    samples = make()
    assert len(samples) == 12
    for sample in samples:
        assert sample.context == sample.meta["context"]
        assert len(sample.ids) == sample.context + 21
        text = {"a.txt": TEXT, "b.txt": TEXT.upper()}[sample.meta["text"]]
        start = sample.meta["start"]
        assert tokenizer.decode(sample.ids) == text[start : start + len(sample.ids)]
    assert [s.meta["text"] for s in samples[:4]] == ["a.txt", "b.txt", "a.txt", "b.txt"]


def test_seed_and_limit(make):
    assert make() == make()
    assert [s.meta["start"] for s in make(seed=1)] != [s.meta["start"] for s in make()]
    assert make(limit=2) == [*make()[:2], *make()[6:8]]
    assert make(contexts=600) == make()[6:]


def test_score_is_the_divergence():
    assert Divergence.metric == "kl"
    assert Divergence().total([{"score": 0.1}, {"score": 0.3}]) == pytest.approx(0.2)
    assert Divergence.lower


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": "3k"}, "contexts are ints"),
        ({"contexts": 0}, "at least 1 token"),
        ({"windows": 0}, "windows is a whole number"),
        ({"contexts": 9000}, "no text of .* has 9022 tokens"),
        ({"window": 310}, "more than this model's window of 310"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_tokens_fed_at_a_time():
    assert Divergence().feed is None
    assert Divergence(step=1).feed == 1
    with pytest.raises(ValueError, match="step is a whole number"):
        Divergence(step=0)
