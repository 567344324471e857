"""Models that drop the cache they are given, and those that rotate otherwise from some length on."""

import copy

import pytest
import torch
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

import longwave
from longwave.frame import cache_argument
from tests.conftest import SMALL, left_padded, tokens
from tests.explicit import Explicit
from tests.reading import read

SHORT = 40  # tokens; beyond them the family drops caches
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 3.0, 9.0])
PAGES = Explicit(keep=0.0, states=4, segment=8, sinks=2, window=8)


def build(kind, rotates):
    torch.manual_seed(0)
    rope = dict(rope_type="default", rope_theta=1e4)
    if rotates:
        rope = {**LONGROPE, "original_max_position_embeddings": SHORT}
        rope |= dict(short_mscale=1.0, long_mscale=1.0) if kind == "phimoe" else {}
    given = {**SMALL, "num_hidden_layers": 2, "original_max_position_embeddings": SHORT, "rope_parameters": rope}
    if kind == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**given))
    else:
        model = PhimoeForCausalLM(PhimoeConfig(**given, num_local_experts=2, num_experts_per_tok=1))
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data *= 12
    return model.eval()


@pytest.fixture(scope="module", params=["phi3", "phimoe"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def fixed(kind):
    return build(kind, False)


@pytest.fixture(scope="module")
def switching(kind):
    return build(kind, True)


def answer(model, ids, cache, mask=None):
    given = dict(attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=8, do_sample=False)
    return model.generate(ids, **given, **cache_argument(model, cache))


@pytest.mark.parametrize("length", [SHORT - 4, SHORT, SHORT + 1, SHORT + 30])
def test_the_cache_is_not_dropped(fixed, length):
    stock, ids = copy.deepcopy(fixed), tokens(2, length)
    memory = longwave.cache(fixed, "dense")
    # transformers 5.17 drops stock's own cache at the switch and goes on with one token: read all anew instead
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(answer(fixed, ids, memory), stock.generate(ids, **options))
    assert memory.get_seq_length() == length + 7
    pages = longwave.cache(fixed, PAGES)
    answer(fixed, ids, pages)
    assert pages.report().parts["pages"] > 0


def test_a_long_prompt_is_rotated_for_its_length(switching):
    stock, ids = copy.deepcopy(switching), tokens(2, SHORT + 30)
    memory = longwave.cache(switching, "dense")
    assert torch.equal(answer(switching, ids, memory), answer(stock, ids, DynamicCache(config=stock.config)))
    assert memory.get_seq_length() == SHORT + 37


@pytest.mark.parametrize("method", ["dense", PAGES], ids=["dense", "pages"])
def test_growing_beyond_the_switch_is_refused(switching, method):
    """In generate, where stock reads everything anew, and in passes, where stock mixes two rotations."""
    match = f"beyond {SHORT} tokens this model rotates all of them otherwise.*read all {SHORT + 1} in one pass"
    memory = longwave.cache(switching, method)
    with pytest.raises(ValueError, match=match):
        answer(switching, tokens(1, SHORT - 3), memory)
    assert memory.get_seq_length() == SHORT  # nothing is lost
    with pytest.raises(ValueError, match=match):
        read(switching, memory, tokens(1, SHORT + 1))
    memory.reset()
    read(switching, memory, tokens(1, SHORT + 1))
    read(switching, memory, tokens(1, SHORT + 2))


def test_and_going_back_below_it(switching):
    memory = longwave.cache(switching, "dense")
    read(switching, memory, tokens(1, SHORT + 5))
    memory.crop(-20)
    with pytest.raises(ValueError, match=f"beyond {SHORT} tokens.*the cache holds {SHORT - 15} already"):
        read(switching, memory, tokens(1, SHORT - 10))


def test_padding_does_not_count(switching):
    """The model counts positions, so a row's padding brings it no nearer."""
    ids, mask = left_padded(2, SHORT - 1, [12, 9])
    memory = longwave.cache(switching, "dense")
    assert answer(switching, ids, memory, mask).shape[1] == SHORT + 7
    assert memory.layers[0].rows == [SHORT - 1 - 12 + 7, SHORT - 1 - 9 + 7]
