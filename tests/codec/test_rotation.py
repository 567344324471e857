"""The tables turn keys as the model does, back, and a gradient by the transpose."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longwave.codec.rotation import Rotation
from longwave.rotary import Rotary
from tests.conftest import SMALL, build, shape_of


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "qwen3next"])
def test_it_is_the_models_own(kind):
    model = build(kind)
    layers = shape_of(model).memory_layers
    ours, theirs = Rotation.of(model, layers), Rotary.of(model)
    modules = {module.layer_idx: module for module in theirs.turns}
    positions, x = torch.tensor([0, 5, 77, 400, 511]), torch.randn(len(layers), 5, 2, 8)
    turned = ours.rotate(x, positions)
    for row, layer in enumerate(layers):
        expected = theirs.rotate(modules[layer], x[row].transpose(0, 1)[None], positions[None])[0].transpose(0, 1)
        assert float((turned[row] - expected).abs().max()) < 2e-6
    assert float((ours.unrotate(turned, positions) - x).abs().max()) < 2e-6


def test_frequencies_are_the_models_to_the_last_bit():
    model = build("llama")
    found = Rotation.of(model, (0,)).frequency[0]
    assert torch.equal(found[:4].abs(), model.model.rotary_emb.inv_freq)
    assert torch.equal(found[:4], -found[4:])


def test_an_attention_scaling_is_found_and_a_gradient_is_the_transpose():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=1, rope_parameters=rope)).eval()
    rotation = Rotation.of(model, (0,))
    assert float(rotation.scale[0, 0]) == pytest.approx(model.model.rotary_emb.attention_scaling, rel=1e-6)
    assert float(rotation.scale[0, 0]) > 1.1
    x, positions = torch.randn(1, 9, 2, 8, dtype=torch.float64, requires_grad=True), torch.arange(9) * 7
    g = torch.randn_like(x)
    (expected,) = torch.autograd.grad((rotation.rotate(x, positions) * g).sum(), x)
    assert torch.allclose(rotation.gradient(g, positions), expected, atol=1e-12)


def test_learned_positions_are_refused_with_the_reason():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=64)).eval()
    with pytest.raises(NotImplementedError, match="learned positions"):
        Rotation.of(model, (0,))
