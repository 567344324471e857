"""quest: least and greatest keys bound what a chunk can offer, so that what a query looks for is found."""

import pytest
import torch

import longwave
from tests.methods import naive
from tests.methods.naive import SCALE, D, G, H, draw, drive
from tests.methods.test_evicting import run

METHOD = longwave.Quest(chunk=4, sinks=2, window=8, full_layers=0)


@pytest.mark.parametrize("seed", range(5))
def test_worth_is_an_upper_bound_of_every_score(seed):
    k, _, q = draw(2, 40, seed)
    layer = run(METHOD.bind(naive.shape(), None, 0.3).layer(0), k, k, q, [38])
    asked = q[:, :, -1].unflatten(1, (H, G))
    worth = METHOD.worth(asked, layer.summary)
    for start in range(0, 38, 4):
        scores = asked.float() @ k[:, :, start : min(38, start + 4)].float().mT
        bound = worth[:, :, start // 4]
        assert (scores.amax((2, 3)) <= bound + 1e-5).all()
        low, high = k[:, :, start : min(38, start + 4)].aminmax(dim=2)
        exact = torch.maximum(asked * low[:, :, None], asked * high[:, :, None]).sum(-1).amax(2)
        torch.testing.assert_close(bound.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_chunk_of_one_key_is_worth_its_score():
    method = longwave.Quest(chunk=1, sinks=0, window=1, full_layers=0)
    k, _, q = draw(1, 20)
    layer = run(method.bind(naive.shape(), None, 0.3).layer(0), k, k, q, [20])
    asked = q[:, :, -1].unflatten(1, (H, G))
    expected = (asked.float() @ k.float().mT).amax(2)
    torch.testing.assert_close(method.worth(asked, layer.summary)[..., :20], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [2, 3, 17, 101, 150, 190])
@pytest.mark.parametrize("asking", range(G))
def test_a_planted_key_is_found(place, asking):
    """By whichever head of the group asks for it, and at the smallest budget that reads one chunk beside the rest."""
    k, v, q = draw(1, 200, sharp=0.3)
    k[0, 1, place] = 0
    k[0, 1, place, 3] = 30
    v[0, 1, place] = 7
    q[0, G + asking, -1] = 0
    q[0, G + asking, -1, 3] = 3
    layer = METHOD.bind(naive.shape(), None, 1 / 40).layer(0)
    run(layer, k, v, q, [199])
    (out,) = drive(layer, k, v, q, [1], start=199)
    torch.testing.assert_close(out[0, G + asking, 0], torch.full((D,), 7.0, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_key_that_is_not_read_is_not_seen():
    """What lies in a chunk of no worth leaves the answer as it is."""
    k, v, q = draw(1, 100)
    q[:, :, -1] = 0
    q[:, :, -1, 0] = 1
    k[..., 0] = torch.where(torch.arange(100) // 4 == 5, 5.0, 1.0)[None, None]
    k[:, :, 60:64, 0] = -5  # a chunk of the middle that nobody wants
    answers = []
    for height in (0.0, 1e3):
        v[:, :, 60:64] = height
        layer = METHOD.bind(naive.shape(), None, 0.1).layer(0)
        run(layer, k, v, q, [99])
        answers += drive(layer, k, v, q, [1], start=99)
    assert torch.equal(*answers)


def test_heads_of_other_kv_heads_choose_for_themselves():
    k, v, q = draw(1, 100, sharp=0.1)
    for head, place in ((0, 20), (1, 60)):
        k[0, head, place] = 0
        k[0, head, place, head] = 40
        v[0, head, place] = 10 * (head + 1)
        q[0, head * G, -1] = 0
        q[0, head * G, -1, head] = 5 / SCALE
    layer = METHOD.bind(naive.shape(), None, 1 / 20).layer(0)
    run(layer, k, v, q, [99])
    (out,) = drive(layer, k, v, q, [1], start=99)
    for head in (0, 1):
        torch.testing.assert_close(out[0, head * G, 0], torch.full((D,), 10.0 * (head + 1), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_summaries_have_the_keys_type_and_half_empty_chunks_stay_finite(dtype):
    k, v, q = draw(2, 60, dtype=dtype)
    valid = torch.arange(60) >= torch.tensor([0, 47])[:, None]
    layer = METHOD.bind(naive.shape(dtype), None, 0.3).layer(0)
    run(layer, k, v, q, [50], valid)
    for out in drive(layer, k, v, q, [1] * 10, valid, start=50):
        assert torch.isfinite(out).all()
    assert layer.summary.dtype == dtype
    assert torch.equal(layer.summary[0, :, 14, 0], k[0, :, 56:60].amin(1))
    assert torch.equal(layer.summary[1, :, 3, 1], k[1, :, 59])
    assert layer.dense.lengths == [60, 13]


def test_what_it_says_of_itself(llama):
    bound = longwave.cache(llama, METHOD, 0.1).method
    assert str(bound) == "quest(reads 0.100 of the middle, chunks of 4, window=8)"
    assert longwave.Quest().full_layers == 2
