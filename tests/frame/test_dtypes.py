"""The type of what is stored: the model's, or autocast's, as it was when the cache was built."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import longwave
from longwave.evals.fork import can_fork, fork, prefill
from longwave.frame import cache_argument
from tests.conftest import build, left_padded, tokens
from tests.matrix import IDENTITY, LOSSY
from tests.reading import read


def passes(model, cache, ids, mask):
    """Logits of a prompt, a chunk and two steps."""
    found = []
    for end, new in ((60, 60), (70, 10), (71, 1), (72, 1)):
        positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, -new:]
        given = {"attention_mask": mask[:, :end], "position_ids": positions, **cache_argument(model, cache)}
        found.append(model(ids[:, end - new : end], **given, use_cache=True).logits)
    found[0] = found[0] * mask[:, :60, None]
    return found


@pytest.mark.parametrize("method", IDENTITY)
@torch.no_grad()
def test_autocast(llama, method):
    """What changes nothing changes nothing under autocast: stock's logits, within what autocast itself rounds."""
    ids, mask = left_padded(2, 72, [13, 0])
    exact = passes(llama, DynamicCache(config=llama.config), ids, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memory, dynamic = IDENTITY[method](llama), DynamicCache(config=llama.config)
        ours, stock = passes(llama, memory, ids, mask), passes(llama, dynamic, ids, mask)
    for a, b, c in zip(ours, stock, exact, strict=True):
        assert (a - b).norm() <= 2 * (c - b).norm()
    # before 5.20 or so a plain cache kept what autocast left in 32 bits
    assert memory.dense_nbytes <= sum(x.nbytes for layer in dynamic.layers for x in (layer.keys, layer.values))
    assert {x.dtype for layer in memory.memory_layers() for x in layer.dense.tensors()} == {torch.bfloat16}


@pytest.mark.parametrize("method", LOSSY)
@torch.no_grad()
def test_nothing_is_compressed_in_autocasts_arithmetic(llama, method):
    """Not what waits until the next pass, not what a decoder settles between steps, not a forked cache."""
    ids = tokens(2, 72)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, forked, waits = (LOSSY[method](llama) for _ in range(3))
        if can_fork(forked):
            fork(prefill(llama, ids[:, :60], needs=own.method.needs), forked)
        else:  # it reads by itself
            read(llama, forked, ids[:, :60])
        waits.activate_past_recording()
        read(llama, own, ids[:, :60])
        read(llama, waits, ids[:, :60])
        found = [read(llama, memory, ids) for memory in (own, forked, waits)]
        waits.crop(0)
        torch.testing.assert_close(found[0], found[1], atol=2e-2, rtol=0)  # slots turn what 16 bits rounded
        reports = [memory.report() for memory in (own, forked, waits)]
        if method == "kvzip":  # which layer holds how many goes by attention, which 16 bits rounded; all hold the same
            reports = [replace(report, held=0) for report in reports]
        assert reports[0] == reports[1] == reports[2]
        if own.layers[0].unsteady() is None:
            with longwave.StaticDecoder(llama, own, new_tokens=20) as decoder:
                for token in tokens(20, 2, seed=3):
                    assert decoder.step(token).isfinite().all()
            assert own.get_seq_length() == 92


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("method", ["kivi", "fourier", "h2o", "quest"])
def test_a_type_that_changed_is_refused_and_nothing_is_taken(models, kind, method):
    model = copy.deepcopy(models[kind][0])
    memory = LOSSY[method](model)
    model.to(torch.bfloat16)
    match = "got torch.bfloat16 and its cache was built for torch.float32: build the cache once the model has"
    with pytest.raises(ValueError, match=match):
        read(model, memory, tokens(1, 30))
    model.to(torch.float32)
    read(model, memory, tokens(1, 30))  # the cache is as it was
    with pytest.raises(ValueError, match=match), torch.autocast("cpu", dtype=torch.bfloat16):
        read(model, memory, tokens(1, 31))
    assert memory.get_seq_length() == 30


def test_a_device_without_autocast(llama):
    model = copy.deepcopy(llama).to("meta")
    assert longwave.cache(model, "dense").layers[0].planned == torch.float32


def test_double_precision_has_no_autocast():
    model = build("llama", torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert longwave.cache(model, "dense").layers[0].planned == torch.float64
