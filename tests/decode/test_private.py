"""What transformers may take away, being its own: each is missed before a prompt is read, and named."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

import longwave
from longwave.decode import StaticDecoder, Unsupported, supports
from tests.conftest import build, into, tokens
from tests.matrix import LOSSY

generating = importlib.import_module("longwave.decode.generate")  # longwave.decode.generate is its function
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


@pytest.fixture
def model():
    return build("llama")


def check_refused(model, says):
    memory = LOSSY["kivi"](model)
    with pytest.raises(Unsupported, match=f"longwave.generate cannot do this: {says}.*model.generate works"):
        longwave.generate(model, tokens(1, 40), **into(memory), max_new_tokens=4)
    assert memory.get_seq_length() == 0


@pytest.mark.parametrize("name", generating.PRIVATE)
def test_a_method_that_is_gone(model, monkeypatch, name):
    monkeypatch.delattr(GenerationMixin, name)
    check_refused(model, rf"transformers [0-9.a-z]+ has no LlamaForCausalLM.{name} as its loop needs it")


@pytest.mark.parametrize("name", generating.PRIVATE)
def test_a_method_that_is_called_otherwise(model, monkeypatch, name):
    monkeypatch.setattr(GenerationMixin, name, lambda self, *, everything: None)
    check_refused(model, rf"transformers .* has no LlamaForCausalLM.{name} as")


@pytest.mark.parametrize("name", ["_mask_length", "_pad_token_tensor"])
def test_a_note_in_the_config_that_is_gone(model, monkeypatch, name):
    """transformers would read it itself, so it goes on the way to our loop."""
    loop = generating._loop

    def without(*args):
        config = next(one for one in args if isinstance(one, GenerationConfig))
        if not hasattr(config, name):
            pytest.skip("this transformers writes no such note, and drops no mask")
        delattr(config, name)
        return loop(*args)

    monkeypatch.setattr(generating, "_loop", without)
    check_refused(model, f"transformers .* has no GenerationConfig.{name} as its loop needs it")


def test_a_mask_that_is_not_dropped_needs_no_note(model, monkeypatch):
    """transformers 5.17 writes none."""
    loop, ids = generating._loop, tokens(2, 40)

    def without(*args):
        config, inputs = args[4], args[-1]
        vars(config).pop("_mask_length", None)
        inputs["attention_mask"] = torch.ones_like(ids)
        return loop(*args)

    want = longwave.generate(model, ids, **into(LOSSY["kivi"](model)), max_new_tokens=9, do_sample=False)
    monkeypatch.setattr(generating, "_loop", without)
    got = longwave.generate(model, ids, **into(LOSSY["kivi"](model)), max_new_tokens=9, do_sample=False)
    assert torch.equal(got, want)


def test_positions_that_nobody_prepares(model, monkeypatch):
    loop = generating._loop
    monkeypatch.setattr(generating, "_loop", lambda *args: args[-1].pop("position_ids") is None or loop(*args))
    check_refused(model, "generate prepares no position_ids")


def test_an_implementation_that_is_not_written_down(model):
    memory = LOSSY["kivi"](model)
    del model.config._attn_implementation_internal
    assert not hasattr(model.config, "_attn_implementation")
    assert 'attends by "None"' in supports(model, memory)
    with pytest.raises(Unsupported):
        StaticDecoder(model, memory, new_tokens=1)


def test_no_other_private_names_are_used():
    """A new one needs a guard, and a test here."""
    known = {*generating.PRIVATE, "_mask_length", "_pad_token_tensor", "_attn_implementation"}
    folder = Path(generating.__file__).parent
    for path in folder.glob("*.py"):
        text = path.read_text()
        used = set(re.findall(r"\b(?:model|config|layer|module|m|cache)\.(_[a-z][a-z_]*)", text))
        own = {"_progress"}  # of LongCache
        assert used - own <= known, path.name
