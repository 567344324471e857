"""attention_matching: what a layer answers with biases and fitted values, against loops over what it holds."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import longwave
from longwave.evals.fork import fork, prefill
from longwave.frame import Needs
from longwave.ops import match
from tests.conftest import ask, build, left_padded, tokens
from tests.methods.naive import SCALE, G, H, draw, drive
from tests.methods.test_evicting import new_layer, run
from tests.reading import read, read_in

SMALL = dict(sinks=2, window=7, queries=20, stride=2)


@dataclass(frozen=True)
class Often(longwave.AttentionMatching):
    every: ClassVar[int] = 8


def answered(q, layer):
    """Answers [H * G, n, D] of q [H * G, n, D], the last n tokens, over what the layer holds, its biases added."""
    k, v = (x[0] for x in layer.dense.view())
    bias, n, out = layer.dense.column("bias")[0].to(k.dtype), q.shape[1], torch.zeros_like(q)
    for h in range(H * G):
        for i in range(n):
            seen = k.shape[1] - n + 1 + i
            scores = SCALE * k[h // G, :seen] @ q[h, i] + bias[h // G, :seen]
            out[h, i] = scores.softmax(-1) @ v[h // G, :seen]
    return out


@pytest.mark.parametrize("sizes", [(60, 1, 1, 5, 1), (30, 20, 1, 9, 8)], ids=["steps", "chunks"])
@pytest.mark.parametrize("later", [True, False])
def test_biases_are_added_to_scores(sizes, later):
    """In chunks and steps; the choice itself leaves keys alone."""
    k, v, q = draw(1, 68, seed=2)
    layer, start = new_layer(Often(later=later, **SMALL)), 0
    real = layer.settle
    for size in sizes:
        asked, want = q[0, :, start : start + size], []
        layer.settle = lambda asked=asked, want=want: (want.append(answered(asked, layer)), real())  # written by then
        (out,) = drive(layer, k, v, q, [size], start=start)
        torch.testing.assert_close(out[0], want[0], rtol=0, atol=1e-9)
        start += size
    places = layer.dense.column("position")[0].long()
    for head in range(H):
        assert torch.equal(layer.dense.view()[0][0, head], k[0, head, places[head]])
    assert layer.dense.column("bias").count_nonzero() > 4
    middle = slice(2, layer.dense.longest - 7)
    assert not layer.dense.column("bias")[:, :, :2].any()  # sinks and window are as they were
    assert not layer.dense.column("bias")[:, :, middle.stop :].any()
    assert torch.equal(layer.dense.view()[1][0, :, -7:], v[0, :, -7:])


def test_what_is_fitted_is_what_match_says():
    """Of the prompt's queries as they are, in the layer's own row and head."""
    k, v, q = draw(2, 60)
    method = Often(later=False, **SMALL)
    layer = run(new_layer(method), k, v, q, [60])
    asked = q[:, :, 21::2]  # the last 20 of every second token
    for row in range(2):
        for head in range(H):
            one = asked[row, head * G : (head + 1) * G].flatten(0, 1)
            held = layer.dense.column("position")[row, head].long()
            middle = (torch.arange(60) >= 2) & (torch.arange(60) < 53)
            chosen = torch.zeros(60, dtype=torch.bool).index_fill(0, held, True) & middle
            worth = match.shares(one, k[row, head], torch.zeros(60).double(), SCALE).square().mean(0).sqrt()
            assert worth[chosen].min() >= worth[middle & ~chosen].max()
            values, bias = match.match(one, k[row, head], v[row, head], worth * 0, SCALE, middle, chosen, method.ridge)
            torch.testing.assert_close(layer.dense.view()[1][row, head], values[held])
            torch.testing.assert_close(layer.dense.column("bias")[row, head], bias[held].float())


def test_it_answers_better_than_the_same_keys_alone():
    k, v, q = draw(1, 90, sharp=1.0)
    layer = run(new_layer(Often(later=False, sinks=2, window=7, queries=40, stride=1), budget=0.4), k, v, q, [90])
    want = (q[0].unflatten(0, (H, G)) @ k[0, :, None].mT * SCALE).softmax(-1) @ v[0, :, None]
    held, (keys, values) = layer.dense.column("position")[0].long(), (x[0] for x in layer.dense.view())
    plain = torch.stack([v[0, head, held[head]] for head in range(H)])
    errors = []
    for own, bias in ((values, layer.dense.column("bias")[0].double()), (plain, torch.zeros(held.shape).double())):
        scores = q[0].unflatten(0, (H, G)) @ keys[:, None].mT * SCALE + bias[:, None, None]
        errors.append(((scores.softmax(-1) @ own[:, None] - want)[:, :, 50:]).square().mean())
    assert errors[0] < 0.5 * errors[1]


def test_queries_are_turned_to_later_positions(llama):
    """Those that a layer remembers, by the model's own rotation; turned otherwise, other tokens stay."""
    ids = tokens(1, 90)
    later, near = (longwave.cache(llama, Often(later=choice, **SMALL), budget=0.3) for choice in (True, False))
    for memory in (later, near):
        read(llama, memory, ids)
    first, other = (next(memory.memory_layers()) for memory in (later, near))
    assert torch.equal(first.queries.q, other.queries.q)
    assert not torch.equal(first.dense.column("position"), other.dense.column("position"))
    assert later.method.needs.shifts
    assert not near.method.needs.shifts


