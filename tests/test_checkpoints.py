import json

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen2Tokenizer

import longwave
from longwave import models
from longwave.checkpoints import DREAM_CONTEXT
from tests.conftest import into, tokens
from tests.diffusion.checkpoints import DREAM, LLADA, forward, write

KINDS = {"llada": (LLADA, LlamaForCausalLM), "dream": (DREAM, Qwen2ForCausalLM)}


def dream_tokenizer():
    """Of Dream's kind: vocab.json and merges.txt, and a class of its own in tokenizer_config.json."""
    vocabulary = {chr(code): code - 32 for code in range(33, 127)} | {"<|endoftext|>": 95, "Ġ": 96}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="module", params=list(KINDS))
def checkpoint(request, tokenizer, tmp_path_factory):
    """(folder, what its config says, its weights, the stock class)"""
    said, kind = KINDS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    held = write(path, said, tokenizer if request.param == "llada" else dream_tokenizer())
    return path, said, held, kind


def test_the_stock_class_computes_what_the_checkpoint_means(checkpoint):
    path, said, held, kind = checkpoint
    model, _ = longwave.load(path, dtype=torch.float64)  # stock classes take norms and angles in float32 nevertheless
    assert type(model) is kind
    assert not model.training
    ids = tokens(2, 40)
    expected = forward(said, held, ids)
    with torch.no_grad():
        assert (model(ids).logits - expected).abs().max() < 1e-6
    assert expected.abs().max() > 1


def test_the_independent_forward_sees_ahead(checkpoint):
    _, said, held, _ = checkpoint
    ids = tokens(1, 12)
    other = ids.clone()
    other[0, -1] += 1
    assert (forward(said, held, ids) - forward(said, held, other))[0, 0].abs().max() > 1e-3


def test_a_dense_cache_changes_nothing(checkpoint):
    path, said, held, _ = checkpoint
    model, _ = longwave.load(path, dtype=torch.float64)
    ids = tokens(2, 40)
    cache = longwave.cache(model, "dense")
    with torch.no_grad():
        logits = model(ids, **into(cache)).logits
    assert (logits - forward(said, held, ids)).abs().max() < 1e-6
    assert cache.get_seq_length() == 40


def test_padding_on_the_left_is_not_there(checkpoint):
    path, said, held, _ = checkpoint
    model, _ = longwave.load(path, dtype=torch.float64)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert (logits[0, 7:] - forward(said, held, ids[:1, 7:])[0]).abs().max() < 1e-6
    assert (logits[1] - forward(said, held, ids[1:])[0]).abs().max() < 1e-6


def test_what_a_sampler_has_to_know_is_in_the_config(checkpoint):
    path, said, _, _ = checkpoint
    model, tokenizer = longwave.load(path)
    config = model.config
    assert config.is_causal is False
    assert config.mask_token_id == 95
    assert config.logit_shift is (said is DREAM)
    assert config.eos_token_id == 94
    assert config.max_position_embeddings == (DREAM_CONTEXT if said is DREAM else 512)
    assert config.rope_parameters["rope_theta"] == said["rope_theta"]
    assert tokenizer.padding_side == "left"


def test_saved_it_is_a_stock_checkpoint(checkpoint, tmp_path):
    path, said, _, kind = checkpoint
    model, tokenizer = longwave.load(path, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, about = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    assert again.config.is_causal is False
    assert (again.config.mask_token_id, again.config.logit_shift) == (95, said is DREAM)
    ids = tokens(1, 16)
    with torch.no_grad():
        assert torch.equal(longwave.load(tmp_path, dtype=torch.float32)[0](ids).logits, model(ids).logits)


def test_code_beside_the_weights_never_runs_and_nobody_is_asked(checkpoint, capsys):
    path, *_ = checkpoint
    longwave.load(path)
    longwave.load(path, trust_remote_code=True)
    assert "custom code" not in "".join(capsys.readouterr())


def test_a_shard_that_is_not_there(checkpoint, tmp_path):
    path, *_ = checkpoint
    for file in path.iterdir():
        if not file.name.startswith("model-00002"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OSError):
        longwave.load(tmp_path)


def test_weights_that_are_missing_are_named(tokenizer, tmp_path):
    write(tmp_path, LLADA, tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({**LLADA, "n_layers": 4}))
    with pytest.raises(OSError, match=r"lacks 9 of its weights, such as model\.layers\.3"):
        longwave.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi": True}, "alibi=True"),
        ({"block_type": "sequential"}, "block_type='sequential'"),
        ({"include_bias": True}, "include_bias=True"),
    ],
)
def test_a_llada_that_no_llama_is(change, message, tokenizer, tmp_path):
    write(tmp_path, LLADA, tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({**LLADA, **change}))
    with pytest.raises(ValueError, match=message):
        longwave.load(tmp_path)


def test_the_published_factors_follow_from_the_configs():
    """length_extension: LongLLaDA's for LLaDA and Dream, and beside them those of distances of both signs, which the
    message says of models that see both."""
    from longwave.checkpoints import dream_config, llada_config
    from longwave.rotary import extend

    large = {**LLADA, "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "max_sequence_length": 4096}
    dream = {**DREAM, "hidden_size": 3584, "num_attention_heads": 28}
    for read, said, published in (
        (llada_config, large, {8192: (4, 4), 16384: (14, 13), 24576: (31, 27), 32768: (55, 45)}),
        (dream_config, dream, {4096: (5, 3)}),
    ):
        for target, (factor, both_signs) in published.items():
            config, other, causal = read(said), read(said), read(said)
            base = config.rope_parameters["rope_theta"]
            done = extend(config, target, "ntk")
            assert config.rope_parameters["rope_theta"] == factor * base
            assert f"x {factor}, x {both_signs} by ntk_both_signs, as this model" in str(done)
            extend(other, target, "ntk_both_signs")
            assert other.rope_parameters["rope_theta"] == both_signs * base
            causal.is_causal = True
            assert str(extend(causal, target, "ntk")).endswith(f"x {factor}")


def test_the_skeleton_of_a_command_is_a_stock_model(checkpoint):
    path, _, _, kind = checkpoint
    assert type(models.skeleton(models.load_config(path), torch.float32)) is kind
