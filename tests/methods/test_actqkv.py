"""actqkv: what a query weighs, which blocks are read by it, and that what is taken back has taught nothing."""

import copy
from dataclasses import replace

import pytest
import torch

import longwave
from tests.conftest import shape_of, tokens
from tests.methods import naive
from tests.methods.naive import D, G, H, draw
from tests.methods.test_infllm import SMALL, check_steps, mean_keys, oracle
from tests.methods.test_longcache import COMINGS, Turning, answers, drive, new_layer, stretches
from tests.reading import read_in

METHOD = longwave.ActQKV(**SMALL, warm=3)


def far_features(method, q, a, b):
    """[b - a, H * G * D]: the queries of tokens a to b, turned to where they see blocks from."""
    turned = Turning()._by(q[None, :, a:b], torch.full((1, b - a), method.window - 1))
    return turned[0].transpose(0, 1).flatten(1)


def probe_of(method, x, known):
    """Of queries x [n, features], by the stretches that are known."""
    if len(known) < method.warm:
        return x.mean(0)
    weight = torch.ones(len(known), dtype=x.dtype)
    for i in range(len(known)):  # each new one takes its part of all that was
        part = 1 / min(i + 1, method.warm)
        weight[:i] *= 1 - part
        weight[i] = part
    mean = sum(w * y.mean(0) for w, y in zip(weight, known, strict=True))
    variance = sum(w * (y - mean).square().mean(0) for w, y in zip(weight, known, strict=True))
    bias = ((x - mean).square() / (variance + variance.mean() / 100)).mean(-1)
    return (bias / bias.sum()) @ x


