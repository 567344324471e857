"""Tokens that come one stretch after the other are all there, in order, wherever the first of them come from."""

import copy
import threading

import pytest
import torch

from longwave.ops.ahead import Ahead
from longwave.ops.pieces import Coming, Made, on_its_way, pieces

CPU = torch.device("cpu")


def given(kind, x, first):
    if kind == "made":
        return Made(x.shape, x.dtype, lambda start, stop: x[:, :, start:stop])
    return x if kind == "stored" else Coming(x, on_its_way(x[:, :, :first], CPU))


@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 24, 27])
@pytest.mark.parametrize(("kind", "first"), [("stored", 0), ("made", 0), ("coming", 1), ("coming", 8)])
def test_all_of_them_in_order(kind, first, tokens):
    x = torch.randn(2, 3, tokens, 4, generator=torch.Generator().manual_seed(0))
    found = list(pieces(given(kind, x, first), 8, CPU))
    assert [start for start, _ in found] == list(range(0, tokens, 8))
    assert all(part.shape[2] <= 8 for _, part in found)
    assert torch.equal(torch.cat([part for _, part in found], 2), x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nothing is fetched to a CPU")
@pytest.mark.parametrize("first", [None, 1, 5000, 1 << 13])
def test_what_is_fetched_to_a_gpu(first):
    x, device = torch.randn(1, 3, 20001, 64).half(), torch.device("cuda", 0)
    found = list(pieces(x if first is None else Coming(x, on_its_way(x[:, :, :first], device)), 1 << 13, device))
    assert {part.device for _, part in found} == {device}
    assert torch.equal(torch.cat([part for _, part in found], 2).cpu(), x)


def test_it_is_made_meanwhile_and_once():
    begun, go, made = threading.Event(), threading.Event(), []

    def make(key):
        begun.set()
        assert go.wait(10)
        made.append(key)
        return (torch.full((2,), key),)

    ahead = Ahead(make, 7, CPU)
    assert begun.wait(10)
    assert not made
    go.set()
    assert ahead.result() is ahead.result()
    assert (made, ahead.key) == ([7], 7)


def test_an_error_comes_where_it_is_asked_for():
    def make(key):
        raise MemoryError(key)

    ahead = Ahead(make, "no room", CPU)
    with pytest.raises(MemoryError, match="no room"):
        ahead.result()


def test_a_copy_has_nothing_on_its_way():
    assert copy.deepcopy([on_its_way(torch.ones(1, 1, 3, 4), CPU)]) == [None]
