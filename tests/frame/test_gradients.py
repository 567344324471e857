"""Nobody's backward pass goes through a cache unnoticed."""

import copy

import pytest
import torch

import longwave
from longwave.frame import cache_argument
from tests.conftest import tokens
from tests.explicit import Explicit

METHODS = ["dense", Explicit(keep=0.0, segment=8, sinks=2, window=8), "h2o"]


@pytest.mark.parametrize("method", METHODS, ids=["dense", "pages", "h2o"])
def test_a_backward_pass_is_refused(llama, method):
    memory = longwave.cache(llama, method)
    embedded = llama.get_input_embeddings()(tokens(1, 40)).detach().requires_grad_()
    for part in (embedded[:, :30], embedded[:, 30:]):  # a prompt, and a chunk over what is stored
        logits = llama(inputs_embeds=part, **cache_argument(llama, memory), use_cache=True).logits
        with pytest.raises(RuntimeError, match=r"keeps no gradients.*leave the cache out"):
            torch.autograd.grad(logits.sum(), embedded, retain_graph=True)
    assert memory.get_seq_length() == 40  # reading itself goes on


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_whatever_alone_is_trained(llama, trained):
    model = copy.deepcopy(llama).requires_grad_(False)
    weight = getattr(model.model.layers[1].self_attn, trained).weight.requires_grad_()
    out = model(tokens(1, 12), **cache_argument(model, longwave.cache(model, "dense")), use_cache=True).logits
    with pytest.raises(RuntimeError, match="keeps no gradients"):
        torch.autograd.grad(out.sum(), weight)


def test_what_does_not_go_through_the_cache_has_its_gradient(llama):
    """The output head, say, is trained beside it."""
    memory, head = longwave.cache(llama, "dense"), llama.lm_head.weight
    given = dict(use_cache=True, output_hidden_states=True)
    hidden = llama(tokens(1, 12), **cache_argument(llama, memory), **given).hidden_states[-1].detach()
    assert torch.autograd.grad((hidden @ head.mT).sum(), head)[0].abs().sum() > 0
