import json
import math
from itertools import pairwise

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import longwave
from longwave.evals.fork import prefill
from longwave.plan.calibrate import calibrate, channel_errors, windows_of
from longwave.plan.fingerprint import fingerprint
from tests.conftest import SMALL, shape_of, tokens
from tests.explicit import Explicit

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 12  # 744 characters, as many tokens
SEGMENTS = Explicit(keep=0.5, segment=16, states=3, sinks=2, window=16)
PAPER = longwave.FourierPaper(states=8, sinks=2, window=16, reserve=32)


def dct_rows(states, length):
    rows = torch.empty(states, length, dtype=torch.float64)
    for n in range(states):
        for t in range(length):
            rows[n, t] = math.cos(math.pi * n * (2 * t + 1) / (2 * length))
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("length", [34, 128, 141])
def test_errors_are_what_the_projection_misses(llama, length):
    dense = prefill(llama, tokens(2, length))
    measured = channel_errors(dense.layers, SEGMENTS)
    rows = dct_rows(3, 16)
    for position, layer in enumerate(dense.layers):
        for errors, x in zip(measured, layer.materialize(), strict=True):
            count = (length - 2 - 16) // 16
            pieces = x[:, :, 2 : 2 + 16 * count].double().reshape(2, 2, count, 16, 8)
            missed = pieces.square().sum(3) - (rows @ pieces).square().sum(3)
            expected = missed.sum(dim=(0, 2)) / (2 * count * 16)
            assert expected.min() > 0
            torch.testing.assert_close(errors[position].double(), expected, rtol=1e-4, atol=1e-7)


