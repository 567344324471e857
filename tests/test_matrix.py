"""The contract with transformers: with its budget at 1, every method gives stock transformers' own tokens."""

import copy

import pytest
import torch
import transformers

import longwave
from tests.conftest import crossed, into, left_padded, tokens
from tests.matrix import IDENTITY, ROOMY

NEW = 24
LENGTH = 50


@pytest.fixture(params=["llama", pytest.param("qwen3", marks=pytest.mark.slow), "gemma3"])
def pair(request, models):
    return models[request.param]


@pytest.fixture(params=list(IDENTITY))
def make(request):
    return IDENTITY[request.param]


def both(pair, make, ids, mask=None, **options):
    ours, stock = pair
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    torch.manual_seed(7)
    expected = stock.generate(ids, attention_mask=mask, **options)
    torch.manual_seed(7)
    return ours.generate(ids, attention_mask=mask, **into(make(ours)), **options), expected


def test_greedy(pair, make):
    got, expected = both(pair, make, tokens(2, LENGTH))
    assert len(set(expected[:, LENGTH:].flatten().tolist())) > 5  # a model stuck on one token would prove nothing
    assert torch.equal(got, expected)


def test_greedy_left_padding(pair, make):
    got, expected = both(pair, make, *left_padded(3, LENGTH, [20, 0, 47]))
    assert torch.equal(got, expected)


def test_sampling_with_a_seed(pair, make):
    got, expected = both(pair, make, tokens(2, LENGTH), do_sample=True, temperature=1.5, top_k=40)
    assert torch.equal(got, expected)


def test_several_sequences_sampled(pair, make):
    got, expected = both(pair, make, tokens(2, LENGTH), do_sample=True, num_return_sequences=3)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("pads", [[0, 0], [13, 0]], ids=["even", "padded"])
def test_beams(pair, make, pads):
    got, expected = both(pair, make, *left_padded(2, LENGTH, pads), num_beams=3, num_return_sequences=2)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("size", "pads"),
    crossed(
        {1: 1, 7: 7, 64: 64}, {"even": [0, 0], "padded": [19, 0]}, {("1", "padded"), ("7", "even"), ("64", "padded")}
    ),
)
def test_prefill_in_chunks(pair, make, size, pads):
    got, expected = both(pair, make, *left_padded(2, LENGTH, pads), prefill_chunk_size=size)
    assert torch.equal(got, expected)


def test_prompt_lookup(pair, make):
    ids = tokens(1, 20).repeat(1, 3)  # repeats, so that guesses are made and some of them fail
    got, expected = both(pair, make, ids, prompt_lookup_num_tokens=4)
    assert torch.equal(got, expected)