def twin(method, k, v, q, parts):
    """Answers [H * G, n, D] of one row whose passes bring so many tokens, and the stretches that taught something."""
    out, start, mass, known = torch.zeros_like(q), 0, [[0.0] * k.shape[1] for _ in range(H)], []
    for count in parts:
        for a, b in stretches(method, start, start + count):
            ready, x = max(0, (a - method.sinks - method.window) // method.block), far_features(method, q, a, b)
            means = mean_keys(method, k, mass, ready).repeat_interleave(G, 0).transpose(0, 1).flatten(1)
            worth = torch.cosine_similarity(means, probe_of(method, x, known)[None], dim=-1)
            blocks = sorted(sorted(range(ready), key=lambda n: -float(worth[n]))[: method.blocks])
            far = [method.sinks + n * method.block + j for n in blocks for j in range(method.block)]
            rest = range(method.sinks + ready * method.block, b)
            for i in range(a, b):
                places = [*range(min(method.sinks, i + 1)), *far, *(j for j in rest if j <= i)]
                for head in range(H * G):
                    out[head, i], p = oracle(method, k, v, q, i, head, places)
                    for j, got in zip(places, p.tolist(), strict=True):
                        mass[head // G][j] += got if i - j < method.window else 0
            if b > method.plain and b - a > 1:
                known.append(x)
        start += count
    return out, known


@pytest.mark.parametrize("coming", list(COMINGS))
@pytest.mark.parametrize("pads", [[0], [0, 11, 45]], ids=["alone", "padded"])
def test_each_row_reads_what_its_twin_reads(coming, pads):
    sizes = COMINGS[coming]
    given = draw(len(pads), sum(sizes), seed=4)
    valid = naive.coming_with(pads, sum(sizes))
    layer = new_layer(METHOD)
    found = answers(layer, *given, sizes, valid)
    for row, own, mine, parts in naive.rows_of(given, sizes, valid):
        want, known = twin(METHOD, *mine, parts)
        torch.testing.assert_close(found[row][:, own], want, rtol=0, atol=1e-6)
        assert layer.asked.lessons[row, 0] == len(known)


# what a query weighs


def learnt(stretches=3):
    """A layer that has read so many stretches beyond the window, and what it read."""
    k, v, q = draw(1, 8 + 8 * stretches, seed=6)  # stretches of 8; the first is within the window
    layer = new_layer(METHOD)
    answers(layer, k, v, q, [k.shape[2]])
    assert layer.asked.lessons[0, 0] == stretches
    return layer, q


def test_weights_are_shares_of_those_who_ask():
    layer, q = learnt()
    asks = torch.tensor([[True] * 5 + [False] * 3])
    weight = layer.weights(q[:, :, :8], asks)
    torch.testing.assert_close(weight.sum(-1), torch.ones(1, dtype=torch.float64))
    assert not weight[0, 5:].any()
    assert weight[0, :5].min() > 0
    torch.testing.assert_close(layer.weights(q[:, :, :1], asks[:, :1]), torch.ones(1, 1, dtype=torch.float64))


def test_a_query_that_stands_out_has_most_to_say():
    layer, q = learnt()
    some = q[:, :, :8].clone()
    some[:, :, 3] *= 20
    weight = layer.weights(some, torch.ones(1, 8, dtype=torch.bool))
    assert weight[0, 3] > 0.9


def test_a_feature_that_never_varied_does_not_decide_alone():
    """What it is divided by is a hundredth of the mean variance at least."""
    layer, q = learnt()
    some = q[:, :, :8].clone()
    layer.asked.variance[0, 5] = 0.0
    x, mean, variance = some[0].transpose(0, 1).flatten(1), layer.asked.mean[0], layer.asked.variance[0]
    bias = ((x - mean).square() / (variance + variance.mean() / 100)).mean(-1)
    weight = layer.weights(some, torch.ones(1, 8, dtype=torch.bool))
    torch.testing.assert_close(weight[0], bias / bias.sum())


def test_rows_that_move_take_what_they_asked_along():
    k, v, q = draw(3, 60, seed=8)
    layer = new_layer(METHOD)
    answers(layer, k, v, q, [60])
    before = layer.asked.moments
    layer.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(layer.asked.moments, before[[2, 0]])


@pytest.mark.parametrize("stretches", [2, 3])
def test_until_it_is_warm_all_weigh_alike(stretches):
    layer, q = learnt(stretches)
    weight = layer.weights(q[:, :, :8], torch.ones(1, 8, dtype=torch.bool))
    assert torch.equal(weight, torch.full_like(weight, 1 / 8)) == (stretches < METHOD.warm)


def test_of_equal_weights_it_is_infllm_by_cosines():
    layer, q = learnt(2)
    asks = torch.ones(1, 8, dtype=torch.bool)
    plain = longwave.InfLLM(**SMALL).worth(layer, q[:, :, :8], asks)
    means, probe = layer.means, q[:, :, :8].mean(2)
    length = means.square().sum((1, 3)).mul(G).sqrt() * probe.square().sum().sqrt()
    torch.testing.assert_close(METHOD.worth(layer, q[:, :, :8], asks)[length > 0], (plain / length)[length > 0])


def test_queries_that_were_all_the_same_weigh_alike():
    layer, (k, v, q) = new_layer(METHOD), draw(1, 60)
    found = answers(layer, k, v, torch.zeros_like(q), [60])
    assert torch.isfinite(found).all()
    weight = layer.weights(torch.zeros_like(q[:, :, :8]), torch.ones(1, 8, dtype=torch.bool))
    torch.testing.assert_close(weight, torch.full_like(weight, 1 / 8))


@pytest.mark.parametrize(("made", "found"), [(longwave.ActQKV, True), (longwave.InfLLM, False)])
def test_one_who_asks_for_something_else_is_heard(made, found):
    """Of eight who choose together seven ask as all did before, for a block that has nothing: one block is read."""
    method = made(**SMALL | dict(blocks=1, representatives=4))
    layer, g = new_layer(replace(method, warm=3) if found else method), torch.Generator().manual_seed(2)
    k = torch.randn(1, H, 200, D, generator=g, dtype=torch.float64) * 0.01
    q = torch.randn(1, H * G, 200, D, generator=g, dtype=torch.float64) * 0.1
    v = torch.zeros_like(k)
    usual, rare = torch.tensor([2, 6]), torch.tensor([3, 7])  # the slowest pairs of channels
    head, last = G + 1, 195  # of the second KV head; the last stretch is 192 to 199
    k[0, 1, 40, usual] = k[0, 1, 100, rare] = 30.0
    v[0, 1, 100] = 1.0
    q[0, head, :, usual] = 3.0
    q[0, head, last, usual] = 0.0
    q[0, head, last, rare] = 3.0
    out = answers(layer, k, v, q, [200])[0]
    assert (out[head, last].min() > 0.9) == found
    assert out[:G].abs().max() == 0  # the first KV head has no such value


# what teaches


def test_rows_and_layers_learn_for_themselves():
    k, v, q = draw(2, 60, seed=8)
    both, one = new_layer(METHOD), new_layer(METHOD)
    answers(both, k, v, q, [60])
    answers(one, k[1:], v[1:], q[1:], [60])
    torch.testing.assert_close(both.asked.moments[1:], one.asked.moments)
    one.reset()
    assert one.asked is None


def test_steps_teach_nothing_nor_what_lies_within_the_window():
    k, v, q = draw(1, 80)
    layer = new_layer(METHOD)
    list(drive(layer, k, v, q, [METHOD.plain]))
    assert not layer.asked.moments.any()
    list(drive(layer, k, v, q, [20], start=METHOD.plain))
    before = copy.deepcopy(layer.asked.tensors())
    list(drive(layer, k, v, q, [1, 1, 9, 16], start=METHOD.plain + 20))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.asked.tensors(), strict=True))


