"""Merged segments in a cache: what is stored is what ops/merge.py says of the model's own queries, keys and values."""

from dataclasses import replace

import pytest
import torch

import longwave
from longwave.frame import observing
from longwave.frame.observe import GOLDEN, LATER, PROBES, probing
from longwave.ops.attention.reference import group_heads
from longwave.ops.merge import merge
from longwave.plan.profile import Profile
from longwave.rotary import Rotary
from tests.conftest import left_padded, merging_profile, random_profile, shape_of, tokens
from tests.reading import read

METHOD = longwave.Fourier(segment=16, sinks=3, window=20)


@pytest.fixture
def bound(llama):
    made = METHOD.bind(shape_of(llama), merging_profile(llama), 0.2)
    assert all(code.merged for layer in made.plan for code in layer.k)
    return made


def test_what_is_stored_is_what_the_definition_says(llama, bound):
    ids = tokens(2, 90)
    memory, dense = longwave.cache(llama, bound), observing(llama, probing(20))
    read(llama, memory, ids)
    read(llama, dense, ids)
    rotary = Rotary.of(llama)
    turns = {module.layer_idx: module for module in rotary.turns}
    for layer, exact in zip(memory.memory_layers(), dense.memory_layers(), strict=True):
        k, v = exact.materialize()
        numbers = exact.queries.numbers()
        assert numbers[0].tolist() == list(range(90 - PROBES + 1, 91))  # a window of 20: every one of its last 16
        later = numbers - 1 + (numbers * GOLDEN % 1 * LATER).long()  # each asked again further on, of all that was seen
        plain = rotary.unrotate(turns[layer.index], exact.queries.q, numbers - 1)
        q = rotary.rotate(turns[layer.index], plain, later)
        lse = (layer.scaling * group_heads(q, 2) @ k.mT).logsumexp(-1).unflatten(2, (2, -1)).flatten(1, 2)
        middle = slice(3, 3 + 64)
        keys, values, bias = merge(q, k[:, :, middle], v[:, :, middle], lse, layer.scaling, 16)
        held_k, held_v = layer.store.materialize()
        for held, means in ((held_k, keys), (held_v, values)):
            near = 0.01 * float(means.abs().max())  # eight bits
            torch.testing.assert_close(held, means.repeat_interleave(16, 2), rtol=0, atol=near)
        torch.testing.assert_close(torch.cat([layer.store.bias(row) for row in (0, 1)]), bias, rtol=1e-3, atol=1e-3)


def test_padding_and_steps_make_the_same_segments(llama, bound):
    """A row alone, beside others, and one whose last tokens came one by one: the queries are the row's own."""
    ids, mask = left_padded(2, 95, [11, 0])
    alone, beside, stepped = (longwave.cache(llama, bound) for _ in range(3))
    read(llama, alone, ids[:1, 11:])
    read(llama, beside, ids, mask)
    for ours, theirs in zip(beside.memory_layers(), alone.memory_layers(), strict=True):
        count = theirs.store.counts[0]
        assert ours.store.counts[0] == count
        for held, want in zip(ours.store.materialize(), theirs.store.materialize(), strict=True):
            step = float(want.abs().max()) / 127  # a code may tip over where sums are taken in another order
            torch.testing.assert_close(held[:1, :, : count * 16], want, rtol=0, atol=1.1 * step)
        torch.testing.assert_close(ours.store.bias(0), theirs.store.bias(0), rtol=1e-2, atol=2e-3)
    read(llama, stepped, ids[:1, 11:80])
    before = [layer.store.pages.clone() for layer in stepped.memory_layers()]
    for at in range(81, 96):
        read(llama, stepped, ids[:1, 11:at])
    for layer, pages in zip(stepped.memory_layers(), before, strict=True):
        assert torch.equal(layer.store.pages[:, : pages.shape[1]], pages)  # what is made is never touched again
        assert layer.queries.numbers().tolist() == [list(range(84 - PROBES + 1, 85))]


