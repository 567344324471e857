"""longheads: which chunks each head reads, at which places, and what a chunk is described by."""

from dataclasses import replace

import pytest
import torch

import longwave
from tests.conftest import left_padded, tokens
from tests.methods import naive
from tests.methods.naive import SCALE, D, G, H, draw
from tests.methods.test_infllm import check_steps
from tests.methods.test_longcache import COMINGS, Turning, answers, drive, new_layer
from tests.reading import read_in

METHOD = longwave.LongHeads(chunk=5, chunks=4)
PLACES = torch.arange(METHOD.chunk)[None]


def feature(k, v, q, head, chunk):
    """What head `head` describes a chunk by."""
    own = slice(chunk * METHOD.chunk, (chunk + 1) * METHOD.chunk)
    keys = Turning()._by(k[None, head // G : head // G + 1, own], PLACES)[0, 0]
    asked = Turning()._by(q[None, head : head + 1, own], PLACES)[0, 0]
    mean = (torch.softmax(asked @ keys.T * SCALE, -1) @ v[head // G, own]).mean(0)
    return torch.softmax(mean @ keys.T * SCALE, -1) @ keys


def chosen(k, v, q, i, head):
    """Chunks that a query reads, rising."""
    own = i // METHOD.chunk
    always = {0, max(0, own - 1), own}
    rest = [c for c in range(own) if c not in always]
    worth = {c: float(q[head, i] @ feature(k, v, q, head, c)) for c in rest}
    return sorted(always | set(sorted(rest, key=lambda c: -worth[c])[: METHOD.chunks - 3]))


def twin(k, v, q):
    """Answers [H * G, n, D] of one row, wherever its passes end."""
    out = torch.zeros_like(q)
    for i in range(q.shape[1]):
        for head in range(H * G):
            found = chosen(k, v, q, i, head)
            assert len(found) == min(METHOD.chunks, i // METHOD.chunk + 1)
            places = [c * METHOD.chunk + j for c in found for j in range(METHOD.chunk) if c * METHOD.chunk + j <= i]
            assert places[-1] == i
            at = torch.arange(len(places))[None]
            keys = Turning()._by(k[None, head // G : head // G + 1, places], at)[0, 0]
            asked = Turning()._by(q[None, head : head + 1, i : i + 1], at[:, -1:])[0, 0, 0]
            out[head, i] = torch.softmax(keys @ asked * SCALE, -1) @ v[head // G, places]
    return out


@pytest.mark.parametrize("coming", list(COMINGS))
@pytest.mark.parametrize("pads", [[0], [0, 11, 45]], ids=["alone", "padded"])
def test_each_row_reads_what_its_twin_reads(coming, pads):
    """However its passes are cut: a query chooses alone."""
    sizes = COMINGS[coming]
    given = draw(len(pads), sum(sizes), seed=4)
    valid = naive.coming_with(pads, sum(sizes))
    layer = new_layer(METHOD)
    found = answers(layer, *given, sizes, valid)
    for row, own, mine, _ in naive.rows_of(given, sizes, valid):
        torch.testing.assert_close(found[row][:, own], twin(*mine), rtol=0, atol=1e-9)
        ready = mine[0].shape[1] // METHOD.chunk
        assert layer._known[row] == ready
        for head, described in enumerate(layer.means[row]):
            for c in range(ready):
                torch.testing.assert_close(described[c], feature(*mine, head, c), rtol=0, atol=1e-9)


def test_heads_read_other_chunks():
    k, v, q = draw(1, 100, seed=6)
    layer = new_layer(METHOD)
    answers(layer, k, v, q, [100])
    found = layer._chosen(q[:, :, -1:], torch.tensor([[99]]), 20, True)[0, :, 0]
    assert (found.sum(-1) == METHOD.chunks).all()
    assert found[:, [0, 18, 19]].all()
    assert len({tuple(row.tolist()) for row in found}) > 1


def test_up_to_the_chunks_of_a_head_it_is_the_model(llama):
    ids, mask = left_padded(2, 60, [0, 13])
    method = longwave.LongHeads(chunk=12, chunks=5)
    stock = read_in(llama, longwave.cache(llama, "dense"), ids, (40, 1, 1, 18), mask)
    found = read_in(llama, longwave.cache(llama, method), ids, (40, 1, 1, 18), mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], stock[real], rtol=0, atol=1e-4)


def test_no_place_exceeds_what_a_head_reads():
    layer = new_layer(METHOD)
    k, v, q = draw(1, 400)
    answers(layer, k, v, q, [300, *[1] * 20, 40, 3, *[1] * 7, 30])
    assert layer.progress.rotary.highest == METHOD.positions - 1


def test_later_tokens_change_nothing_before_them():
    k, v, q = draw(1, 60, seed=2)
    before = answers(new_layer(METHOD), k, v, q, [33, 27])
    other = [torch.cat([x[:, :, :53], x[:, :, 53:] + 1], 2) for x in (k, v, q)]
    after = answers(new_layer(METHOD), *other, [33, 27])
    torch.testing.assert_close(before[:, :, :53], after[:, :, :53], rtol=0, atol=1e-12)
    assert (before - after)[:, :, 53:].abs().max() > 1e-3


@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_needle_of_one_head_is_found(group):
    """By the query head that asks, in its own KV head, and its chunk is read by no other."""
    heads = 4
    shape = replace(naive.shape(), kv_heads=heads, query_heads=heads * group)
    for head in range(heads * group):
        layer = METHOD.bind(shape, None, None).layer(0)
        layer.progress.rotary = Turning()
        g = torch.Generator().manual_seed(head)
        k = torch.randn(1, heads, 200, D, generator=g, dtype=torch.float64) * 0.01
        v, q = torch.zeros_like(k), torch.zeros(1, heads * group, 200, D, dtype=torch.float64)
        slow = torch.tensor([3, 7])  # the slowest pair: turned by places, it stays what it is
        k[0, head // group, 60, slow], v[0, head // group, 60, slow] = 30.0, 5.0
        q[0, head, 199, slow] = 3.0
        *_, out = drive(layer, k, v, q, [199, 1])
        assert out[0, head, 0, slow].min() > 4.9, head
        found = layer._chosen(q[:, :, -1:], torch.tensor([[199]]), 40, True)[0, :, 0, 12]
        assert found.nonzero()[:, 0].tolist() == [head]


@pytest.mark.parametrize("pads", [[0, 0], [0, 25]], ids=["even", "padded"])
def test_a_step_on_the_device_reads_what_a_pass_does(pads):
    check_steps(METHOD, pads)


def test_a_crop_that_chunks_cannot_be_described_after_is_refused(llama):
    ids = tokens(1, 80)
    memory, other = longwave.cache(llama, METHOD), longwave.cache(llama, METHOD)
    read_in(llama, memory, ids[:, :63], (63,))
    with pytest.raises(ValueError, match=r"cannot remove the last 9 tokens: .* only the last 10 queries .*deepcopy"):
        memory.crop(-9)
    memory.crop(-7)
    read_in(llama, other, ids[:, :56], (56,))
    found, want = (read_in(llama, one, ids, (20, 1, 3)) for one in (memory, other))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_words_and_options(llama):
    assert str(longwave.cache(llama, METHOD).method) == "longheads(reads 20 tokens a head: 4 chunks of 5)"
    with pytest.raises(ValueError, match=r"longheads reads 4,096 tokens at once .* knows 512 positions: give fewer ch"):
        longwave.cache(llama, "longheads")
    with pytest.raises(ValueError, match=r"chunks is a whole number of chunks \(the first, .* at least 3; got 2"):
        longwave.LongHeads(chunks=2)
    with pytest.raises(ValueError, match="chunk is a whole number of tokens, at least 1; got 0"):
        longwave.LongHeads(chunk=0)
