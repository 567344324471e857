"""What models call their cache."""

import warnings

import pytest
import torch

import longwave
from longwave.frame import cache_argument, cache_name
from longwave.frame.argument import NAMES
from tests.conftest import tokens


class Old(torch.nn.Module):
    def forward(self, input_ids, past_key_values=None): ...


class New(torch.nn.Module):
    def forward(self, input_ids, cache=None, **kwargs): ...


class Wrapper(torch.nn.Module):
    def forward(self, *args, **kwargs): ...


def test_the_signature_decides(llama):
    assert cache_name(Old()) == "past_key_values"
    assert cache_name(New()) == "cache"
    assert cache_argument(New(), None) == {"cache": None}
    assert cache_name(Wrapper()) == cache_name(llama)  # says nothing: as this transformers has it


@pytest.mark.parametrize("name", NAMES)
def test_longwave_generate_takes_both_and_nothing_warns(llama, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        memory = longwave.cache(llama, "dense")
        ids = longwave.generate(llama, tokens(1, 9), **{name: memory}, max_new_tokens=3, do_sample=False)
    assert (ids.shape[1], memory.get_seq_length()) == (12, 11)
