import copy

import pytest
import torch
from transformers import DynamicCache

import longwave
from longwave.evals.fork import can_fork, fork, needs_of, pad_left, prefill, read, takes_gaps
from tests.conftest import into, random_profile, tokens
from tests.evals.hybrids import KINDS, hybrid
from tests.matrix import LOSSY

METHODS = {
    "dense": (longwave.Dense(), None),
    "segments": (longwave.Fourier(segment=16, sinks=2, window=16), 0.4),
    "no sinks": (longwave.Fourier(segment=16, sinks=0, window=16), 0.2),
    "period": (longwave.FourierPaper(keep=0.25, states=8, sinks=2, window=16, reserve=32), None),
    "queries": (longwave.SnapKV(sinks=2, window=16), 0.4),
    "mass": (longwave.H2O(sinks=2, window=16), 0.4),
}
KIVI = longwave.Kivi(group=8, sinks=2, window=16)


@pytest.fixture(params=list(METHODS))
def make(request):
    method, budget = METHODS[request.param]
    return lambda model: longwave.cache(model, method, budget, random_profile(model) if method.uses_profile else None)


@torch.no_grad()
def feed(model, ids, memory):
    return model(ids, **into(memory), use_cache=True).logits


def seen(model, make, ids, mask=None):
    """A dense cache that has read ids, and observed what the method needs."""
    return prefill(model, ids, mask, needs_of([make(model)]))


def test_a_method_that_reads_otherwise_is_not_forked(llama):
    method = longwave.ReAttention(window=16, chunk=16, spans=4, span=4)
    assert not can_fork(longwave.cache(llama, method))
    assert can_fork(longwave.cache(llama, method, 1.0))
    empty, short = longwave.cache(llama, method), longwave.cache(llama, method)
    with pytest.raises(ValueError, match=r"of more than 64 tokens otherwise than a dense cache does"):
        fork(prefill(llama, tokens(1, 65)), empty)
    assert fork(prefill(llama, tokens(1, 64)), short).get_seq_length() == 64


@pytest.mark.parametrize("length", [1, 20, 141])
def test_fork_equals_reading_the_prompt(llama, make, length):
    ids = tokens(2, length)
    forked, own = fork(seen(llama, make, ids), make(llama)), make(llama)
    feed(llama, ids, own)
    assert forked.report() == own.report()
    assert forked.get_seq_length() == length
    for ours, theirs in zip(forked.layers, own.layers, strict=True):
        assert ours.rows == theirs.rows
        for x, y in zip(ours.materialize(), theirs.materialize(), strict=True):
            assert torch.equal(x, y)


def test_fork_answers_like_its_twin(llama, make):
    ids, new = tokens(2, 141), tokens(2, 40, seed=3)
    forked, own = fork(seen(llama, make, ids), make(llama)), make(llama)
    feed(llama, ids, own)
    assert torch.equal(feed(llama, new, forked), feed(llama, new, own))
    assert forked.report() == own.report()


