"""torch.compile goes around a cache, or says why it cannot."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longwave
from longwave.frame import cache_argument
from tests.conftest import SMALL, tokens
from tests.matrix import LOSSY


@pytest.fixture
def model():
    torch.manual_seed(0)
    yield LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=1)).eval()
    torch._dynamo.reset()


def read(model, memory):
    """Logits of a prompt and a step."""
    ids, found = tokens(1, 64), []
    for start, end in ((0, 50), (50, 51)):
        with torch.no_grad():
            found.append(model(ids[:, start:end], **cache_argument(model, memory), use_cache=True).logits)
    return torch.cat(found, 1)


def test_compiled_code_goes_around_a_cache(model):
    memory = longwave.cache(model, "dense")

    def step(k, v):
        (columns, _), before = memory.get_mask_sizes(k.shape[2], 0), memory.get_seq_length()
        memory.update(k, v, 0)
        return columns + k.sum(), before

    compiled = torch.compile(step, backend="eager")
    for held in (0, 5):
        out, before = compiled(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))
        assert (out, before) == (held + 5, held)
    assert memory.layers[0].materialize()[0].shape[2] == 10


@pytest.mark.slow
def test_a_compiled_model_reads_as_the_plain_one(model):
    compiled = torch.compile(model, backend="eager")
    memories = [LOSSY["kivi"](each) for each in (model, compiled)]  # either can be given
    torch.testing.assert_close(read(compiled, memories[1]), read(model, memories[0]))
    assert memories[0].report() == memories[1].report()


def test_a_whole_graph_is_refused_in_words(model):
    memory = longwave.cache(model, "dense")
    with pytest.raises(Exception, match="a longwave cache is not compiled: leave fullgraph=True out"):
        read(torch.compile(model, backend="eager", fullgraph=True), memory)
    read(model, memory)  # nothing was taken