def test_errors_do_not_depend_on_what_the_method_keeps(llama):
    dense = prefill(llama, tokens(1, 100))
    expected = channel_errors(dense.layers, SEGMENTS)
    bits = Explicit(keep=1.0, keep_bits=4, coef_bits=8, segment=16, states=3, sinks=2, window=16)
    for ours, theirs in zip(channel_errors(dense.layers, bits), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_errors_vanish_with_as_many_states_as_tokens(llama):
    dense = prefill(llama, tokens(1, 100))
    full = Explicit(segment=8, states=8, sinks=2, window=16)
    for errors in channel_errors(dense.layers, full):
        assert errors.max() < 1e-9


def test_errors_of_one_period(llama):
    dense = prefill(llama, tokens(2, 128))
    for errors in channel_errors(dense.layers, PAPER):
        assert errors.shape == (3, 2, 8)
        assert bool(torch.isfinite(errors).all())
        assert bool((errors >= 0).all())
        assert errors.max() > 0


@pytest.mark.parametrize(("method", "length"), [(SEGMENTS, 33), (PAPER, 26)], ids=["segments", "period"])
def test_window_too_short_to_compress_is_refused(llama, method, length):
    dense = prefill(llama, tokens(1, length))
    with pytest.raises(ValueError, match=f"window of {length} tokens is too short"):
        channel_errors(dense.layers, method)
    assert channel_errors(prefill(llama, tokens(1, length + 1)).layers, method)


def test_measuring_leaves_the_dense_cache_alone(llama):
    dense = prefill(llama, tokens(1, 100))
    before = [x.clone() for layer in dense.layers for x in layer.materialize()]
    channel_errors(dense.layers, SEGMENTS)
    after = [x for layer in dense.layers for x in layer.materialize()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# windows


def starts_of(windows, text, tokenizer):
    return [text.index(tokenizer.decode(window[0])) for window in windows]


def distinct(length):
    """Text in which every stretch of 8 characters is somewhere else."""
    return "".join(f"{number:07d}," for number in range(length // 8))


def test_windows_spread_from_the_start_to_the_end(tokenizer):
    text = distinct(800)
    windows = windows_of(tokenizer, [text], 100, 3)
    assert [tuple(window.shape) for window in windows] == [(1, 100)] * 3
    assert starts_of(windows, text, tokenizer) == [0, 350, 700]


def test_windows_are_shared_between_texts(tokenizer):
    first, second = distinct(800), "x" + distinct(400)
    windows = windows_of(tokenizer, [first, second], 100, 5)
    assert starts_of(windows[:3], first, tokenizer) == [0, 350, 700]
    assert starts_of(windows[3:], second, tokenizer) == [0, 301]


def test_windows_never_overlap(tokenizer):
    text = distinct(800)
    starts = starts_of(windows_of(tokenizer, [text], 120, 50), text, tokenizer)
    assert len(starts) == 6
    assert min(b - a for a, b in pairwise(starts)) >= 120


def test_text_of_one_window(tokenizer):
    assert len(windows_of(tokenizer, [distinct(104)], 104, 4)) == 1


def test_text_shorter_than_a_window_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"text number 2 has 96 tokens, fewer than one window of 100"):
        windows_of(tokenizer, [distinct(800), distinct(96)], 100, 4)


# the whole


def test_profile_of_a_model(llama, tokenizer):
    seen = []
    profile = calibrate(
        llama, tokenizer, [TEXT], SEGMENTS, tokens=128, windows=2, model_id="tiny", progress=lambda *n: seen.append(n)
    )
    assert profile.model == {"id": "tiny", "fingerprint": fingerprint(llama, (0, 1, 2))}
    assert profile.text["tokens"] == 256
    assert profile.text["windows"] == 2
    assert len(profile.text["sha256"]) == 64
    assert {name: profile.method[name] for name in ("segment", "states", "sinks", "window", "basis")} == {
        **{"segment": 16, "states": 3, "sinks": 2, "window": 16, "basis": "dct"}
    }
    json.dumps([profile.model, profile.method, profile.text])
    assert seen[0] == (0, 2)
    assert seen[-1] == (2, 2)
    assert profile.sensitivity is None
    memory = longwave.cache(llama, SEGMENTS, profile=profile)
    for position, (k, _) in enumerate(memory.method.kept):
        errors = profile.error("k", position)
        assert (errors[k].reshape(2, 4).amin(1) >= errors[~k].reshape(2, 4).amax(1)).all()


def test_plan_of_a_model(llama, tokenizer):
    seen: list[tuple[int, int]] = []
    method = longwave.Fourier(segment=16, sinks=2, window=16)
    options = dict(tokens=500, windows=3, scored=64, progress=lambda *n: seen.append(n))
    profile = calibrate(llama, tokenizer, [TEXT * 3], method, **options)
    assert seen[-1] == (12, 12)  # three windows, each read and then measured in three layers
    found = profile.sensitivity
    assert found.recall.tolist() == [False, True, False]
    assert profile.text["tokens"] == 1500
    for side in "kv":
        costs = found.costs(side)
        assert (costs[..., 0] > costs[..., -1]).all()  # nothing but means is worse than 4 bits
    memory = longwave.cache(llama, method, 0.3, profile)
    assert str(memory.method).startswith("fourier(measured plan for 0.3,")
    assert "expected KL" in str(memory.method)
    assert profile.k_error is None


@pytest.mark.parametrize("scored", [63, 64])
def test_windows_that_are_all_scored_are_refused(llama, tokenizer, scored):
    method = longwave.Fourier(segment=16)
    with pytest.raises(ValueError, match=f"of 64 tokens a window cannot have {scored} scored"):
        calibrate(llama, tokenizer, [TEXT], method, tokens=64, windows=1, scored=scored)


def test_errors_are_the_mean_over_windows(llama, tokenizer):
    whole = calibrate(llama, tokenizer, [TEXT], SEGMENTS, tokens=128, windows=3)
    each = [channel_errors(prefill(llama, ids).layers, SEGMENTS) for ids in windows_of(tokenizer, [TEXT], 128, 3)]
    torch.testing.assert_close(whole.k_error, sum(k for k, _ in each) / 3, rtol=5e-3, atol=0)
    torch.testing.assert_close(whole.v_error, sum(v for _, v in each) / 3, rtol=5e-3, atol=0)


@pytest.mark.parametrize("method", [SEGMENTS, PAPER], ids=["segments", "period"])
def test_measuring_twice_gives_the_same(llama, tokenizer, method):
    first, second = (calibrate(llama, tokenizer, [TEXT], method, tokens=128, windows=2) for _ in range(2))
    assert torch.equal(first.k_error, second.k_error)
    assert torch.equal(first.v_error, second.v_error)
    assert first.text == second.text


def test_other_text_has_another_fingerprint(llama, tokenizer):
    prints = {
        calibrate(llama, tokenizer, texts, SEGMENTS, tokens=64, windows=2).text["sha256"]
        for texts in ([TEXT], [TEXT + "."], [TEXT[:372], TEXT[372:]])
    }
    assert len(prints) == 3


def test_only_the_full_attention_layers_are_measured(models, tokenizer):
    model = models["gemma3"][0]
    profile = calibrate(model, tokenizer, [TEXT], SEGMENTS, tokens=128, windows=1)
    assert profile.k_error.shape == (1, 2, 8)
    profile.check(model, shape_of(model))


@pytest.mark.parametrize("texts", [[], [""], ["  \n", ""]])
def test_no_text_is_refused(llama, tokenizer, texts):
    with pytest.raises(ValueError, match="no text to measure on"):
        calibrate(llama, tokenizer, texts, SEGMENTS, tokens=64, windows=1)


def test_windows_beyond_the_context_are_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="windows of 513 tokens exceed the model's context of 512"):
        calibrate(llama, tokenizer, [TEXT], SEGMENTS, tokens=513, windows=1)


@pytest.mark.parametrize("windows", [0, -1])
def test_no_windows_are_refused(llama, tokenizer, windows):
    with pytest.raises(ValueError, match=f"1 texts need at least as many windows, got {windows}"):
        calibrate(llama, tokenizer, [TEXT], SEGMENTS, tokens=64, windows=windows)


def test_short_text_is_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="fewer than one window of 64"):
        calibrate(llama, tokenizer, ["Too short."], SEGMENTS, tokens=64, windows=1)


def test_unsupported_model_is_refused(tokenizer):
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, num_hidden_layers=2)).eval()
    with pytest.raises(NotImplementedError, match="soft-capping"):
        calibrate(capped, tokenizer, [TEXT], SEGMENTS, tokens=64, windows=1)
