"""Small random models that look in both directions: of LLaDA's kind and of Dream's."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.conftest import SMALL

MASK, END = 96, 95
BOTH = {**SMALL, "is_causal": False, "mask_token_id": MASK, "eos_token_id": None}


def build(kind):
    torch.manual_seed(3)
    if kind == "llada":
        model = LlamaForCausalLM(LlamaConfig(**BOTH, num_hidden_layers=3, logit_shift=False))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**BOTH, num_hidden_layers=2, logit_shift=True))
    for name, parameter in model.named_parameters():  # at the usual scale a random model repeats one token
        if "proj" in name and "bias" not in name:
            parameter.data *= 14
    model.lm_head.weight.data *= 20  # and is as unsure of each token as of any other
    model.model.embed_tokens.weight.data[MASK] *= 0.1  # what is around a mask says more than that it is one
    return model.eval()


@pytest.fixture(scope="session")
def made():
    return {kind: build(kind) for kind in ("llada", "dream")}


@pytest.fixture(params=["llada", "dream"])
def both(request, made):
    return copy.deepcopy(made[request.param])


@pytest.fixture
def llada(made):
    return copy.deepcopy(made["llada"])


@pytest.fixture
def dream(made):
    return copy.deepcopy(made["dream"])
