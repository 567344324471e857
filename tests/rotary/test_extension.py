"""Tables beyond the trained length: transformers' own where it has them, ours by their formulas, and what follows."""

import copy
import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPTJConfig, GPTJForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import longwave
from longwave.plan.fingerprint import digest, fingerprint, same
from longwave.rotary import RULES, Rotary, extend
from longwave.rotary.extension import MARK
from longwave.shape import context_limit
from tests.conftest import SMALL, build, into, tokens
from tests.reading import read

TRAINED, TARGET, FAR, BASE, PAIRS = 512, 2048, 16384, 10_000.0, 4
OPTIONS = {"giraffe_power": {"exponent": 0.5}}
STAY = [rule for rule in RULES if rule != "dynamic"]


def extended(kind, rule, tokens=TARGET, **options):
    model = build(kind)
    extend(model, tokens, rule, **{**OPTIONS.get(rule, {}), **options})
    return model


def frequencies(model):
    return model.model.rotary_emb.inv_freq


def plain(base=BASE, pairs=PAIRS):
    return base ** (-torch.arange(pairs) / pairs)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("rule", RULES)
def test_as_if_the_model_was_built_so(kind, rule):
    """A model that is there, its config alone, and the model from its saved config are one."""
    model = extended(kind, rule, FAR)
    config = build(kind).config
    extend(config, FAR, rule, **OPTIONS.get(rule, {}))
    assert config.rope_parameters == model.config.rope_parameters
    assert context_limit(model) == context_limit(config) == FAR
    twin = type(model)(config)
    twin.load_state_dict(model.state_dict())
    ids = tokens(1, TRAINED + 40)
    with torch.no_grad():
        got = model(ids).logits
        assert torch.equal(got, twin.eval()(ids).logits)
        assert not torch.allclose(got, build(kind)(ids).logits, atol=1e-3)


def test_the_base_of_each_ntk():
    assert extended("llama", "ntk").config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": BASE * longwave.rotary.ntk_factor(BASE, 8, TRAINED, TARGET),
    }
    fixed = frequencies(extended("llama", "ntk_fixed"))
    assert fixed[0] == 1
    assert torch.isclose(fixed[-1], plain()[-1] * TRAINED / TARGET)  # the slowest is stretched as by interpolation


def test_a_base_that_reaches_the_target_stays():
    """By the law a base of a million turns its critical pair in 6,283 tokens."""
    model, before = build("gemma3"), build("gemma3")
    assert str(extend(model, 4096)) == "512 trained tokens extended to 4,096 by ntk: rotary base 1,000,000 x 1"
    assert model.config.rope_parameters == before.config.rope_parameters
    assert context_limit(model) == 4096


def test_transformers_functions_answer():
    factor = TARGET / TRAINED
    assert torch.allclose(frequencies(extended("llama", "linear")), plain() / factor)
    yarn = extended("llama", "yarn")
    assert yarn.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1)
    assert torch.equal(frequencies(yarn), ROPE_INIT_FUNCTIONS["yarn"](yarn.config)[0])
    low, high = math.floor(0.5), math.ceil(8 * math.log(TRAINED / (2 * math.pi)) / (2 * math.log(BASE)))
    kept = 1 - ((torch.arange(PAIRS) - low) / (high - low)).clamp(0, 1)
    assert torch.allclose(frequencies(yarn), plain() * (kept + (1 - kept) / factor))
    sharp = extended("llama", "yarn", beta_fast=64.0, attention_factor=1.0)
    assert sharp.model.rotary_emb.attention_scaling == 1
    dynamic = extended("llama", "dynamic")
    assert torch.allclose(frequencies(dynamic), plain())  # until a longer text comes
    with torch.no_grad():
        dynamic(tokens(1, 2 * TRAINED))
    base = BASE * (factor * 2 - (factor - 1)) ** (8 / 6)
    assert torch.allclose(frequencies(dynamic), plain(base))


