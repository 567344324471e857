"""weightedkv: the exact fractions of the specification, folding by hand, and what a prompt makes of a run."""

from fractions import Fraction

import pytest
import torch

import longwave
from longwave.methods.held import Held
from longwave.methods.weightedkv import into_the_right
from tests.methods import naive
from tests.methods.naive import SCALE, D, G, H, draw, drive
from tests.methods.test_evicting import new_layer, run

SMALL = dict(sinks=2, window=7)
# mean attention of the slots that live at each step, of the specification's worked example
STEPS = [
    *([1], [0.8, 0.5], [0.5, 0.3, 0.9], [0.4, 0.2, 0.7, 0.6], [0.3, 0.1, 0.5, 0.3, 0.5]),
    *([0.3, 0.4, 0.2, 0.3, 0.9], [0.3, 0.4, 0.2, 0.5, 0.7], [0.2, 0.4, 0.3, 0.4, 0.6]),
]


def held_of(v, weight):
    """What a layer of one row and head holds whose tokens have these mean weights."""
    n = len(weight)
    position = torch.arange(n)[None, None]
    mass = torch.tensor(weight, dtype=torch.float64) * torch.arange(n, 0, -1)
    return Held(v, v, torch.tensor([n]), {"position": position, "mass": mass[None, None]}, None, 1.0)


def test_the_worked_example_to_the_fraction():
    method, keys, v = longwave.WeightedKV(sinks=0, window=1), [], torch.zeros(1, 1, 0, 8, dtype=torch.float64)
    for t, weight in enumerate(STEPS):
        keys.append(t + 1)
        v = torch.cat([v, torch.eye(8, dtype=torch.float64)[t].view(1, 1, 1, 8)], 2)
        if len(keys) <= 4:
            continue
        held = held_of(v, weight)
        free = torch.arange(5)[None, None] < 4  # the newest has no right neighbour
        stays = method.choose(held, free, torch.tensor([3])) | ~free
        v = method.fold(held, ~stays, 1)[stays].view(1, 1, 4, 8)
        keys = [key for key, stay in zip(keys, stays[0, 0].tolist(), strict=True) if stay]
        if t == 4:  # the first of them, as the paper's text has it
            assert v[0, 0, 1, 1:3].tolist() == pytest.approx([1 / 6, 5 / 6], abs=1e-12)
    F = Fraction
    expected = [
        *([F(1, 3), F(1, 9), F(5, 9), 0, 0, 0, 0, 0], [0, 0, 0, F(4, 35), F(6, 35), F(5, 7), 0, 0]),
        *([0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1]),
    ]
    assert keys == [3, 6, 7, 8]
    want = torch.tensor([[float(x) for x in row] for row in expected], dtype=torch.float64)
    torch.testing.assert_close(v[0, 0], want, rtol=0, atol=1e-12)


def one_by_one(v, w, gone):
    """Runs folded from the right: each gone value goes into the next that stays."""
    v = [x.clone() for x in v]
    for j in range(len(v) - 1, -1, -1):
        if gone[j]:
            r = next(i for i in range(j + 1, len(v)) if not gone[i])
            v[r] = (w[j] * v[j] + w[r] * v[r]) / (w[j] + w[r])
    return torch.stack(v)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_runs_are_folded_from_the_right(share):
    g = torch.Generator().manual_seed(1)
    v, w = torch.randn(2, 3, 50, 4, generator=g, dtype=torch.float64), torch.rand(2, 3, 50, generator=g) + 1e-3
    gone = torch.rand(2, 3, 50, generator=g) < share
    gone[..., -1] = False
    got = into_the_right(v, w, gone)
    for b in range(2):
        for h in range(3):
            want = one_by_one(v[b, h], w[b, h].double(), gone[b, h].tolist())
            torch.testing.assert_close(got[b, h][~gone[b, h]], want[~gone[b, h]], rtol=1e-9, atol=1e-12)
    touched = torch.zeros_like(gone)
    touched[..., 1:] = gone[..., :-1] & ~gone[..., 1:]
    assert torch.equal(got[~gone & ~touched], v[~gone & ~touched])


def test_a_folded_value_is_a_convex_mean_even_of_vanishing_weights():
    v = torch.eye(20, dtype=torch.float32)
    gone = torch.arange(20) % 4 != 3
    for w in (torch.ones(20), torch.full((20,), 1e-38), torch.logspace(0, -30, 20), torch.zeros(20)):
        mean = into_the_right(v, w, gone)[~gone]
        assert bool((mean >= 0).all())
        torch.testing.assert_close(mean.sum(-1), torch.ones(5), rtol=1e-5, atol=0)
    two = into_the_right(v[:2], torch.ones(2), torch.tensor([True, False]))
    assert two[1, :2].tolist() == [0.5, 0.5]  # alike: the plain mean