def test_bytes_of_the_bias_count(llama):
    """The budget buys fewer tokens for it, and the cache holds what was promised."""
    method = longwave.AttentionMatching(sinks=2, window=8, queries=16)
    bound = longwave.cache(llama, method, budget=0.3).method
    token = 2 * 8 * 4
    assert bound.shares == (0.3 * token / (token + 4 + 4),) * 3  # position and bias
    memory = longwave.cache(llama, method, budget=0.3)
    read(llama, memory, tokens(2, 150))
    assert memory.nbytes == memory.method.nbytes(150, 2)


def test_where_all_stay_nothing_is_fitted(llama):
    memory = longwave.cache(llama, "attention_matching", budget=1.0)
    assert memory.method.needs == Needs()
    read(llama, memory, tokens(1, 90))
    assert not next(memory.memory_layers()).dense.columns


def test_16_bits_round_no_bias():
    """A large bias in 16 bits: as in float32, up to what K and V lose."""
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build("llama", dtype)
        memory, ids = longwave.cache(model, longwave.AttentionMatching(sinks=2, window=8), budget=0.3), tokens(1, 60)
        read(model, memory, ids)
        layer = next(memory.memory_layers())
        k, v, q = (x.to(torch.bfloat16).to(dtype) for x in draw(1, 30, dtype=torch.float32))
        layer.dense.k, layer.dense.v = k[:, :, :30].clone(), v[:, :, :30].clone()
        layer.dense.columns = {name: torch.zeros(1, 2, 30) for name in layer.dense.columns}
        layer.dense.columns["bias"][:] = torch.linspace(-3.01, 7.77, 30)
        layer.dense.lengths = [30]
        outs.append(ask(layer, q[:, :4, -3:], SCALE).float())
    torch.testing.assert_close(*outs, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_steps_of_a_padded_batch_are_those_of_its_rows(name):
    model = build(name, torch.float64)
    ids, mask = left_padded(2, 90, [0, 21])
    memory = longwave.cache(model, Often(**SMALL), budget=0.3)
    got = read_in(model, memory, ids, (60, *(1,) * 20, 10), mask)
    alone = longwave.cache(model, Often(**SMALL), budget=0.3)
    want = read_in(model, alone, ids[1:, 21:], (39, *(1,) * 20, 10))
    torch.testing.assert_close(got[1:, 21:], want, rtol=1e-6, atol=1e-6)


def test_a_fork_has_the_same_biases(llama):
    ids = tokens(2, 60)
    one, two = (longwave.cache(llama, Often(**SMALL), budget=0.3) for _ in range(2))
    read(llama, one, ids)
    fork(prefill(llama, ids, needs=longwave.SnapKV().needs() | two.method.needs), two)
    for ours, theirs in zip(two.memory_layers(), one.memory_layers(), strict=True):
        torch.testing.assert_close(ours.dense.column("bias"), theirs.dense.column("bias"))


def test_options_are_checked():
    for options, message in (
        (dict(queries=0), "queries is a whole number of tokens"),
        (dict(stride=0), "stride is a whole number of tokens"),
        (dict(later=1), "later is True or False"),
        (dict(ridge=0), "ridge is a weight from 1e-6"),
        (dict(ridge=True), "ridge is a weight"),
        (dict(store="kivi"), "leave store out"),
        (dict(positions="slots"), 'positions="true"'),
    ):
        with pytest.raises(ValueError, match=message):
            longwave.AttentionMatching(**options)
