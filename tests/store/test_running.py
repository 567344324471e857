"""A running mean and variance: what they are of, and that lessons can be taken back."""

import pytest
import torch

from longwave.store.running import Running


def new(batch=1, horizon=100, start=0):
    return Running(batch, 3, horizon, start, torch.float64, torch.device("cpu"))


def lessons(count, batch=1, size=4, seed=0):
    return torch.randn(count, batch, size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teach(running, x, first=0):
    for i, lesson in enumerate(x, first):
        there = torch.ones(lesson.shape[:2], dtype=torch.bool)
        running.learn(lesson, there, torch.full((lesson.shape[0],), 10 * (i + 1)))


def test_up_to_the_horizon_all_lessons_count_alike():
    running, x = new(), lessons(5)
    teach(running, x)
    whole = x[:, 0].flatten(0, 1)
    torch.testing.assert_close(running.mean[0], whole.mean(0))
    torch.testing.assert_close(running.variance[0], whole.var(0, correction=0))


def test_beyond_it_old_ones_fade():
    running, x = new(horizon=2), lessons(3)
    teach(running, x)
    weight = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)[:, None, None]
    mean = (x[:, 0] * weight).sum((0, 1)) / 4
    torch.testing.assert_close(running.mean[0], mean)
    torch.testing.assert_close(running.variance[0], ((x[:, 0] - mean).square() * weight).sum((0, 1)) / 4)


def test_what_is_not_there_teaches_nothing():
    running, x = new(3, start=8), lessons(1, 3)[0]
    running.learn(x, torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool(), torch.tensor([9, 9, 8]))
    torch.testing.assert_close(running.mean[0], x[0, [0, 2]].mean(0))
    assert running.lessons[:, 0].tolist() == [1, 0, 0]
    assert not running.moments[1:].any()


@pytest.mark.parametrize("length", [30, 29, 25, 20, 12, 10])
def test_the_last_two_are_taken_back(length):
    running, twin, x = new(), new(), lessons(3)
    teach(running, x)
    assert running.remembers([length]) == [True]
    for _ in range(2):  # the second time there is nothing to take back
        running.back([length])
    teach(twin, x[: length // 10])
    for _ in range(2):
        for a, b in zip(running.tensors(), twin.tensors(), strict=True):
            assert torch.equal(a[:, 0], b[:, 0])
        teach(running, lessons(1, seed=1), 3)
        teach(twin, lessons(1, seed=1), 3)


def test_older_ones_are_not_and_a_start_is_a_start():
    running, x = new(start=5), lessons(3)
    teach(running, x)
    assert running.remembers([9]) == [False]
    running.back([10])
    assert running.remembers([9]) == [False]  # what came before the one that is left is not known any more
    assert running.remembers([5]) == [True]
    running.back([5])
    assert not running.moments.any()
    assert running.remembers([7]) == [True]
