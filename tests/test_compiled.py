"""Steps through torch.compile, its backend being "eager": what is cut into graphs, and what happens where it fails."""

import pytest
import torch
from torch._dynamo.utils import counters

import longwave
from longwave import compiled
from longwave.decode import StaticDecoder, Unsupported
from tests.conftest import left_padded, tokens
from tests.test_decode import check_same, filled, fourier

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()


def answer(model, memory, compile, pads=(0, 3)):
    ids, mask = left_padded(len(pads), 40, pads)
    return longwave.generate(
        model, ids, attention_mask=mask, past_key_values=memory, max_new_tokens=30, do_sample=False, compile=compile
    )


def test_compiled_steps_give_the_same_tokens_and_cache(llama):
    plain, fused = fourier(llama), fourier(llama)
    want = answer(llama, plain, compile=False)
    assert not counters["stats"]
    assert torch.equal(answer(llama, fused, compile=True), want)
    check_same(fused, plain)
    assert all(layer._compiled_call_impl is None for layer in llama.model.layers)  # other passes are as they were


def test_all_layers_and_decoders_share_the_graphs(llama):
    answer(llama, fourier(llama), compile=True)
    graphs = counters["stats"]["unique_graphs"]
    assert 3 <= graphs <= 6 < 2 * len(llama.model.layers) * 4
    answer(llama, fourier(llama), compile=True)
    assert counters["stats"]["unique_graphs"] == graphs


def test_what_cannot_be_compiled_says_how_to_go_on(llama, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", fails)
    says = r"a step of LlamaForCausalLM could not be compiled \(.*no compiler here.*\). compile=False"
    memory = filled(llama)
    with StaticDecoder(llama, memory, new_tokens=3, compile=True) as decoder, pytest.raises(Unsupported, match=says):
        decoder.step(tokens(1, 1))
    check_same(memory, filled(llama))
    assert all(layer._compiled_call_impl is None for layer in llama.model.layers)


def test_too_many_kinds_of_layers_are_an_error(llama, monkeypatch):
    monkeypatch.setitem(compiled.CONFIG, "recompile_limit", 1)
    memory = fourier(llama)
    with pytest.raises(Unsupported, match="could not be compiled"):
        answer(llama, memory, compile=True)


def test_a_model_without_marked_layers_is_refused_before_the_prompt_is_read(llama, monkeypatch):
    monkeypatch.setattr(compiled, "GradientCheckpointingLayer", int)
    memory = fourier(llama)
    with pytest.raises(Unsupported, match="transformers marks no layers in LlamaForCausalLM"):
        answer(llama, memory, compile=True)
    assert memory.get_seq_length() == 0
