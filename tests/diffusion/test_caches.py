"""Blocks read with a cache: what is equal to reading everything, and what stays as it was within a block."""

import copy

import pytest
import torch
from transformers import DynamicCache

import longwave
from longwave.diffusion import Dream, LLaDA, blocks, generate
from longwave.diffusion.reading import Reader
from tests.conftest import into, left_padded, tokens
from tests.diffusion.conftest import MASK
from tests.matrix import IDENTITY

KEEPS = ("prefix", "dual")
HOW = dict(max_new_tokens=18, block_length=6)


def prompts():
    ids, mask = left_padded(3, 30, [0, 11, 29])
    return ids.clamp(max=94), mask


def same(cached, plain):
    """Block by block, passes too."""
    for one, other in zip(cached, plain, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert one.passes == other.passes
        assert torch.equal(one.ends, other.ends)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(
    "sampler",
    [LLaDA(), LLaDA(temperature=1.0), LLaDA(guidance=1.0), Dream(), Dream(algorithm="origin", temperature=1.0)],
    ids=str,
)
def test_refreshed_at_every_step_it_is_as_without(both, keep, sampler):
    ids, mask = prompts()
    how = dict(sampler=sampler, steps=12, seed=3, **HOW)
    cached = blocks(both, ids, mask, cache=longwave.cache(both, "dense"), keep=keep, refresh=1, **how)
    same(cached, blocks(both, ids, mask, **how))


@pytest.mark.parametrize("keep", KEEPS)
def test_a_pass_a_block_needs_no_refresh(both, keep):
    ids, mask = prompts()
    cached = blocks(both, ids, mask, cache=longwave.cache(both, "dense"), keep=keep, steps=3, **HOW)
    same(cached, blocks(both, ids, mask, steps=3, **HOW))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("refresh", [None, 2, 3])
def test_rows_do_not_depend_on_each_other(both, keep, refresh):
    ids, mask = prompts()
    how = dict(keep=keep, refresh=refresh, **HOW)
    found = generate(both, ids, mask, cache=longwave.cache(both, "dense"), **how)
    for row, pad in enumerate((0, 11, 29)):
        alone = generate(both, ids[row : row + 1, pad:], cache=longwave.cache(both, "dense"), **how)
        assert torch.equal(alone[0], found[row, pad:])


def test_a_cache_that_is_not_refreshed_is_an_approximation(llada):
    """Else there would be nothing to be equal to."""
    ids, _ = prompts()
    plain = generate(llada, ids[:1], **HOW)
    assert any(
        not torch.equal(plain, generate(llada, ids[:1], cache=longwave.cache(llada, "dense"), keep=keep, **HOW))
        for keep in KEEPS
    )


class InPlace(DynamicCache):
    """Stock K and V of a whole text, of which those at some columns are written over: Fast-dLLM's dual cache."""

    columns: slice | None = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.columns is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        layer.keys[:, :, self.columns], layer.values[:, :, self.columns] = key_states, value_states
        return layer.keys, layer.values

    def get_mask_sizes(self, query_length, layer_idx):
        return (40, 0) if self.columns is not None else super().get_mask_sizes(query_length, layer_idx)


@pytest.mark.parametrize("keep", KEEPS)
def test_what_is_kept_stays_and_what_is_read_again_is_written_over(both, keep):
    """Two passes of a text of 40 whose block, columns 24 to 32, changes in between, against stock attention."""
    stock = copy.deepcopy(both)
    shift = int(both.config.logit_shift)
    text, changed = tokens(2, 40), tokens(2, 40, seed=2)
    changed[:, :24], changed[:, 32:] = text[:, :24], text[:, 32:]
    again = slice(24 - shift, 32 if keep == "dual" else 40)
    held = InPlace()
    memory = longwave.cache(both, "dense")
    reader = Reader(both, torch.ones(2, 40, dtype=torch.bool), bool(shift), memory, keep)
    asked = slice(24 - shift, 32 - shift)
    with torch.no_grad():
        first = stock(text, **into(held)).logits[:, asked]
        assert torch.allclose(reader.whole(text, 24, 32), first, atol=1e-4)
        kept = [layer.materialize()[0].clone() for layer in memory.memory_layers()]
        held.columns = again
        positions = torch.arange(40)[None, again].expand(2, -1)
        second = stock(changed[:, again], position_ids=positions, **into(held)).logits[:, :8]
        found = reader.again(changed, 24, 32)
    assert torch.allclose(found, second, atol=1e-4)
    assert (first - second).abs().max() > 1e-2
    for before, layer in zip(kept, memory.memory_layers(), strict=True):
        assert torch.equal(before, layer.materialize()[0])
        assert layer.rows == [40 - (again.stop - again.start)] * 2


ENDS = dict(sinks=2, window=24)
RENUMBERING = {name for name in IDENTITY if name.startswith(("longcache", "infllm", "longheads", "actqkv"))}
RENUMBERING |= {"streaming-slots"}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", IDENTITY)
def test_a_method_that_changes_nothing_is_as_dense(llada, name, keep):
    ids, how = tokens(2, 60).clamp(max=94), dict(max_new_tokens=8, block_length=4)
    memory = IDENTITY[name](llada)
    if keep == "dual" and name in RENUMBERING:
        with pytest.raises(NotImplementedError, match="reads keys at their numbers in the cache"):
            generate(llada, ids, cache=memory, keep=keep, **how)
        assert not memory.get_seq_length()
        return
    dense = generate(llada, ids, cache=longwave.cache(llada, "dense"), keep=keep, **how)
    assert torch.equal(generate(llada, ids, cache=memory, keep=keep, **how), dense)


METHODS = {
    "fourier": lambda model: longwave.cache(model, "fourier", segment=8, window=24, sinks=2, budget=1.0),
    "kivi": lambda model: longwave.cache(model, longwave.Kivi(bits=4, group=8, sinks=2, window=24)),
    "snapkv": lambda model: longwave.cache(model, longwave.SnapKV(window=24), budget=0.5),
    "streaming": lambda model: longwave.cache(model, longwave.Streaming(**ENDS), budget=0.5),
    "h2o": lambda model: longwave.cache(model, longwave.H2O(**ENDS), budget=0.5),
    "quest": lambda model: longwave.cache(model, longwave.Quest(full_layers=0, chunk=8, **ENDS), budget=0.5),
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", METHODS)
def test_any_method_holds_what_is_kept(both, name, keep):
    """It writes a whole answer, it holds no more than the last block's prefix, and rows stay independent."""
    ids, mask = left_padded(2, 90, [0, 23])
    ids = ids.clamp(max=94)
    memory = METHODS[name](both)
    found = generate(both, ids, mask, cache=memory, keep=keep, **HOW)
    assert found.shape == (2, 108)
    assert not bool((found[:, 90:] == MASK).any())
    shift = int(both.config.logit_shift)
    assert memory.get_seq_length() == 108 - 6 - shift
    assert memory.report().held <= memory.get_seq_length()
    alone = generate(both, ids[1:, 23:], cache=METHODS[name](both), keep=keep, **HOW)
    assert torch.equal(found[1, 23:], alone[0])


@pytest.mark.parametrize("name", ["snapkv", "streaming", "kivi"])
def test_the_prefix_stays_the_same_within_a_block(llada, name):
    memory = METHODS[name](llada)
    text = tokens(1, 108)
    reader = Reader(llada, torch.ones(1, 108, dtype=torch.bool), False, memory, "prefix")
    with torch.no_grad():
        reader.whole(text, 90, 96)
        held = [layer.materialize() for layer in memory.memory_layers()]
        for _ in range(3):
            reader.again(text, 90, 96)
    for before, layer in zip(held, memory.memory_layers(), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(before, layer.materialize(), strict=True))
        assert layer.rows == [90]


def test_a_window_that_is_too_short_says_so(llada):
    memory = longwave.cache(llada, longwave.Kivi(bits=4, group=8, sinks=2, window=8))
    with pytest.raises(ValueError, match=r"24 tokens are read again .* a window of 24 or more, or keep=\"dual\""):
        generate(llada, tokens(1, 90).clamp(max=94), cache=memory, max_new_tokens=24, block_length=8)
    memory.reset()
    generate(llada, tokens(1, 90).clamp(max=94), cache=memory, keep="dual", max_new_tokens=24, block_length=8)


def test_layers_of_another_kind_are_refused(models):
    model = copy.deepcopy(models["gemma3"][1])
    model.config.is_causal, model.config.mask_token_id = False, MASK
    with pytest.raises(NotImplementedError, match="some layers of this model attend to a window"):
        generate(model, tokens(1, 20).clamp(max=94), cache=longwave.cache(model, "dense"), **HOW)


def test_a_size_is_planned_for_what_is_coming(llada):
    ids = tokens(1, 90).clamp(max=94)
    llada.config.max_position_embeddings = 120
    memory = longwave.cache(llada, longwave.Kivi(group=8, sinks=2, window=24), budget="46KiB")
    generate(llada, ids, cache=memory, keep="dual", **HOW)
    assert 0 < memory.nbytes <= 46 * 1024


def test_a_method_that_cannot_go_back_is_refused_before_anything_is_read(llada):
    memory = longwave.cache(llada, longwave.Streaming(sinks=2, window=24), budget="32KiB")
    with pytest.raises(ValueError, match="cannot take back what it has read"):
        generate(llada, tokens(1, 90).clamp(max=94), cache=memory, keep="dual", **HOW)
    assert not memory.get_seq_length()


@pytest.mark.parametrize("keep", KEEPS)
def test_a_cache_that_waits(both, keep):
    """Until its first pass it is as no cache; as many passes as a block has, and it is never filled."""
    ids, mask = prompts()
    memory = longwave.cache(both, "dense")
    same(blocks(both, ids, mask, cache=memory, keep=keep, delay=6, **HOW), blocks(both, ids, mask, **HOW))
    assert not memory.get_seq_length()
    same(
        blocks(both, ids, mask, cache=memory, keep=keep, delay=1, steps=6, **HOW),
        blocks(both, ids, mask, steps=6, **HOW),
    )
    assert memory.get_seq_length()


def test_sparse_dllm(llada):
    """Half of what is around a block is held, one set a layer, and the answer is whole."""
    ids = tokens(2, 90).clamp(max=94)
    memory = longwave.cache(llada, longwave.SparseDLLM(window=6), budget=0.5)
    found = generate(llada, ids, cache=memory, keep="dual", delay=1, **HOW)
    assert found.shape == (2, 108)
    assert memory.report().held < 0.6 * 102
    for layer in memory.memory_layers():
        position = layer.dense.columns["position"][..., : layer.dense.longest]
        assert torch.equal(position[:, :1].expand_as(position), position)


def test_a_threshold_with_a_cache(llada):
    ids, mask = prompts()
    for keep in KEEPS:
        found = list(blocks(llada, ids, mask, cache=longwave.cache(llada, "dense"), keep=keep, threshold=0.4, **HOW))
        assert sum(block.passes for block in found) < 18
        how = dict(keep=keep, threshold=0.4, refresh=1, **HOW)
        same(
            blocks(llada, ids, mask, cache=longwave.cache(llada, "dense"), **how),
            blocks(llada, ids, mask, threshold=0.4, **HOW),
        )


def test_a_prompt_of_one_token(both):
    ids = torch.tensor([[7]])
    for keep in KEEPS:
        cached = generate(both, ids, cache=longwave.cache(both, "dense"), keep=keep, refresh=1, **HOW)
        assert torch.equal(cached, generate(both, ids, **HOW))
        assert generate(both, ids, cache=longwave.cache(both, "dense"), keep=keep, **HOW).shape == (1, 19)