def test_plain_generation_after_prompt_lookup(pair, make):
    """transformers leaves the past recording on; it must not stop the method's work for good."""
    ours, stock = pair
    if "gemma3" in ours.config.model_type and transformers.__version__ < "5.18":
        pytest.skip("transformers 5.17's own sliding layer fails here, with its DynamicCache too")
    memory = make(ours)
    first = ours.generate(tokens(1, 40), **into(memory), max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    options = {"attention_mask": torch.ones_like(first), "max_new_tokens": NEW, "do_sample": False}
    got = ours.generate(first, **into(memory), **options)
    assert torch.equal(got, stock.generate(first, **options))


def test_continue_with_all_ids(pair, make):
    ours, stock = pair
    memory = make(ours)
    first = ours.generate(tokens(2, LENGTH), **into(memory), max_new_tokens=10, do_sample=False)
    longer = torch.cat([first, tokens(2, 9, seed=5)], dim=1)
    options = {"attention_mask": torch.ones_like(longer), "max_new_tokens": NEW, "do_sample": False}
    got = ours.generate(longer, **into(memory), **options)
    assert torch.equal(got, stock.generate(longer, **options))


def test_continue_with_new_ids_and_a_whole_mask(pair, make):
    ours, stock = pair
    ids, mask = left_padded(2, LENGTH, [11, 0])
    memory = make(ours)
    first = ours.generate(ids, attention_mask=mask, **into(memory), max_new_tokens=10, do_sample=False)
    # the cache lacks the last generated token, so it is new too
    new = torch.cat([first[:, -1:], tokens(2, 9, seed=5)], dim=1)
    longer = torch.cat([first[:, :-1], new], dim=1)
    whole = torch.cat([mask, torch.ones(2, longer.shape[1] - LENGTH, dtype=torch.long)], dim=1)
    got = ours.generate(new, attention_mask=whole, **into(memory), max_new_tokens=NEW, do_sample=False)
    expected = stock.generate(longer, attention_mask=whole, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got[:, -NEW:], expected[:, -NEW:])


def logits(model, ids, memory=None, mask=None, **options):
    with torch.no_grad():
        return model(ids, **into(memory), attention_mask=mask, use_cache=True, **options).logits


def test_deepcopy_is_independent(pair, make):
    ours, stock = pair
    ids = tokens(2, LENGTH)
    memory = make(ours)
    logits(ours, ids, memory)
    twin = copy.deepcopy(memory)
    logits(ours, tokens(2, 30, seed=8), memory)
    new = tokens(2, 5, seed=9)
    torch.testing.assert_close(
        logits(ours, new, twin), logits(stock, torch.cat([ids, new], 1))[:, -5:], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_rows_move(pair, make, name, argument, rows):
    ours, stock = pair
    ids, mask = left_padded(3, LENGTH, [0, 21, 4])
    memory = make(ours)
    logits(ours, ids, memory, mask)
    getattr(memory, name)(argument)
    new = tokens(len(rows), 3, seed=4)
    whole = torch.cat([mask[rows], torch.ones(len(rows), 3, dtype=torch.long)], 1)
    expected = logits(stock, torch.cat([ids[rows], new], 1), None, whole)[:, -3:]
    torch.testing.assert_close(logits(ours, new, memory, whole), expected, rtol=1e-4, atol=1e-4)


def test_reset_and_reuse(pair, make):
    ours, stock = pair
    memory = make(ours)
    ours.generate(tokens(3, LENGTH), **into(memory), max_new_tokens=5, do_sample=False)
    memory.reset()
    assert memory.get_seq_length() == 0
    assert all(layer.nbytes == 0 for layer in memory.memory_layers())
    ids = tokens(2, 33, seed=3)
    got = ours.generate(ids, **into(memory), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, stock.generate(ids, max_new_tokens=NEW, do_sample=False))


def test_crop_while_recording(pair, make):
    ours, stock = pair
    ids, guess, new = tokens(2, LENGTH), tokens(2, 6, seed=2), tokens(2, 4, seed=3)
    memory = make(ours)
    logits(ours, ids, memory)
    memory.activate_past_recording()
    logits(ours, guess, memory)
    memory.crop(-4)
    assert memory.get_seq_length() == LENGTH + 2
    expected = logits(stock, torch.cat([ids, guess[:, :2], new], 1))[:, -4:]
    torch.testing.assert_close(logits(ours, new, memory), expected, rtol=1e-4, atol=1e-4)


def test_not_causal(pair, make):
    """Diffusion models see the whole block: is_causal=False."""
    ours, stock = pair
    ids = tokens(2, 40)
    got = logits(ours, ids, make(ours), is_causal=False)
    expected = stock(ids, use_cache=False, is_causal=False).logits
    assert not torch.allclose(expected, stock(ids, use_cache=False).logits, atol=1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_not_causal_on_a_filled_cache(models, make):
    from transformers import DynamicCache

    ours, stock = models["llama"]
    ids, block = tokens(2, 40), tokens(2, 12, seed=6)
    memory, plain = make(ours), DynamicCache(config=stock.config)
    logits(ours, ids, memory)
    logits(stock, ids, plain)
    mask = torch.ones(2, 1, 12, 52, dtype=torch.bool)  # stock takes "sees all" most plainly as a 4D mask
    expected = logits(stock, block, plain, mask)
    torch.testing.assert_close(logits(ours, block, memory, is_causal=False), expected, rtol=1e-4, atol=1e-4)


def test_offload_and_prefetch(pair, make):
    ours, stock = pair
    ids, new = tokens(2, LENGTH), tokens(2, 4, seed=3)
    memory = make(ours)
    logits(ours, ids, memory)
    for layer in memory.memory_layers():
        layer.offload()
        layer.prefetch()
    expected = logits(stock, torch.cat([ids, new], 1))[:, -4:]
    torch.testing.assert_close(logits(ours, new, memory), expected, rtol=1e-4, atol=1e-4)


def test_early_initialization(pair, make):
    ours, stock = pair
    memory = make(ours)
    memory.early_initialization(2, 2, 8, torch.float32, "cpu")
    ids = tokens(2, LENGTH)
    torch.testing.assert_close(logits(ours, ids, memory), logits(stock, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(ROOMY))
def test_what_is_observed_changes_nothing(models, name):
    """Where there is room for all; padded, in chunks and in steps."""
    pads = left_padded(2, LENGTH, [19, 0])
    got, expected = both(models["llama"], ROOMY[name], *pads, prefill_chunk_size=17)
    assert torch.equal(got, expected)
    whole = longwave.cache(models["llama"][0], name, 1.0)
    ids = tokens(1, LENGTH)
    torch.testing.assert_close(
        logits(models["llama"][0], ids, whole), logits(models["llama"][1], ids), rtol=1e-4, atol=1e-4
    )
    assert not next(whole.memory_layers()).dense.columns