def test_giraffes_bases():
    assert torch.allclose(
        frequencies(extended("llama", "giraffe_power", exponent=0.5)),
        plain() * torch.tensor([1, 0.75, 0.5, 0.25]).sqrt(),
    )
    least = 2 * math.pi / 40  # 0.157; of 1, 0.1, 0.01 and 0.001 the second becomes 0.01 and the others 0
    expected = torch.tensor([1.0, least / 16, 0.0, 0.0])
    assert torch.allclose(frequencies(extended("llama", "giraffe_truncated", context=40)), expected)
    least = 2 * math.pi / TRAINED  # 0.0123: what turned within the trained length stays
    expected = torch.tensor([1.0, 0.1, least / 16, 0.0])
    assert torch.allclose(frequencies(extended("llama", "giraffe_truncated")), expected)


def test_layers_with_a_window_stay_as_they_are():
    model, before = extended("gemma3", "linear"), build("gemma3")
    assert model.config.rope_parameters["sliding_attention"] == before.config.rope_parameters["sliding_attention"]
    ours, theirs = model.model.rotary_emb, before.model.rotary_emb
    assert torch.equal(ours.sliding_attention_inv_freq, theirs.sliding_attention_inv_freq)
    assert torch.allclose(ours.full_attention_inv_freq, theirs.full_attention_inv_freq / 4)


@pytest.mark.parametrize("rule", STAY)
def test_keys_are_turned_back_by_the_new_tables(rule):
    model = extended("llama", rule)
    rotary = Rotary.of(model)
    module = next(iter(rotary.turns))
    x, positions = torch.randn(1, 2, 5, 8), torch.tensor([[0, 3, 600, 1999, 20]])
    turned = rotary.rotate(module, x, positions)
    assert torch.allclose(rotary.unrotate(module, turned, positions), x, atol=1e-5)
    cos, _ = rotary.tables(module, positions)
    scale = model.model.rotary_emb.attention_scaling
    expected = (positions[..., None] * frequencies(model)).cos().repeat(1, 1, 2) * scale
    assert torch.allclose(cos, expected, atol=1e-5)


@pytest.mark.parametrize("rule", STAY)
@pytest.mark.parametrize(
    "method", ["dense", longwave.Streaming(tokens=4096, positions="slots")], ids=["dense", "slots"]
)
def test_a_cache_follows(rule, method):
    """Prompt and steps beyond the trained length, keys stored rotated and not, as stock's own cache has them."""
    model = extended("llama", rule)
    stock, ids = copy.deepcopy(model), tokens(1, TRAINED + 30)
    given = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    got = model.generate(ids, **into(longwave.cache(model, method)), **given)
    assert torch.equal(got, stock.generate(ids, **given))


def test_a_table_that_changes_with_every_token_is_refused_beyond_the_trained_length():
    model = extended("llama", "dynamic")
    memory = longwave.cache(model, "dense")
    read(model, memory, tokens(1, TRAINED - 1))
    read(model, memory, tokens(1, TRAINED))
    with pytest.raises(ValueError, match=r"beyond 512 tokens.*\(dynamic\), and the cache holds 512 already.*\"ntk\""):
        read(model, memory, tokens(1, TRAINED + 1))
    memory.reset()
    read(model, memory, tokens(1, TRAINED + 9))  # one pass, one table
    with pytest.raises(ValueError, match="the cache holds 521 already"):
        read(model, memory, tokens(1, TRAINED + 10))
    with pytest.raises(NotImplementedError, match=r'changes with the length .rope_type "dynamic"'):
        longwave.cache(model, longwave.Streaming(tokens=100, positions="slots"))