def test_forks_share_nothing(llama, make):
    ids = tokens(1, 100)
    dense = seen(llama, make, ids)
    first, second = fork(dense, make(llama)), fork(dense, make(llama))
    before = [x.clone() for layer in [*dense.layers, *second.layers] for x in layer.materialize()]
    feed(llama, tokens(1, 40, seed=4), first)
    after = [x for layer in [*dense.layers, *second.layers] for x in layer.materialize()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_prefill_is_the_models_own_pass(llama, models):
    from transformers import DynamicCache

    ids, stock = tokens(2, 50), models["llama"][1]
    expected = DynamicCache(config=stock.config)
    feed(stock, ids, expected)
    for ours, theirs in zip(prefill(llama, ids).layers, expected.layers, strict=True):
        k, v = ours.materialize()
        torch.testing.assert_close(k, theirs.keys)
        torch.testing.assert_close(v, theirs.values)


@pytest.fixture(scope="module", params=KINDS)
def mixed(request):
    return hybrid(request.param)


def test_a_forked_hybrid_answers_as_one_that_read_the_prompt(mixed):
    ids, new = tokens(2, 70), tokens(2, 9, seed=3)
    dense = prefill(mixed, ids)
    own = longwave.cache(mixed, KIVI)
    feed(mixed, ids, own)
    for _ in range(2):  # a fork leaves what the next one needs
        forked = fork(dense, longwave.cache(mixed, KIVI))
        assert forked.get_seq_length() == 70
        assert forked.report() == own.report()
        twin = copy.deepcopy(own)
        for part in (new[:, :1], new[:, 1:]):
            assert torch.equal(feed(mixed, part, forked), feed(mixed, part, twin))
        assert forked.report() == twin.report()


def test_ragged_rows_of_a_hybrid_are_what_they_are_alone(mixed):
    rows = ragged((70, 41))
    padded = pad_left(rows, 0)
    own, forked = longwave.cache(mixed, "dense"), fork(prefill(mixed, *padded), longwave.cache(mixed, "dense"))
    read(mixed, own, *padded)
    mask = torch.cat([padded[1], torch.ones(2, 1, dtype=torch.long)], dim=1)
    where = torch.tensor([[70], [41]])
    new = tokens(2, 1, seed=3)
    with torch.no_grad():
        got, wanted = (
            mixed(new, attention_mask=mask, position_ids=where, past_key_values=memory).logits
            for memory in (forked, own)
        )
        assert torch.equal(got, wanted)
        alone = mixed(torch.cat([torch.tensor([rows[1]]), new[1:]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(got[1:], alone, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("select", [[1, 1, 0], [False, True]], ids=["rows", "mask"])
def test_rows_of_a_forked_hybrid_are_selected(mixed, select):
    ids, new = tokens(2, 40), tokens(2, 3, seed=3)
    memory = fork(prefill(mixed, ids), longwave.cache(mixed, "dense"))
    whole = feed(mixed, new, copy.deepcopy(memory))
    chosen = torch.tensor(select)
    memory.batch_select_indices(chosen)
    torch.testing.assert_close(feed(mixed, new[chosen], memory), whole[chosen], rtol=1e-4, atol=1e-4)
    memory.batch_repeat_interleave(2)
    assert {layer.batch_size for layer in memory.memory_layers()} == {2 * len(new[chosen])}


def test_every_kind_of_cache_says_what_it_takes(mixed, llama):
    assert can_fork(longwave.cache(mixed, "dense"))
    assert not takes_gaps(longwave.cache(mixed, "dense"))
    assert takes_gaps(longwave.cache(llama, "dense"))
    assert not can_fork(DynamicCache(config=llama.config))


def test_padding_comes_first():
    ids, mask = pad_left([[5, 6, 7], [8]], pad=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def ragged(lengths=(141, 60, 100)):
    return [tokens(1, length, seed=length)[0].tolist() for length in lengths]


def test_ragged_rows_are_forked_as_if_read(llama, make):
    ids, mask = pad_left(ragged(), 0)
    forked, own = fork(seen(llama, make, ids, mask), make(llama)), make(llama)
    read(llama, own, ids, mask)
    assert forked.report() == own.report()
    for ours, theirs in zip(forked.layers, own.layers, strict=True):
        assert ours.rows == theirs.rows == [141, 60, 100]
        for x, y in zip(ours.materialize(), theirs.materialize(), strict=True):
            assert torch.equal(x, y)


def test_a_ragged_row_is_what_it_is_alone(llama, make):
    rows = ragged()
    forked = fork(seen(llama, make, *pad_left(rows, 0)), make(llama))
    for number, row in enumerate(rows):
        alone = fork(seen(llama, make, torch.tensor([row])), make(llama))
        for ours, theirs in zip(forked.layers, alone.layers, strict=True):
            assert (ours.rows[number], ours.held()[number]) == (len(row), theirs.held()[0])
            for x, y in zip(ours.materialize(), theirs.materialize(), strict=True):
                torch.testing.assert_close(x[number, :, : y.shape[2]], y[0], rtol=1e-3, atol=1e-4)


def test_a_prompt_that_is_read_for_all_methods_is_what_each_would_have_read(llama):
    """What one needs to see of it changes nothing of what another sees."""
    ids, last = tokens(1, 150, seed=3), tokens(1, 12, seed=4)
    makers = {name: make for name, make in LOSSY.items() if can_fork(make(llama))}
    assert len(makers) > 15
    dense = prefill(llama, ids, None, needs_of([make(llama) for make in makers.values()]))
    for name, make in makers.items():
        own, memory = make(llama), make(llama)
        read(llama, own, ids)
        fork(dense, memory)
        one, other = feed(llama, last, own), feed(llama, last, memory)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")