@pytest.mark.parametrize("count", [3, 8, 12])
def test_a_crop_takes_back_what_was_learnt(count):
    k, v, q = draw(1, 120, seed=3)
    layer, other = new_layer(METHOD), new_layer(METHOD)
    list(drive(layer, k, v, q, [61]))
    layer.crop(-count)
    whole = (61 - count) // METHOD.chunk * METHOD.chunk  # of a stretch that lost tokens the rest is forgotten too
    list(drive(other, k, v, q, [whole]))
    for mine, theirs in zip(layer.asked.tensors(), other.asked.tensors(), strict=True):
        torch.testing.assert_close(mine[:, 0], theirs[:, 0])


def test_further_back_it_is_refused():
    k, v, q = draw(1, 61)
    layer = new_layer(METHOD)
    list(drive(layer, k, v, q, [61]))
    before = copy.deepcopy(layer.asked.tensors())
    with pytest.raises(ValueError, match=r"cannot remove the last 30 tokens: .* its last two stretches alone"):
        layer.crop(-30)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.asked.tensors(), strict=True))
    layer.crop(METHOD.plain - 61)  # where nothing was learnt
    assert not layer.asked.moments.any()


# steps on the device, bytes, options


@pytest.mark.parametrize("pads", [[0, 0], [0, 25]], ids=["even", "padded"])
def test_a_step_on_the_device_reads_what_a_pass_does(pads):
    check_steps(METHOD, pads)


def test_bytes_and_words(llama):
    memory = longwave.cache(llama, METHOD)
    read_in(llama, memory, tokens(2, 200), (150, 50))
    bound = memory.method
    assert memory.nbytes == bound.nbytes(200, 2)
    infllm = longwave.InfLLM(**SMALL).bind(shape_of(llama), None, None).nbytes(200, 2)
    features = bound.shape.query_heads * bound.shape.head_dim
    assert memory.nbytes == infllm + 2 * len(memory.layers) * 3 * (2 * features * 4 + 2 * 8)
    assert str(bound) == "actqkv(reads window=13, 2 blocks of 4, sinks=2)"


def test_options():
    with pytest.raises(ValueError, match="warm is a whole number of stretches, at least 1; got 0"):
        longwave.ActQKV(**SMALL, warm=0)
    assert longwave.ActQKV().positions == 768
