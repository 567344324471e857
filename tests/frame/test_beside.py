"""Layers that attend and keep a recurrent state: the memory is any method's, the state transformers' own."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

import longwave
from longwave.evals.fork import fork, prefill
from longwave.frame import storage_bytes
from longwave.frame.beside import Beside
from tests.conftest import into
from tests.matrix import LOSSY
from tests.models.checks import build, close, logits, tokens
from tests.models.table import ROWS


@pytest.fixture(scope="module")
def falcon():
    return build(next(row for row in ROWS if row.kind == "falcon_h1"))


@pytest.fixture(params=["fourier", "streaming", "h2o"])
def memory(request, falcon):
    return LOSSY[request.param](falcon)


def states(memory):
    return [tensor for layer in memory.layers for tensor in layer._state_tensors()]


def test_any_method_lies_beside_the_state(falcon, memory):
    assert all(isinstance(layer, Beside) for layer in memory.layers)
    bound = memory.method
    assert all(isinstance(layer, type(bound.layer(index))) for index, layer in enumerate(memory.layers))
    logits(falcon, memory, tokens(2, 90), (80, 1, 9))
    assert 0 < memory.layers[0].dense.longest < 90
    stock = DynamicCache(config=falcon.config)
    logits(falcon, stock, tokens(2, 90), (80, 1, 9))
    assert [x.shape for x in states(memory)] == [
        x.shape for layer in stock.layers for kind in (layer.conv_states, layer.recurrent_states) for x in kind.values()
    ]


def test_the_states_bytes_are_counted_on_both_sides(falcon, memory):
    logits(falcon, memory, tokens(2, 80), (80,))
    report = memory.report()
    assert report.parts["other layers"] == storage_bytes(states(memory)) > 0
    assert report.nbytes - report.parts["other layers"] == memory.method.nbytes(80, 2)
    plain = 2 * 2 * 80 * memory.method.shape.token_bytes
    assert report.dense_nbytes == plain + report.parts["other layers"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_copies_go_on_alike_and_apart(falcon, memory, again):
    ids = tokens(1, 90)
    logits(falcon, memory, ids[:, :80], (80,))
    twin = again(memory)
    want = logits(falcon, twin, ids[:, 80:], (1, 1))
    assert torch.equal(logits(falcon, memory, ids[:, 80:], (1, 1)), want)


def test_reset_forgets_the_state_too(falcon, memory):
    fresh = copy.deepcopy(memory)
    logits(falcon, memory, tokens(2, 80), (80,))
    memory.reset()
    assert not states(memory)
    ids = tokens(1, 60)
    assert torch.equal(logits(falcon, memory, ids, (58, 1, 1)), logits(falcon, fresh, ids, (58, 1, 1)))


def test_rows_are_chosen_with_their_state(falcon, memory):
    ids = tokens(3, 62)
    logits(falcon, memory, ids[:, :60], (60,))
    alone = copy.deepcopy(memory)
    memory.batch_select_indices(torch.tensor([2, 0]))
    want = logits(falcon, alone, ids[:, 60:], (1, 1))[[2, 0]]
    close(logits(falcon, memory, ids[[2, 0], 60:], (1, 1)), want)


def test_beams(falcon):
    options = dict(num_beams=3, max_new_tokens=12, do_sample=False, pad_token_id=0)
    got = falcon.generate(tokens(1, 30), **into(longwave.cache(falcon, "dense")), **options)
    assert torch.equal(got, falcon.generate(tokens(1, 30), **options))


def test_a_crop_is_refused_whole(falcon):
    memory, ids = longwave.cache(falcon, "dense"), tokens(1, 50)
    logits(falcon, memory, ids[:, :40], (40,))
    twin = copy.deepcopy(memory)
    with pytest.raises(ValueError, match=r"last 3 tokens: the recurrent state of layer 0 does not go back.*deepcopy"):
        memory.crop(-3)
    memory.crop(0)
    assert torch.equal(logits(falcon, memory, ids[:, 40:], (1, 1)), logits(falcon, twin, ids[:, 40:], (1, 1)))


def test_sizes_are_refused_since_nobody_says_how_large_a_state_is(falcon):
    with pytest.raises(NotImplementedError, match="give the budget as a fraction"):
        longwave.cache(falcon, "dense", "1MB")


def test_a_refusal_after_a_state_has_moved_on_marks_the_cache(falcon):
    """The state is written before the layer's attention can say no."""
    for kind in ("falcon_h1", "qwen3_next"):
        model = falcon if kind == "falcon_h1" else build(next(row for row in ROWS if row.kind == kind))
        memory = longwave.cache(model, "dense")
        logits(model, memory, tokens(1, 20), (20,))
        for layer in memory.memory_layers():
            layer.max_tokens = 22
        with pytest.raises(ValueError, match="for 22 tokens and 25 were given"):
            logits(model, memory, tokens(1, 5), (5,))
        with pytest.raises(ValueError, match=r"call cache.reset\(\)"):
            logits(model, memory, tokens(1, 1), (1,))


def test_a_fork_takes_the_state_along(falcon, memory):
    ids = tokens(1, 93)
    own = copy.deepcopy(memory)
    want = logits(falcon, own, ids, (90, 1, 2))[:, 90:]
    dense = prefill(falcon, ids[:, :90], needs=memory.method.needs)
    fork(dense, memory)
    close(logits(falcon, memory, ids[:, 90:], (1, 2)), want)
    assert not {x.data_ptr() for x in states(memory)} & {x.data_ptr() for x in states(dense)}