def test_many_queries_see_the_bias_too(llama, bound):
    """A block of queries over unpacked pages, and the same queries one by one over the pages as they are."""
    ids = tokens(1, 90 + 36)
    whole, single = longwave.cache(llama, bound), longwave.cache(llama, bound)
    read(llama, whole, ids[:, :83])
    read(llama, single, ids[:, :83])
    bias = torch.cat([layer.store.bias(0).flatten() for layer in whole.memory_layers()])
    assert bias.abs().max() > 0.05
    layer = next(iter(whole.memory_layers()))
    q = torch.randn(1, 4, 40, 8, generator=torch.Generator().manual_seed(0))
    assert layer.store.expands(q)
    k, v = torch.randn(2, 1, 2, 40, 8, generator=torch.Generator().manual_seed(1))
    for one in (whole, single):
        next(iter(one.memory_layers())).write(k, v)
    together = layer.attend(_pass(q, k, v))
    for at in range(40):
        apart = _softmax(layer, q[:, :, at : at + 1], 40 - at - 1)
        torch.testing.assert_close(together[:, :, at : at + 1], apart, rtol=1e-4, atol=1e-5)


def _pass(q, k, v):
    from longwave.frame import Pass

    return Pass(q, k, v, 0.7, phase="chunk")


def _softmax(layer, q, later):
    """By the definition: softmax over what the layer stands for and its bias, the last `later` tokens not yet there."""
    k, v = layer.materialize()
    first, middle = 3, layer.store.tokens[0]
    bias = torch.zeros(1, 2, 1, k.shape[2])
    bias[0, :, 0, first : first + middle] = layer.store.bias(0)[0].repeat_interleave(16, -1)
    scores = (0.7 * group_heads(q, 2) @ k.mT + bias)[..., : k.shape[2] - later]
    return (scores.softmax(-1) @ v[:, :, : k.shape[2] - later]).reshape(q.shape)


@pytest.mark.parametrize("evicting", [longwave.SnapKV, longwave.H2O, longwave.Streaming], ids=lambda cls: cls.name)
def test_what_an_evicting_method_keeps_is_merged_by_its_own_queries(llama, evicting):
    """Beside those that a method votes with, and without them its votes are the same."""
    method = evicting(store=replace(METHOD, sinks=4, window=256), store_budget=0.2, sinks=3, window=20)
    made = method.bind(shape_of(llama), merging_profile(llama), 0.02)
    assert made.merges
    memory = longwave.cache(llama, made)
    read(llama, memory, tokens(2, 150))
    for layer in memory.memory_layers():
        assert layer.store.counts == [(150 - 23) // made.span] * 2
        assert layer.store.bias(0).abs().max() > 1e-3
    assert memory.nbytes == made.nbytes(150, 2)


def test_an_own_mask_is_no_hindrance(llama, bound):
    """Two documents in one prompt: remembered queries only weigh tokens, so that what a mask hides does no harm."""
    memory = longwave.cache(llama, bound)
    document = torch.arange(90) >= 40
    mask = (document[:, None] == document) & torch.ones(90, 90, dtype=torch.bool).tril()
    read(llama, memory, tokens(1, 90), attention_mask=mask[None, None])
    assert all(layer.store.counts == [4] for layer in memory.memory_layers())


def test_tokens_that_were_never_asked_about_become_plain_means(llama, bound):
    layer = bound.layer(0)
    k, v = torch.randn(2, 1, 2, 90, 8, generator=torch.Generator().manual_seed(0))
    layer.write(k, v)
    layer.settle()
    held, _ = layer.store.materialize()
    mean = k[:, :, 3 : 3 + 64].unflatten(2, (4, 16)).mean(3).repeat_interleave(16, 2)
    torch.testing.assert_close(held, mean, rtol=0, atol=0.01 * float(mean.abs().max()))
    assert not layer.store.bias(0).any()


def test_it_costs_its_queries_and_says_so(llama, bound):
    memory = longwave.cache(llama, bound)
    read(llama, memory, tokens(2, 90))
    per_row = PROBES * (4 * 8 * 4 + 8)
    assert memory.report().parts["queries"] == 3 * 2 * per_row
    assert memory.nbytes == bound.nbytes(90, 2)


def test_plain_means_where_they_cost_less(llama):
    profile = merging_profile(llama)
    found = profile.sensitivity
    costs = replace(found, k=found.k.clone(), both=found.both + 20)
    costs.k[..., 0] = 0
    made = METHOD.bind(shape_of(llama), replace(profile, sensitivity=costs), 0.2)
    assert not made.merges
    assert made.needs.queries == 0


def test_a_profile_keeps_what_both_cost(llama, tmp_path):
    profile = random_profile(llama)
    profile.save(tmp_path / "made.json")
    torch.testing.assert_close(
        Profile.load(tmp_path / "made.json").sensitivity.both, profile.sensitivity.both, rtol=1e-2, atol=1e-6
    )
