"""Whose K and V: the same through dtypes, quantisation and wrappers, another's where the weights that make them are."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from longwave.plan.fingerprint import EIGHT_BITS, FEWER_BITS, TOLERANCE, digest, fingerprint, same
from tests.conftest import SMALL, build

LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def own(model):
    return fingerprint(model, LAYERS)


def test_it_is_of_what_makes_k_and_v(own):
    assert list(own) == [f"{layer}.{side}_proj" for layer in LAYERS for side in "kv"]
    assert all(len(numbers) == 17 and numbers[-1] == TOLERANCE for numbers in own.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_type_is_the_same(own, dtype):
    found = fingerprint(build("llama", dtype), LAYERS)
    assert same(found, own)
    assert same(own, found)


@pytest.mark.parametrize("side", ["k_proj", "v_proj"])
@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_merged_into_one_of_them_shows(model, own, side, layer):
    other = copy.deepcopy(model)
    weight = getattr(other.model.layers[layer].self_attn, side).weight
    g = torch.Generator().manual_seed(1)
    low = torch.randn(weight.shape[0], 1, generator=g) @ torch.randn(1, weight.shape[1], generator=g)
    weight.data += 0.05 * low * weight.norm() / low.norm()
    assert not same(fingerprint(other, LAYERS), own)


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_what_makes_neither_does_not_matter(model, own, name):
    other = copy.deepcopy(model)
    getattr(other.model.layers[1].self_attn, name).weight.data *= 3
    other.model.layers[1].mlp.up_proj.weight.data *= 3
    assert same(fingerprint(other, LAYERS), own)


def test_a_large_bias_hides_nothing():
    def biased(seed):
        torch.manual_seed(seed)
        made = build("llama")
        for layer in made.model.layers:
            linear = layer.self_attn.k_proj
            linear.bias = nn.Parameter(torch.full((linear.out_features,), 1000.0))
            linear.weight.data += 0.02 * seed * torch.randn(linear.weight.shape) * linear.weight.abs().mean()
        return fingerprint(made, LAYERS)

    assert not same(biased(1), biased(0))


class Rounded(nn.Linear):
    """Weights in so many bits, as quantised modules hold them: integers that torch cannot multiply by."""

    def __init__(self, plain, bits):
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.most = 2 ** (bits - 1) - 1
        self.scale = plain.weight.detach().abs().amax(1, keepdim=True) / self.most
        codes = (plain.weight.detach() / self.scale).round()
        kind = torch.int8 if bits == 8 else torch.uint8
        self.weight = nn.Parameter((codes + (0 if bits == 8 else self.most)).to(kind), requires_grad=False)

    def forward(self, x):
        codes = self.weight.to(x.dtype) - (0 if self.weight.dtype == torch.int8 else self.most)
        return x @ (codes * self.scale.to(x.dtype)).T


class Adapted(nn.Module):
    """A low-rank adapter over a module, as PEFT wraps it."""

    def __init__(self, base, size):
        super().__init__()
        self.base_layer, self.in_features, self.size = base, base.in_features, size

    def forward(self, x):
        made = self.base_layer(x)
        return made + self.size * made.norm() * torch.linspace(-1, 1, made.shape[-1]) * x[:, :1] / made.shape[-1]


def wrapped(model, wrap):
    made = copy.deepcopy(model)
    for layer in made.model.layers:
        for name in ("k_proj", "v_proj"):
            setattr(layer.self_attn, name, wrap(getattr(layer.self_attn, name)))
    return made


@pytest.mark.parametrize(("bits", "allowed"), [(8, EIGHT_BITS), (4, FEWER_BITS)])
def test_quantised_weights_are_the_same_within_what_rounding_does(model, own, bits, allowed):
    found = fingerprint(wrapped(model, lambda plain: Rounded(plain, bits)), LAYERS)
    assert {numbers[-1] for numbers in found.values()} == {allowed}
    assert same(found, own)
    strangers = fingerprint(wrapped(model, lambda plain: Rounded(nn.Linear(32, 16), bits)), LAYERS)
    assert not same(strangers, own)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_an_adapter_shows_where_it_is_on(model, own, bits):
    def base(plain):
        return plain if bits is None else Rounded(plain, bits)

    assert same(fingerprint(wrapped(model, lambda plain: Adapted(base(plain), 0.0)), LAYERS), own)
    assert not same(fingerprint(wrapped(model, lambda plain: Adapted(base(plain), 0.5)), LAYERS), own)


@pytest.mark.parametrize(
    "other",
    [
        Phi3ForCausalLM(Phi3Config(**{**SMALL, "num_hidden_layers": 2})),
        GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)),
    ],
    ids=["one projection for all", "transposed weights"],
)
def test_projections_of_other_names(other):
    found = fingerprint(other.eval(), (0, 1))
    assert len(found) == 2
    again = copy.deepcopy(other)
    assert same(fingerprint(again, (0, 1)), found)
    for name, parameter in again.named_parameters():
        if "c_attn.weight" in name or "qkv" in name:
            parameter.data[:, -1] *= 3
    assert not same(fingerprint(again, (0, 1)), found)


def test_digests_name_files(own):
    assert len(digest(own)) == 12
    assert digest(own) != digest({**own, "0.k_proj": [0.0] * 17})
    assert not same({}, {})
