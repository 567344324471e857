"""pyramidkv: snapkv's choice with another number of tokens in every layer, the same in sum."""

import pytest
import torch

import longwave
from tests.conftest import into, tokens
from tests.methods import naive
from tests.methods.naive import draw
from tests.methods.test_evicting import run

SMALL = dict(sinks=0, window=8)


def counts(method, layers, budget=None):
    bound = method.bind(naive.shape(layers=layers), None, budget)
    return [bound.limit(100_000, layer) for layer in range(layers)]


def test_the_specifications_example():
    """32 layers, window 8, 120 others on average: 234 of them in the first layer, 6 in the last."""
    kept = [n - 8 for n in counts(longwave.PyramidKV(tokens=128, **SMALL), 32)]
    assert (kept[0], kept[-1]) == (234, 6)
    assert sum(kept) == 32 * 120
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("tokens_", [9, 20, 133, 2048])
@pytest.mark.parametrize("layers", [1, 2, 5, 30])
@pytest.mark.parametrize("beta", [1, 3.5, 20])
def test_tokens_are_spent_to_the_last(tokens_, layers, beta):
    kept = counts(longwave.PyramidKV(tokens=tokens_, beta=beta, **SMALL), layers)
    assert sum(kept) == layers * tokens_
    assert kept == sorted(kept, reverse=True)
    if beta == 1:
        assert set(kept) == {tokens_}


@pytest.mark.parametrize("budget", [0.02, 0.3, 0.5, 0.7, 0.97])
def test_shares_are_spent_too_and_none_is_more_than_all(budget):
    """Beyond what the first layer has, the line is flatter."""
    method = longwave.PyramidKV(**SMALL)
    bound = method.bind(naive.shape(layers=12), None, budget)
    plain = longwave.SnapKV(**SMALL).bind(naive.shape(layers=12), None, budget)
    assert bound.share == pytest.approx(plain.share, rel=1e-12)
    assert list(bound.shares) == sorted(bound.shares, reverse=True)
    assert 0 <= bound.shares[-1] <= bound.shares[0] <= 1
    steps = [a - b for a, b in zip(bound.shares, bound.shares[1:], strict=False)]
    assert max(steps) - min(steps) < 1e-12
    assert bound.nbytes(10**6) == pytest.approx(plain.nbytes(10**6), rel=0.01)
    assert bound != plain
    assert bound.digest != longwave.PyramidKV(beta=3, **SMALL).bind(naive.shape(layers=12), None, budget).digest


def test_every_layer_holds_its_own_number_and_bytes_are_exact(llama):
    memory = longwave.cache(llama, longwave.PyramidKV(beta=20, **SMALL), budget=0.3)
    with torch.no_grad():
        llama(tokens(2, 400), **into(memory))
    held = [layer.dense.lengths for layer in memory.memory_layers()]
    assert held[0] > held[1] > held[2]
    assert all(one == other for one, other in held)
    assert memory.nbytes == memory.method.nbytes(400, 2)
    for layer, (n, _) in zip(memory.memory_layers(), held, strict=True):
        assert n == memory.method.limit(400, layer.index)


def test_a_layer_keeps_what_snapkv_would_of_as_many():
    k, v, q = draw(1, 90)
    bound = longwave.PyramidKV(tokens=30, **SMALL).bind(naive.shape(layers=3), None, None)
    for index in range(3):
        own = run(bound.layer(index), k, v, q, [90])
        plain = longwave.SnapKV(tokens=bound.limit(90, index), **SMALL).bind(naive.shape(), None, None).layer(0)
        run(plain, k, v, q, [90])
        assert torch.equal(own.dense.column("position"), plain.dense.column("position"))


def test_at_a_budget_of_all_nothing_is_observed(llama):
    assert longwave.cache(llama, "pyramidkv", 1.0).method.whole
    assert not longwave.cache(llama, "pyramidkv", 0.99).method.whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(beta=0.5), "beta is how many times .* at least 1; got 0.5"),
        (dict(beta=float("nan")), "at least 1; got nan"),
        (dict(beta=True), "at least 1; got True"),
        (dict(store="kivi"), "another number of tokens in every layer.*leave store out, or use snapkv"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.PyramidKV(**options)
