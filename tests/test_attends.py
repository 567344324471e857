"""What attention does with the K and V that its cache gives back is found in its source."""

import re

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longwave.attends import source_of, told, why_not


class Attention(nn.Module):
    """As transformers writes it."""

    layer_idx = 0
    flag, sinks, gain, bias = False, None, None, None
    config = None

    def forward(self, hidden, cache=None, **kwargs):
        k, v = hidden, hidden
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attend(
            self, hidden, k, v, None, dropout=0.0, s_aux=self.sinks, gain=self.gain, position_bias=self.bias, **kwargs
        )


class Inherits(Attention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class ByName(Attention):
    def forward(self, hidden, cache, layer_idx):
        keys, values = cache.update(hidden, hidden, layer_idx)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](self, query=hidden, key=keys, value=values, attention_mask=None)


class Branches(Attention):
    def forward(self, hidden, cache):
        k, v = cache.update(hidden, hidden, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if self.flag and hidden.ndim == 3:
            k = torch.cat([k, k])
        elif not self.flag or self.sinks is not None:
            return attend(self, hidden, k, v, None)
        return attend(self, hidden, k, v, None)


class EitherWay(Attention):
    def forward(self, hidden, cache):
        k, v = cache.update(hidden, hidden, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if hidden.ndim == 2:
            out = attend(self, hidden, k, v, None)
        elif hidden.ndim == 3:
            return attend(self, hidden, k, v, None)
        else:
            out = attend(self, hidden, k, v, None, scaling=2)
        return out


class Shares(Attention):
    def forward(self, hidden, cache, shared):
        k, v = cache.update(hidden, hidden, self.layer_idx)
        shared[self.layer_idx] = k, v
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(self, hidden, k, v, None)


class Reads(Attention):
    def forward(self, hidden, cache, seen):
        k, v = cache.update(hidden, hidden, self.layer_idx)
        seen[self.layer_idx] = k.shape[2]
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(self, hidden, k, v, None)


class Changes(Attention):
    def forward(self, hidden, cache):
        k, v = cache.update(hidden, hidden, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(self, hidden, key=k * 2, value=v)


class Twice(Attention):
    def forward(self, hidden, cache):
        k, v = cache.update(hidden, hidden, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(self, hidden, k, v, None)[0] - attend(self, -hidden, k, v, None)[0]


class OneOfThem(Attention):
    def forward(self, hidden, cache):
        k, _ = cache.update(hidden, hidden, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(self, hidden, k, hidden, None)


class Whole(Attention):
    def forward(self, hidden, cache):
        both = cache.update(hidden, hidden, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(self, hidden, *both, None)


class ByItself(Attention):
    def forward(self, hidden, cache):
        k, v = cache.update(hidden, hidden, self.layer_idx)
        return torch.softmax(hidden @ k.mT, -1) @ v


class Latent(Attention):
    kv_lora_rank = 4

    def forward(self, hidden, cache):
        k, v = cache.update(hidden, hidden, self.layer_idx)
        k, v = self.expand(k, v)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(self, hidden, k, v, None)


class CrossAttention(Attention):
    pass


class Stateless(nn.Module):
    def forward(self, hidden, seen):
        seen.update(hidden=hidden)
        return hidden


def module(kind, **attributes):
    made = kind()
    made.__dict__.update(attributes)
    return made


@pytest.mark.parametrize("kind", [Attention, Inherits, ByName, Branches, EitherWay, Shares])
def test_k_and_v_that_go_whole_to_attention(kind):
    assert why_not(module(kind)) is None


@pytest.mark.parametrize(
    ("kind", "attributes", "why"),
    [
        (Attention, dict(bias=torch.zeros(2)), "adds a position bias to attention"),
        (Attention, dict(gain=2.0), "tells attention 'gain', which a longwave cache does not know"),
        (Branches, dict(flag=True), "works with K and V itself .* \\(.*k.*\\)"),
        (Reads, {}, r"works with K and V itself .* \(k.shape\)"),
        (Changes, {}, r"works with K and V itself .* \(k \* 2\)"),
        (Twice, {}, "attends to the same K and V more than once"),
        (OneOfThem, {}, "works with K and V itself"),
        (Whole, {}, "works with K and V itself"),
        (ByItself, {}, "does not call attention through transformers' AttentionInterface"),
        (Latent, {}, r"stores latents.*\(MLA\)"),
        (CrossAttention, {}, "cross-attention"),
        (Attention, dict(is_cross_attention=True), "cross-attention"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_anything_else_is_a_reason(kind, attributes, why):
    assert re.search(why, why_not(module(kind, **attributes)))


def test_learned_sinks_are_told_and_honoured():
    assert not told(module(Attention), "s_aux")
    sunk = module(Attention, sinks=nn.Parameter(torch.zeros(2)))
    assert told(sunk, "s_aux")
    assert why_not(sunk) is None


def test_a_module_that_stores_nothing_has_no_source():
    assert source_of(Stateless()) is None
    assert source_of(nn.Linear(1, 1)) is None
