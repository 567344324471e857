"""Attention matching, against least squares as numpy's reader would write them, in float64."""

import math

import pytest
import torch

from longwave.ops.match import MOST, match, multiples, shares, solve

N, D, SCALE, SINKS = 60, 8, 8**-0.5, 4
MIDDLE = (torch.arange(N) >= SINKS) & (torch.arange(N) < N - 8)


def draw(kind, queries, seed=0):
    """Queries, K, V, biases in float64."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (queries, N, N))
    if kind == "clusters":  # tokens of one topic are alike, and so is what is asked
        centres, topics = torch.randn(6, D, generator=g, dtype=torch.float64), torch.arange(N) % 6
        k, v = centres[topics] * 2 + 0.3 * k, centres[topics].roll(1, 1) + 0.3 * v
        q = centres[torch.randint(6, (queries,), generator=g)] * 2 + 0.3 * q
    return q, k, v, torch.zeros(N, dtype=torch.float64)


def best(q, k, bias, count):
    """The `count` of the middle that get most."""
    worth = shares(q, k, bias, SCALE).square().mean(0).masked_fill(~MIDDLE, -1)
    return torch.zeros(N, dtype=torch.bool).index_fill(0, worth.topk(count).indices, True)


def error(q, kept, k, v, bias, want):
    return float((shares(q, k, bias, SCALE, kept) @ v - want).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_nothing_changes_where_all_stay(dtype):
    q, k, v, bias = (x.to(dtype) for x in draw("random", 20))
    bias = bias + torch.linspace(-1, 1, N, dtype=dtype)
    values, raised = match(q, k, v, bias, SCALE, MIDDLE, MIDDLE, 0.01)
    near = dict(rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(values, v, **near)
    torch.testing.assert_close(raised, bias, **near)


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_become_one_with_the_logarithm_of_their_number(copies):
    """Exact for every query, those never asked included."""
    q, k, v, bias = draw("random", 90)
    count = int(MIDDLE.sum()) // copies * copies
    middle = (torch.arange(N) >= SINKS) & (torch.arange(N) < SINKS + count)
    for x in (k, v):
        x[middle] = x[middle][::copies].repeat_interleave(copies, 0)
    chosen = torch.zeros(N, dtype=torch.bool)
    chosen[SINKS : SINKS + count : copies] = True
    values, raised = match(q[:40], k, v, bias, SCALE, middle, chosen, 0.01)
    torch.testing.assert_close(raised, bias + chosen.double() * math.log(copies), rtol=0, atol=1e-10)
    torch.testing.assert_close(values, v, rtol=0, atol=1e-10)
    assert error(q, chosen | ~middle, k, values, raised, shares(q, k, bias, SCALE) @ v) < 1e-20


@pytest.mark.parametrize("count", [6, 20], ids=["few", "many"])
@pytest.mark.parametrize("queries", [30, 300])
@pytest.mark.parametrize("kind", ["random", "clusters"])
def test_what_is_fitted_answers_better_than_the_same_keys_alone(kind, queries, count):
    q, k, v, bias = draw(kind, queries)
    asked, others = q[: queries // 2], q[queries // 2 :]
    chosen = best(asked, k, bias, count)
    stays = chosen | ~MIDDLE
    values, raised = match(asked, k, v, bias, SCALE, MIDDLE, chosen, 0.01)
    # of those not asked only where enough were asked to tell them by
    for ask, factor in ((asked, 0.7), (others, 0.9))[: 1 if queries < 300 and kind == "random" else 2]:
        want = shares(ask, k, bias, SCALE) @ v
        assert error(ask, stays, k, values, raised, want) < factor * error(ask, stays, k, v, bias, want)
    assert torch.equal(values[~chosen], v[~chosen])
    assert torch.equal(raised[~chosen], bias[~chosen])


@pytest.mark.parametrize(("queries", "n"), [(5, 30), (40, 7)], ids=["wide", "tall"])
def test_least_squares_with_a_ridge(queries, n):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(queries, m, generator=g, dtype=torch.float64) for m in (n, 3))
    r = 0.05 * a.square().sum(-1).mean()
    both = torch.cat([a, r.sqrt() * torch.eye(n, dtype=torch.float64)])
    want = torch.linalg.lstsq(both, torch.cat([b, b.new_zeros(n, 3)])).solution
    torch.testing.assert_close(solve(a, b, 0.05), want, rtol=1e-9, atol=1e-12)


def test_multiples_stay_within_their_bounds_and_the_others_make_up_for_it():
    g = torch.Generator().manual_seed(0)
    p, true = torch.rand(200, 6, generator=g, dtype=torch.float64), torch.tensor([100.0, 2, 1, 0.5, 0, 3]).double()
    chosen = torch.ones(6, dtype=torch.bool)
    inside = true.clamp(math.exp(-MOST), math.exp(MOST))
    found = multiples(p, p @ inside, chosen, 1e-6)
    torch.testing.assert_close(found, inside, rtol=1e-3, atol=1e-3)
    found = multiples(p, p @ true, chosen, 1e-6)
    assert found[0] == math.exp(MOST)
    assert found.min() >= math.exp(-MOST)
    clamped = p @ true - p[:, :1] @ true.clamp(max=math.exp(MOST))[:1]
    assert (p @ found - p @ true).square().mean() < clamped.square().mean()


@pytest.mark.parametrize("queries", [64, 512])
def test_queries_that_say_the_same_are_solved_by_any_ridge(queries):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, n, generator=g).repeat(queries, 1) for n in (50, 3))
    torch.testing.assert_close(a @ solve(a, b, 1e-6), b, rtol=1e-3, atol=1e-3)


def test_none_chosen_changes_nothing():
    q, k, v, bias = draw("random", 20)
    values, raised = match(q, k, v, bias, SCALE, MIDDLE, torch.zeros(N, dtype=torch.bool), 0.01)
    torch.testing.assert_close(values, v, rtol=0, atol=1e-9)
    assert torch.equal(raised, bias)