@pytest.mark.parametrize("rule", ["ntk", "giraffe_power"])
def test_saved_and_loaded(folder, tmp_path, rule, caplog):
    with caplog.at_level(logging.INFO, logger="longwave"):
        if rule == "ntk":
            model, tokenizer = longwave.load(folder, dtype=torch.float32, extend_to=TARGET)
            assert "512 trained tokens extended to 2,048 by ntk: rotary base 10,000 x 11" in caplog.text
        else:
            model, tokenizer = longwave.load(folder, dtype=torch.float32)
            longwave.extend(model, TARGET, rule, exponent=0.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ROPE_INIT_FUNCTIONS.pop(rule, None)  # as in another process
    again, _ = longwave.load(tmp_path, dtype=torch.float32)
    assert torch.equal(frequencies(again), frequencies(model))
    assert getattr(again.config, MARK) == {"rule": rule, "trained": TRAINED, "tokens": TARGET}
    assert same(fingerprint(again, (0, 1, 2)), fingerprint(model, (0, 1, 2)))


def test_a_profile_of_a_plain_model_is_none_of_an_extended_one():
    before = build("llama")
    found = [fingerprint(m, (0, 1, 2)) for m in (before, extended("llama", "ntk"), extended("llama", "ntk", 4096))]
    assert len({digest(one) for one in found}) == 3
    assert not any(same(one, other) for one in found for other in found if one is not other)
    assert same(found[1], fingerprint(extended("llama", "ntk"), (0, 1, 2)))


def test_a_saved_cache_of_a_plain_model_is_none_of_an_extended_one(tmp_path):
    model = build("llama")
    memory, ids = longwave.cache(model, "dense"), tokens(1, 20)
    read(model, memory, ids)
    longwave.save(memory, ids, tmp_path / "kept", exact=True)
    other = extended("llama", "yarn")
    with pytest.raises(longwave.SavedCacheError, match="rope_parameters"):
        longwave.restore(other, tmp_path / "kept")


def test_the_length_that_a_config_overstates():
    """Dream's names 131,072 tokens and was trained on 2,048."""
    model = build("llama")
    assert extend(model, 300, trained=100).trained == 100
    assert context_limit(model) == 300


def test_a_rule_without_a_length_is_refused(folder):
    with pytest.raises(ValueError, match=r"the rule 'yarn' says how.*give extend_to"):
        longwave.load(folder, rule="yarn")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(tokens=2048, rule="nkt"), "unknown rule 'nkt'; did you mean 'ntk'"),
        (
            dict(tokens=512),
            "extend_to is a whole number of tokens: this model reads 512 as it is, at least 513; got 512",
        ),
        (dict(tokens=2048, beta=3), "ntk has no option 'beta'; it has none"),
        (dict(tokens=2048, rule="yarn", beta_fst=3), "did you mean 'beta_fast'"),
        (dict(tokens=2048, rule="giraffe_power"), "takes an exponent above 0.*got None"),
        (dict(tokens=2048, rule="giraffe_truncated", context=0.5), "context is a whole number of tokens"),
        (dict(tokens=2048, trained=3), "trained is a whole number of tokens"),
    ],
)
def test_what_does_not_fit_is_said_and_changes_nothing(given, message):
    model = build("llama")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        extend(model, **given)
    assert model.config.to_dict() == before.config.to_dict()
    assert torch.equal(frequencies(model), frequencies(before))


def test_models_without_plain_tables_are_refused():
    twice = extended("llama", "ntk")
    already = build("llama").config
    already.rope_parameters = {"rope_type": "linear", "rope_theta": BASE, "factor": 2.0}
    pinned = build("llama")
    pinned.model.rotary_emb.config = copy.deepcopy(pinned.config)
    small = dict(n_embd=32, n_layer=1, n_head=4, vocab_size=97)
    for model, reason in (
        (twice, "extended already, from 512 to 2,048 tokens: load it anew"),
        (already, 'of rope_type "linear"'),
        (pinned, "no rotary module that goes by its config"),
        (BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=97)), "no rope_parameters"),
        (GPTJForCausalLM(GPTJConfig(**small, rotary_dim=4)), "no rope_parameters"),
    ):
        with pytest.raises(NotImplementedError, match=f"cannot be extended: .*{reason}"):
            extend(model, 4096)


def test_channels_that_are_not_turned_do_not_count():
    """A quarter of GPT-NeoX's head: the law and the tables are of those that turn."""
    from transformers import GPTNeoXConfig

    sizes = {
        name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    }
    config = GPTNeoXConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    model = AutoModelForCausalLM.from_config(config)
    extend(model, TARGET, "giraffe_power", exponent=1.0)
    assert torch.allclose(model.gpt_neox.rotary_emb.inv_freq, plain() * torch.tensor([1, 0.75, 0.5, 0.25]))
