"""Learned sinks take their share of attention, whatever a method holds and however it answers."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import longwave
from longwave.decode import StaticDecoder
from longwave.decode.steps import supports
from longwave.frame import Needs, observing
from longwave.methods import selecting
from tests.conftest import into
from tests.matrix import IDENTITY, LOSSY
from tests.models.checks import build, close, logits, tokens
from tests.models.table import ROWS


@pytest.fixture(scope="module")
def model():
    return build(next(row for row in ROWS if row.kind == "gpt_oss"))


@pytest.fixture(scope="module")
def full():
    """Without sliding layers."""
    row = next(row for row in ROWS if row.kind == "gpt_oss")
    return build(replace(row, config=row.config | dict(layer_types=["full_attention"] * 2)))


@pytest.mark.parametrize("name", IDENTITY)
def test_with_nothing_lost_it_is_the_models_own_answer(model, name):
    ids, sizes = tokens(2, 70), (50, 1, 1, 17, 1)
    want = logits(model, DynamicCache(config=model.config), ids, sizes)
    close(logits(model, IDENTITY[name](model), ids, sizes), want)


def answers(layer, q, k, v, sinks):
    """By the definition: a token without a value, whose scores are learned, beside what the layer holds."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * layer.scaling
    scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("name", ["fourier", "kivi", "streaming", "h2o", "snapkv-pages", "fourier-paper"])
@pytest.mark.parametrize("new", [1, 70], ids=["step", "many"])
def test_what_is_held_otherwise_shares_too(model, name, new, monkeypatch):
    """A step, and as many queries as make a row's pages be unpacked: against what the layer stands for."""
    memory = LOSSY[name](model)
    (layer,) = memory.memory_layers()
    logits(model, memory, tokens(1, 120), (120,))
    seen = {}
    plain = layer._share_with_sinks

    def look(p, out):
        k, v = layer.materialize()
        shared = plain(p, out)
        seen.update(q=p.q, k=k, v=v, sinks=p.sinks, before=out, out=shared)
        return shared

    monkeypatch.setattr(layer, "_share_with_sinks", look)
    logits(model, memory, tokens(1, new), (new,))
    last = {name: seen[name][:, :, -1:] for name in ("q", "before", "out")}
    want = answers(layer, last["q"], seen["k"], seen["v"], seen["sinks"])
    torch.testing.assert_close(last["out"], want, rtol=1e-3, atol=1e-3)
    assert (last["before"] - want).abs().max() > 0.01


def test_mass_is_what_tokens_got_beside_the_sinks(model, monkeypatch):
    memory = observing(model, Needs(mass=True))
    (layer,) = memory.memory_layers()
    took, plain = [], layer._share_with_sinks

    def look(p, out):
        shared = plain(p, out)
        took.append(float((1 - torch.exp(p.sinks[:, None] - p.lse)).sum()))
        return shared

    monkeypatch.setattr(layer, "_share_with_sinks", look)
    logits(model, memory, tokens(1, 41), (30, 10, 1))
    assert float(layer.dense.column("mass").sum()) == pytest.approx(sum(took), rel=1e-4)
    assert sum(took) < 0.9 * 41 * model.config.num_attention_heads


def test_chunks_that_are_chosen_share_by_what_was_read(model, monkeypatch):
    """quest reads some of what it holds: the share is of those."""
    memory, given = LOSSY["quest"](model), []
    (layer,) = memory.memory_layers()
    layer.full = False
    read = selecting.subset_attention
    monkeypatch.setattr(selecting, "subset_attention", lambda *args: given.append(args) or read(*args))
    logits(model, memory, tokens(1, 90), (90,))
    shared, plain = [], layer._share_with_sinks
    monkeypatch.setattr(
        layer, "_share_with_sinks", lambda p, out: shared.append((p.sinks, plain(p, out))) or shared[-1][1]
    )
    logits(model, memory, tokens(1, 1), (1,))
    ((q, k, v, _, seen),), ((sinks, out),) = given, shared
    assert seen.sum() < 91 * seen.shape[1]
    for head in range(q.shape[1]):
        own, kv = slice(head, head + 1), head // (q.shape[1] // k.shape[1])
        some = seen[0, kv]
        want = answers(layer, q[:, own], k[:, kv : kv + 1, some], v[:, kv : kv + 1, some], sinks[own])
        torch.testing.assert_close(out[:, own], want, rtol=1e-4, atol=1e-4)


def test_a_row_that_is_padded_is_the_row_alone(model):
    for name in ("fourier", "quest", "longcache"):
        ids, mask = tokens(2, 94), torch.ones(2, 94, dtype=torch.long)
        ids[0, :20], mask[0, :20] = 0, 0
        got = logits(model, LOSSY[name](model), ids, (90, 1, 1, 2), mask)
        alone = logits(model, LOSSY[name](model), ids[:1, 20:], (70, 1, 1, 2))
        close(got[:1, 20:], alone)


def test_a_4d_mask_is_refused_before_anything_is_written(model):
    memory = longwave.cache(model, "dense")
    own = torch.ones(1, 1, 8, 8).tril().bool()
    own[..., 5, 2] = False
    mask = dict.fromkeys(("full_attention", "sliding_attention"), own)
    with pytest.raises(NotImplementedError, match=r"learned sinks .* pass a 2D mask"), torch.no_grad():
        model(tokens(1, 8), attention_mask=mask, **into(memory))
    assert memory.layers[1].columns == 0


def test_steps_say_that_they_do_not(full):
    memory = longwave.cache(full, "dense")
    logits(full, memory, tokens(1, 8), (8,))
    assert supports(full, memory) == "it learns attention sinks, which steps do not apply yet"
    with pytest.raises(ValueError, match="learns attention sinks"):
        StaticDecoder(full, memory, new_tokens=2)
