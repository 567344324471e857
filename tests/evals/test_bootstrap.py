"""Intervals and verdicts."""

import pytest

from longwave.evals import bootstrap
from tests.evals import made_up


@pytest.mark.parametrize(
    ("low", "high", "pairs", "lower", "said"),
    [
        (-9, -1, 6, False, "worse"),
        (1, 9, 6, False, "better"),
        (-9, -1, 6, True, "better"),
        (1, 9, 6, True, "worse"),
        (-9, 0, 6, False, ""),
        (-1, 9, 600, True, ""),
        (-9, -1, 5, False, ""),
    ],
)
def test_verdicts(low, high, pairs, lower, said):
    assert bootstrap.judge(low, high, pairs, lower) == said


def test_bootstrap_is_deterministic_and_the_fast_one_agrees():
    rows = [{"score": value} for value in (0.0, 0.1, 0.4, 0.4, 0.9, 1.0, 1.0)]
    task = made_up.Grid()
    general = bootstrap.bootstrap(rows, task.total, "seed")
    assert general == bootstrap.bootstrap(rows, task.total, "seed")
    assert general != bootstrap.bootstrap(rows, task.total, "other")
    fast = bootstrap.bootstrap_mean([100 * row["score"] for row in rows], "seed")
    assert fast == pytest.approx(general)
    assert bootstrap.bootstrap(rows[3:4], task.total, "seed") == (40, 40)


def test_bootstrap_interval_has_the_width_of_theory():
    values = [float(i % 2) for i in range(400)]
    low, high = bootstrap.bootstrap_mean(values, "seed")
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_sets_of_equal_weight_are_resampled_within_themselves():
    from longwave.evals.documents import mean_over_sets, mean_score

    rows = [{"score": 1.0, "meta": {"set": "a"}}] * 20 + [{"score": 0.0, "meta": {"set": "b"}}] * 2

    def total(some):
        return mean_over_sets(some, mean_score)

    assert bootstrap.bootstrap(rows, total, "seed", [row["meta"]["set"] for row in rows]) == (50.0, 50.0)
    assert bootstrap.bootstrap(rows, total, "seed")[1] == 100.0  # a draw without b
