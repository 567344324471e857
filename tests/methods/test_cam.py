"""cam: when it merges, into which tokens, how much; draws that no other row has a part in."""

import pytest
import torch

import longwave
from longwave.methods.cam import draws
from longwave.methods.held import Held
from tests.methods.naive import SCALE, G, H, draw, drive
from tests.methods.test_evicting import new_layer, run

SMALL = dict(sinks=2, window=7)


def held_of(v, mass, lengths=None):
    n = v.shape[2]
    position = torch.arange(n).expand(v.shape[:3])
    lengths = torch.full((v.shape[0],), n) if lengths is None else lengths
    return Held(v, v, lengths, {"position": position, "mass": mass}, None, 1.0)


def only(n, *slots):
    return torch.isin(torch.arange(n), torch.tensor(slots))[None, None]


@pytest.mark.parametrize("most", [1, 2])
def test_a_token_liked_more_than_those_behind_it_is_always_merged(most):
    v = torch.eye(8, dtype=torch.float64)[None, None]
    mass = torch.tensor([1.0, 1, 5, 1, 1, 1, 1, 1])[None, None]
    out = longwave.CaM(reach=3).fold(held_of(v, mass), only(8, 2), most)[0, 0]
    want = v[0, 0].clone()
    want[3:6, 2] += 1 / 3  # a third each, keys and all others stay
    torch.testing.assert_close(out, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("most", [1, 2])
def test_one_without_attention_is_never_merged(most):
    v = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0))
    mass = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 1])[None, None]
    assert torch.equal(longwave.CaM(reach=3).fold(held_of(v, mass), only(8, 2), most), v)


@pytest.mark.parametrize("most", [1, 2])
def test_where_fewer_are_left_each_gets_more(most):
    """And what lies behind a row's end is nobody."""
    v = torch.eye(8)[None, None]
    out = longwave.CaM(reach=5).fold(held_of(v, torch.ones(1, 1, 8), torch.tensor([6])), only(8, 3), most)[0, 0]
    assert out[4:6, 3].tolist() == [0.5, 0.5]
    assert torch.equal(out[6:], v[0, 0, 6:])


def test_many_at_once_are_one_after_the_other_from_the_left():
    """Those that go later hand on what they were given; over more tokens than are solved for at a time."""
    n, reach, g = 300, 4, torch.Generator().manual_seed(2)
    v = torch.randn(1, 2, n, 3, generator=g, dtype=torch.float64)
    mass = torch.rand(1, 2, n, generator=g, dtype=torch.float64) + 0.1
    gone = (torch.rand(1, 2, n, generator=g) < 0.8) & (torch.arange(n) < n - 3)
    method = longwave.CaM(reach=reach, seed=5)
    got = method.fold(held_of(v, mass), gone, n)
    chance = draws(5, 0, torch.arange(n).expand(1, 2, n))
    merged = 0
    for h in range(2):
        x = v[0, h].clone()
        for i in range(n):
            near = slice(i + 1, i + 1 + reach)
            if gone[0, h, i] and chance[0, h, i] < min(1, float(mass[0, h, i] / mass[0, h, near].mean())):
                x[near] += x[i] / len(x[near])
                merged += 1
        torch.testing.assert_close(got[0, h], x, rtol=1e-9, atol=1e-9)
    assert 0.3 < merged / int(gone.sum()) < 0.98


def test_the_mean_over_seeds_is_the_chance_times_the_value():
    v = torch.eye(6, dtype=torch.float64)[None, None]
    mass = torch.tensor([1.0, 1, 0.4, 1, 1, 1])[None, None]
    held = held_of(v, mass)
    mean = sum(longwave.CaM(reach=2, seed=seed).fold(held, only(6, 2), 1)[0, 0, 3, 2] for seed in range(2000)) / 2000
    assert float(mean) == pytest.approx(0.4 / 2, abs=0.02)


def test_draws_are_even_and_depend_on_seed_layer_head_and_position_alone():
    place = torch.arange(20_000).expand(1, 2, -1)
    found = draws(1, 3, place)
    assert bool(((found >= 0) & (found < 1)).all())
    assert float(found.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(found.var()) == pytest.approx(1 / 12, abs=0.003)
    pairs = torch.stack([found[0, 0], found[0, 1], draws(1, 4, place)[0, 0], draws(2, 3, place)[0, 0]])
    both = torch.cat([pairs, found[0, 0].roll(1)[None]])
    assert float((torch.corrcoef(both) - torch.eye(5)).abs().max()) < 0.03
    rows = draws(1, 3, torch.tensor([[[7, 9], [7, 9]], [[9, 7], [9, 7]]], dtype=torch.int32))
    assert torch.equal(rows[0], rows[1].flip(-1))
    assert rows[0, 0].tolist() == found[0, 0, [7, 9]].tolist()


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_steps_are_those_by_hand(policy):
    """Merged before it goes, after the step's answer; which one goes is the policy's to say."""
    method = longwave.CaM(tokens=14, reach=4, policy=policy, seed=3, **SMALL)
    k, v, q = draw(1, 50, seed=5)
    layer = new_layer(method)
    chance = draws(3, 0, torch.arange(50).expand(1, H, 50))[0]
    states = [([], {}, v[0, h].clone()) for h in range(H)]
    merged = 0
    for t, out in enumerate(drive(layer, k, v, q, [1] * 50)):
        for h, (held, mass, own) in enumerate(states):
            held.append(t)
            p = (q[0, h * G : (h + 1) * G, t] @ k[0, h, held].T * SCALE).softmax(-1)
            torch.testing.assert_close(out[0, h * G : (h + 1) * G, 0], p @ own[held], rtol=0, atol=1e-6)
            for place, got in zip(held, p.sum(0).tolist(), strict=True):
                mass[place] = mass.get(place, 0.0) + got
            if len(held) > 14:
                free = range(2, len(held) - 7)
                j = 2 if policy == "streaming" else min(free, key=lambda i, m=mass, a=held: (m[a[i]], -i))
                near = held[j + 1 : j + 5]
                if chance[h, held[j]] < min(1, mass[held[j]] / (sum(mass[i] for i in near) / len(near))):
                    own[near] += own[held[j]] / len(near)
                    merged += 1
                del held[j]
            assert layer.dense.column("position")[0, h].tolist() == held
            torch.testing.assert_close(layer.dense.view()[1][0, h], own[held], rtol=1e-5, atol=1e-6)
    assert merged > 10


def test_a_seed_says_it_all_and_another_says_otherwise():
    k, v, q = draw(1, 90)
    values = [
        run(
            new_layer(longwave.CaM(tokens=20, policy="h2o", seed=seed, **SMALL)), k, v, q, [60, *[1] * 30]
        ).dense.view()[1]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reach=0), "reach is a whole number of tokens, at least 1; got 0"),
        (dict(seed=-1), "seed is a whole number.*, at least 0; got -1"),
        (dict(policy="tova"), 'policy is "streaming" or "h2o", got \'tova\''),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.CaM(**options)
