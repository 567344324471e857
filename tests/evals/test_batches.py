import pytest

from longwave.evals.batches import Batch, batches
from tests.evals.samples import sample


def test_batches_keep_alike_together():
    samples = [
        *(sample(f"short{n}", 40, 30, seed=n) for n in range(5)),
        *(sample(f"long{n}", 100, 90, seed=n) for n in range(3)),
        *(sample(f"more{n}", 100, 90, seed=n + 20, new=9) for n in range(2)),
        sample("line", 100, 90, seed=50, stop_at_newline=True),
    ]
    made = list(batches(samples, Batch(rows=4, tokens=250)))
    assert sorted(s.id for group in made for s in group) == sorted(s.id for s in samples)
    for group in made:
        assert len({(s.max_new_tokens, s.stop_at_newline) for s in group}) == 1
        assert len(group) <= 4
        longest = max(len(s.ids) for s in group)
        assert longest * len(group) <= 250
        assert min(len(s.ids) for s in group) >= 0.75 * longest
    assert [len(group) for group in made] == [2, 1, 4, 1, 1, 2]


def test_equal_batches():
    samples = [sample("a", 60, 50), sample("b", 60, 49), sample("c", 60, 50, seed=2), sample("d", 59, 50)]
    made = [[s.id for s in group] for group in batches(samples, Batch(), equal=True)]
    assert made == [["a", "c"], ["b"], ["d"]]


def test_a_sample_longer_than_the_batch_goes_alone():
    assert [len(group) for group in batches([sample("a", 300, 9), sample("b", 300, 9)], Batch(8, 200))] == [1, 1]


@pytest.mark.parametrize("given", [(0, 10), (1, 0)])
def test_batch_without_room(given):
    with pytest.raises(ValueError, match="at least one row and one token"):
        Batch(*given)
