"""Steps of models whose sliding layers keep a window: token for token as transformers' own loop, and the same cache."""

import copy

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, Qwen2Config, Qwen2ForCausalLM

import longwave
from longwave.decode import StaticDecoder, supports
from longwave.decode.sliding import SlidingStep
from tests.conftest import SMALL, build, into, left_padded, random_profile, tokens

WINDOW, NEW = 16, 40


@pytest.fixture(scope="module")
def gemma():
    return build("gemma3")


@pytest.fixture(scope="module")
def qwen():
    """Grouped queries, full layers first, and a bias on K."""
    torch.manual_seed(2)
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = Qwen2Config(**SMALL, num_hidden_layers=3, use_sliding_window=True, sliding_window=12, layer_types=kinds)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data *= 8
    return model.eval()


def make(model, method):
    if method == "dense":
        return longwave.cache(model, "dense")
    options = longwave.Fourier(segment=8, sinks=2, window=8)
    return longwave.cache(model, options, 0.4, random_profile(model))


def held(memory):
    """Everything every layer holds, and how many tokens transformers' layers think they saw."""
    found = []
    for layer in memory.layers:
        if hasattr(layer, "cumulative_length"):
            found += [layer.keys, layer.values, torch.tensor(layer.cumulative_length)]
        else:
            found += list(layer.materialize())
    return found


@pytest.mark.parametrize("method", ["dense", "fourier"])
@pytest.mark.parametrize("prompt", [6, 15, 16, 17, 50], ids="prompt {}".format)
@pytest.mark.parametrize("kind", ["gemma", "qwen"])
def test_steps_give_what_generate_gives(request, kind, method, prompt):
    """Windows that fill in the middle of the steps, that are just full, and that went round before."""
    model, options = request.getfixturevalue(kind), dict(max_new_tokens=NEW, do_sample=False)
    plain, stepped = make(model, method), make(model, method)
    expected = model.generate(tokens(2, prompt), **into(plain), **options)
    found = longwave.generate(model, tokens(2, prompt), **into(stepped), **options)
    assert torch.equal(found, expected)
    for ours, theirs in zip(held(stepped), held(plain), strict=True):
        near = torch.isclose(ours, theirs, rtol=3e-3, atol=1e-4)
        assert near.float().mean() > 0.995  # but for a code that another rounding tips over
    # and it goes on as if nothing had been
    more = torch.cat([expected, tokens(2, 9, seed=5)], 1)
    options = dict(attention_mask=torch.ones_like(more), max_new_tokens=6, do_sample=False)
    again = [model.generate(more, **into(memory), **options) for memory in (plain, stepped)]
    assert torch.equal(*again)


@pytest.mark.parametrize("kind", ["gemma", "qwen"])
def test_padded_rows_are_those_alone(request, kind):
    model, pads = request.getfixturevalue(kind), [0, 5, 14]
    ids, mask = left_padded(3, 20, pads)
    memory = make(model, "fourier")
    options = dict(max_new_tokens=NEW, do_sample=False)
    out = longwave.generate(model, ids, attention_mask=mask, **into(memory), **options)
    for row, pad in enumerate(pads):
        alone = model.generate(ids[row : row + 1, pad:], **into(make(model, "fourier")), **options)
        assert torch.equal(out[row, 20:], alone[0, 20 - pad :])


def test_bytes_are_those_of_the_ring_while_it_is_held(gemma):
    memory = make(gemma, "dense")
    with torch.no_grad():
        gemma(tokens(1, 50), **into(memory))
    before = memory.report().others
    with StaticDecoder(gemma, memory, new_tokens=10) as decoder:
        for _ in range(10):
            decoder.step(torch.tensor([5]))
        rings = [layer for layer in decoder._cache.layers if isinstance(layer, SlidingStep)]
        assert len(rings) == 5
        for ring in rings:
            assert ring.keys.shape[2] == WINDOW
            assert ring.layer.keys is ring.keys
        counters = 5 * 8
        assert memory.report().others - counters == (before - counters) // 15 * 16  # of 15 columns
    assert memory.report().others == before
    assert memory.get_seq_length() == 60


def test_a_decoder_that_fails_leaves_a_cache_to_reset(gemma, monkeypatch):
    memory = make(gemma, "dense")
    with torch.no_grad():
        gemma(tokens(1, 30), **into(memory))
    decoder = StaticDecoder(gemma, memory, new_tokens=4)
    decoder.step(torch.tensor([5]))
    monkeypatch.setattr(SlidingStep, "release", lambda self, steps: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.finish()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"cache\.reset\(\)"):
        gemma(tokens(1, 3), **into(memory))
    memory.reset()
    gemma.generate(tokens(1, 30), **into(memory), max_new_tokens=2, do_sample=False)


def test_what_cannot_be_stepped_says_so(gemma):
    chunked = Llama4ForCausalLM(
        Llama4TextConfig(
            **SMALL,
            num_hidden_layers=2,
            layer_types=["chunked_attention", "full_attention"],
            attention_chunk_size=16,
            num_local_experts=2,
            intermediate_size_mlp=32,
        )
    ).eval()
    assert "chunked_attention" in supports(chunked, longwave.cache(chunked, "dense"))
    memory = make(gemma, "dense")
    gap = torch.ones(1, 30, dtype=torch.long)
    gap[0, 10:13] = 0
    with torch.no_grad():
        gemma(tokens(1, 30), attention_mask=gap, position_ids=(gap.cumsum(-1) - 1), **into(memory))
    assert "padding between their tokens" in supports(gemma, memory)
    memory = make(gemma, "dense")
    memory.activate_past_recording()
    assert "records its past" in supports(gemma, memory)


def test_a_copy_of_a_cache_steps_alone(gemma):
    memory = make(gemma, "fourier")
    with torch.no_grad():
        gemma(tokens(1, 40), **into(memory))
    other = copy.deepcopy(memory)
    answers = []
    for one in (memory, other):
        with StaticDecoder(gemma, one, new_tokens=5) as decoder:
            answers.append([decoder.step(torch.tensor([i + 3])).clone() for i in range(5)])
    for ours, theirs in zip(*answers, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturing a graph needs CUDA")
@pytest.mark.parametrize("prompt", [6, 50])
def test_a_captured_graph_steps_sliding_layers(prompt):
    model = build("gemma3").cuda()
    options = dict(max_new_tokens=NEW, do_sample=False)
    expected = model.generate(tokens(2, prompt).cuda(), **into(make(model, "fourier")), **options)
    memory = make(model, "fourier")
    assert torch.equal(
        longwave.generate(model, tokens(2, prompt).cuda(), **into(memory), graph=True, **options), expected
    )
