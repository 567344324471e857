"""streaming: sinks and window. In slots, against a Llama written out by hand whose keys are rotated by their place."""

import pytest
import torch

import longwave
from tests.conftest import into, left_padded, tokens
from tests.methods.naive import InSlots

SMALL = dict(sinks=2, window=7)
SLOTS = longwave.Streaming(tokens=20, positions="slots", **SMALL)


def by_hand(model):
    return InSlots(model, lambda held: held if len(held) <= 20 else held[:2] + held[-18:])


COMINGS = {"prompt": [60], "steps": [1] * 60, "chunks": [30, 1, 1, 9, 1, 18], "within": [20]}


@pytest.mark.parametrize("coming", list(COMINGS))
def test_slots_equal_the_model_by_hand(llama, coming):
    hand, memory, ids, start = by_hand(llama), longwave.cache(llama, SLOTS), tokens(1, 60), 0
    with torch.no_grad():
        for size in COMINGS[coming]:
            part = ids[:, start : start + size]
            got = llama(part, **into(memory)).logits[0]
            torch.testing.assert_close(got.double(), hand.read(part[0]), rtol=0, atol=1e-4)
            start += size
            for layer, heads in zip(memory.memory_layers(), hand.held, strict=True):
                places = [[token.place for token in held] for held in heads]
                assert layer.dense.column("position")[0].tolist() == places
    assert hand.longest <= max(COMINGS[coming]) + SLOTS.tokens


def test_slots_outlive_the_trained_length(llama):
    """720 tokens on a model of 512: no place is ever beyond the budget and what is new."""
    assert llama.config.max_position_embeddings == 512
    hand, memory, ids = by_hand(llama), longwave.cache(llama, SLOTS), tokens(1, 720)
    sizes, start = [*[100] * 7, *[1] * 20], 0
    with torch.no_grad():
        for size in sizes:
            part = ids[:, start : start + size]
            got = llama(part, **into(memory)).logits[0]
            torch.testing.assert_close(got.double(), hand.read(part[0]), rtol=0, atol=1e-4)
            start += size
    assert hand.longest == SLOTS.tokens + 100
    assert memory.layers[0].dense.column("position").max() == 719  # the column keeps the true ones


def test_slots_are_not_the_true_positions(llama):
    ids, answers = tokens(1, 90), []
    for positions in ("true", "slots"):
        memory = longwave.cache(llama, longwave.Streaming(tokens=20, positions=positions, **SMALL))
        with torch.no_grad():
            llama(ids[:, :80], **into(memory))
            answers.append(llama(ids[:, 80:], **into(memory)).logits[0, -1])
    assert (answers[0] - answers[1]).abs().max() > 1e-2


def test_slots_shift_all_alike_while_nothing_was_evicted(llama):
    """Where places are positions, turning keys back and forth changes nothing."""
    ids, memory = tokens(2, 60), longwave.cache(llama, longwave.Streaming(tokens=200, positions="slots", **SMALL))
    with torch.no_grad():
        got = [llama(ids[:, a:b], **into(memory)).logits for a, b in ((0, 40), (40, 41), (41, 60))]
    expected = llama(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-4)


def test_slots_count_the_real_tokens_of_a_padded_row(llama):
    pads = [0, 25]
    ids, mask = left_padded(2, 60, pads)
    memory = longwave.cache(llama, SLOTS)
    new = tokens(2, 5, seed=4)
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        llama(ids, attention_mask=mask, position_ids=places, **into(memory))
        whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
        places = (whole.cumsum(-1) - 1)[:, -5:]
        got = llama(new, attention_mask=whole, position_ids=places, **into(memory)).logits
    for row, pad in enumerate(pads):
        hand = by_hand(llama)
        hand.read(ids[row, pad:])
        torch.testing.assert_close(got[row].double(), hand.read(new[row]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_slots_on_other_models(models, name):
    """Normalised keys, and layers with tables of their own: while nothing is evicted it is the model's own answer."""
    model, ids = models[name][0], tokens(2, 50)
    memory = longwave.cache(model, longwave.Streaming(tokens=100, positions="slots", **SMALL))
    with torch.no_grad():
        got = [model(ids[:, a:b], **into(memory)).logits for a, b in ((0, 40), (40, 50))]
    torch.testing.assert_close(torch.cat(got, 1), model(ids, use_cache=False).logits, rtol=0, atol=1e-4)


def test_the_same_tokens_stay_in_every_head_and_layer(llama):
    memory = longwave.cache(llama, longwave.Streaming(tokens=20, **SMALL))
    with torch.no_grad():
        llama(tokens(2, 100), **into(memory))
    expected = torch.tensor([0, 1, *range(82, 100)], dtype=torch.int32)
    for layer in memory.memory_layers():
        assert torch.equal(layer.dense.column("position"), expected.expand(2, 2, -1))


def test_it_costs_what_it_keeps_however_long_it_runs(llama):
    memory, held = longwave.cache(llama, SLOTS), set()
    with torch.no_grad():
        for i in range(6):
            llama(tokens(1, 50, seed=i), **into(memory))
            held.add(memory.nbytes)
    assert held == {memory.method.nbytes(300)} == {memory.method.nbytes(10**6)}


def test_what_it_says_of_itself(llama):
    assert str(longwave.cache(llama, SLOTS).method) == "streaming(20 tokens, sinks=2, window=7, slots)"
    half = longwave.cache(llama, longwave.Streaming(**SMALL), 0.5).method
    assert str(half) == "streaming(0.471 of the middle, sinks=2, window=7)"  # 64 of 68 bytes are K and V