def test_nothing_behind_a_rows_end_comes_in():
    v = torch.randn(1, 1, 6, 4)
    v[:, :, 4:] = float("nan")
    gone = torch.tensor([[[False, True, False, False, False, False]]])
    w = torch.tensor([[[0.1, 0.2, 0.6, 0.1, float("nan"), 0.3]]])
    out = into_the_right(v, w, gone)[0, 0, :4]
    torch.testing.assert_close(out[2], (0.2 * v[0, 0, 1] + 0.6 * v[0, 0, 2]) / 0.8)
    assert torch.equal(out[[0, 3]], v[0, 0, [0, 3]])


def by_hand(k, v, q, method, count):
    """One head token by token: (places, values, answers) after each."""
    held, mass, v = [], {}, v.clone()
    for t in range(count):
        held.append(t)
        p = (q[:, t] @ k[held].T * SCALE).softmax(-1)
        answer = p @ v[held]
        for place, got in zip(held, p.sum(0).tolist(), strict=True):
            mass[place] = mass.get(place, 0.0) + got
        if len(held) > method.tokens:
            w = [mass[i] / (t - i + 1) for i in held]
            j = min(range(method.sinks, len(held) - method.window), key=lambda i: (w[i], -i))
            if method.merge:
                a, b = held[j], held[j + 1]
                v[b] = (w[j] * v[a] + w[j + 1] * v[b]) / (w[j] + w[j + 1])
            del held[j]
        yield list(held), v[held], answer


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("ends", [SMALL, dict(sinks=0, window=1)], ids=str)
def test_steps_are_those_by_hand(merge, ends):
    method = longwave.WeightedKV(tokens=14, merge=merge, **ends)
    k, v, q = draw(2, 50, seed=5)
    layer = new_layer(method)
    twins = {
        (b, h): by_hand(k[b, h], v[b, h], q[b, h * G : (h + 1) * G], method, 50) for b in range(2) for h in range(H)
    }
    for out in drive(layer, k, v, q, [1] * 50):
        for (b, h), twin in twins.items():
            places, values, answer = next(twin)
            assert layer.dense.column("position")[b, h].tolist() == places
            torch.testing.assert_close(layer.dense.view()[1][b, h], values, rtol=0, atol=1e-6)
            torch.testing.assert_close(out[b, h * G : (h + 1) * G, 0], answer, rtol=0, atol=1e-6)


def test_a_prompt_folds_what_it_drops_and_leaves_keys_and_the_given_tensors_alone():
    k, v, q = draw(1, 60)
    given = v.clone()
    layer = run(new_layer(longwave.WeightedKV(tokens=20, **SMALL)), k, v, q, [60])
    assert torch.equal(v, given)
    for h in range(H):
        places = layer.dense.column("position")[0, h].tolist()
        p = (q[0, h * G : (h + 1) * G] @ k[0, h].T * SCALE).masked_fill(~torch.ones(60, 60).tril().bool(), -torch.inf)
        w = p.softmax(-1).sum((0, 1)) / torch.arange(60, 0, -1)
        lowest = sorted(range(2, 53), key=lambda i: (float(w[i]), i))
        assert places == sorted({0, 1, *range(53, 60), *lowest[40:]})
        gone = [i not in places for i in range(60)]
        want = one_by_one(v[0, h], w, gone)[places]
        torch.testing.assert_close(layer.dense.view()[1][0, h], want, rtol=1e-5, atol=1e-6)
        assert torch.equal(layer.dense.view()[0][0, h], k[0, h, places])


def test_pages_get_folded_values():
    pages = longwave.Kivi(group=8, bits=8)
    k, v, q = draw(1, 90)
    stores = []
    for merge in (True, False):
        layer = longwave.WeightedKV(store=pages, merge=merge, **SMALL).bind(naive.shape(), None, 0.05).layer(0)
        run(layer, k, v, q, [90])
        assert layer.store.tokens[0] > 0
        stores.append([x.clone() for x in layer.materialize()])
    assert torch.equal(stores[0][0], stores[1][0])  # keys are the same
    assert (stores[0][1] - stores[1][1]).abs().max() > 0.05
    assert stores[0][1].shape[-1] == D


def test_wrong_options():
    with pytest.raises(ValueError, match="merge is True or False, got 'yes'"):
        longwave.WeightedKV(merge="yes")
