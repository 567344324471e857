"""What a configuration says about bytes, and models whose shape no cache can have."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longwave
from longwave.shape import CacheShape, check_supported, holds_states, states_beside
from tests.conftest import SMALL
from tests.models.checks import build, config_of, logits, tokens
from tests.models.table import ROWS


def row(name):
    return next(row for row in ROWS if row.name.startswith(name))


def test_full_and_sliding_layers_of_different_shapes():
    """Gemma 4: full layers have one head of 16 channels here, sliding ones two of 8."""
    shape = CacheShape.of(config_of(row("Gemma 4 (26B")), torch.bfloat16)
    assert (shape.memory_layers, shape.kv_heads, shape.head_dim, shape.query_heads) == ((1,), 1, 16, 4)
    assert shape.token_bytes == 2 * 16 * 2
    assert shape.sliding_layers == ((16, 2 * 2 * 8 * 2),)


def test_values_of_another_size_count_in_sliding_layers():
    shape = CacheShape.of(config_of(row("MiMo")), torch.float32)
    assert shape.sliding_layers[0][1] % (8 + 4) == 0


@pytest.mark.parametrize("name", ["Gemma 4 (26B", "OLMo 3", "Llama 4", "Qwen2 with"])
def test_a_size_bounds_a_hybrid(name):
    model = build(row(name))
    method = longwave.Fourier(plan="safe", segment=8, sinks=2, window=8)
    shape = CacheShape.of(model.config, model.dtype)
    size = method.bind(shape, None, 0.25).peak_bytes(160, 2)
    memory = longwave.cache(model, method, f"{size}B", max_tokens=160, batch=2)
    assert memory.method.budget < 1
    end, most = 0, 0
    while end < 160:
        new = min(160 - end, 90 if not end else 7)
        logits(model, memory, tokens(2, new), (new,))
        end, most = end + new, max(most, memory.nbytes)
    assert 0.5 * size < most <= size


@pytest.mark.parametrize(
    ("name", "holds", "beside"),
    [("Llama 2", False, 0), ("OLMo 3", False, 0), ("Qwen3.5", True, 0), ("Falcon-H1", True, 2), ("Zamba2", True, 1)],
)
def test_layers_that_hold_states(name, holds, beside):
    config = config_of(row(name))
    assert holds_states(config) is holds
    assert len(states_beside(config)) == beside


@pytest.mark.parametrize("name", ["Qwen3.5", "LFM2", "Granite 4", "Falcon-H1"])
def test_a_size_is_refused_where_nobody_says_how_large_a_state_is(name):
    model = build(row(name))
    with pytest.raises(NotImplementedError, match="give the budget as a fraction"):
        longwave.cache(model, "dense", "1MB")


@pytest.mark.parametrize("name", ["streaming", "snapkv", "h2o", "quest"])
def test_heads_that_no_page_holds_are_kept_whole(name):
    """As the refusal of pages says."""
    model = build(row("OpenLLaMA"))
    memory = longwave.cache(model, name, budget=0.25, sinks=2, window=8)
    found = logits(model, memory, tokens(2, 102), (100, 1, 1))
    assert torch.isfinite(found).all()
    assert memory.layers[0].materialize()[0].shape[-1] == 12


def test_nothing_is_measured_for_pages_that_cannot_hold_the_heads(monkeypatch):
    monkeypatch.setattr("longwave.build.profile_for", lambda *args: pytest.fail("measured"))
    with pytest.raises(NotImplementedError, match="pages hold multiples of 8"):
        longwave.cache(build(row("OpenLLaMA")), "fourier", budget=0.25)


def test_full_layers_of_different_shapes_are_refused():
    model = build(row("Llama 2"))
    model.config.per_layer_config = {1: dict(num_key_value_heads=4)}
    with pytest.raises(
        NotImplementedError, match=r"different shapes \(2 heads of 8 channels and 4 heads of 8 channels"
    ):
        check_supported(model)


def test_a_config_that_says_other_numbers_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=1))
    model.config.num_key_value_heads = 4
    with pytest.raises(
        NotImplementedError, match="has 2 K and V heads of 8 channels, and its config says other numbers"
    ):
        check_supported(model)


def test_values_of_another_size_are_seen_in_the_weights():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=1))
    model.model.layers[0].self_attn.v_proj = torch.nn.Linear(32, 8)
    with pytest.raises(NotImplementedError, match="has keys of 8 channels and values of 4"):
        check_supported(model)


def test_attention_that_cannot_be_found_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=1))
    model.model.layers[0].self_attn = torch.nn.Linear(1, 1)
    with pytest.raises(NotImplementedError, match="no attention module that gives K and V to a cache"):
        check_supported(model)
