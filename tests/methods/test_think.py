"""think: keys of the middle keep their most asked channels, packed; values and the last tokens stay whole."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import longwave
from longwave.store.packed import PackedStore
from longwave.store.pages import EXPAND
from longwave.store.tokens import capacity
from tests.conftest import into, left_padded, tokens
from tests.methods import naive
from tests.methods.naive import D, G, H, draw, drive
from tests.reading import read, read_in

SMALL = dict(sinks=2, window=7)
SIZES = (70, 9, *[1] * 30, 25, 1, 1)


@dataclass(frozen=True)
class Often(longwave.ThinK):
    segment: ClassVar[int] = 8


def layer_of(method, budget=None, dtype=torch.float64):
    return method.bind(naive.shape(dtype), None, budget).layer(0)


def run(layer, k, v, q, sizes, valid=None):
    for _ in drive(layer, k, v, q, sizes, valid):
        pass
    return layer


def chosen_by(k, q, keep):
    """Channels of one head, by loops: |Q[:, c]| |K[:, c]| of the group's last queries and all keys."""
    worth = []
    for c in range(D):
        asked = sum(float(q[g, t, c]) ** 2 for g in range(q.shape[0]) for t in range(q.shape[1])) ** 0.5
        worth.append(asked * float(k[:, c].norm()))
    return sorted(sorted(range(D), key=lambda c: (-worth[c], c))[:keep])


# the choice


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_channels_are_those_of_the_specification(ratio):
    k, v, q = draw(2, 90)
    layer = run(layer_of(Often(ratio=ratio, queries=5, **SMALL)), k, v, q, [90])
    keep = D - int(ratio * D)
    for row in range(2):
        for h in range(H):
            want = chosen_by(k[row, h], q[row, h * G : (h + 1) * G, 85:], keep)
            assert layer.store.channels[row, h].tolist() == want


def test_one_channel_is_worth_its_energy():
    """Brute force: of one channel, the one whose loss changes the window's scores most is kept."""
    k, v, q = draw(1, 60)
    layer = run(layer_of(Often(ratio=0.85, queries=6, **SMALL)), k, v, q, [60])
    for h in range(H):
        asked = q[0, h * G : (h + 1) * G, 54:].flatten(0, 1)
        change = [float((asked[:, c : c + 1] @ k[0, h, :, c : c + 1].T).norm()) for c in range(D)]
        assert layer.store.channels[0, h, :2].tolist() == sorted(sorted(range(D), key=lambda c: -change[c])[:2])


def test_the_choice_is_constant_in_time_and_each_rows_own():
    k, v, q = draw(2, sum(SIZES))
    valid = torch.ones(2, sum(SIZES), dtype=torch.bool)
    valid[1, :23] = False
    layer, first = layer_of(Often(ratio=0.5, queries=5, **SMALL)), None
    for _ in drive(layer, k, v, q, SIZES, valid):
        first = layer.store.channels.clone() if first is None else first
        assert torch.equal(layer.store.channels, first)
    alone = run(
        layer_of(Often(ratio=0.5, queries=5, **SMALL)), k[1:, :, 23:], v[1:, :, 23:], q[1:, :, 23:], (47, *SIZES[1:])
    )
    assert torch.equal(alone.store.channels[0], first[1])
    for mine, theirs in zip(layer.materialize(), alone.materialize(), strict=True):
        assert torch.equal(mine[1, :, : theirs.shape[2]], theirs[0])


# what is kept, and what is answered


def test_window_sinks_and_values_are_whole():
    k, v, q = draw(1, 90)
    layer = run(layer_of(Often(ratio=0.5, **SMALL)), k, v, q, [90])
    packed = layer.store.tokens[0]
    assert packed == (90 - 9) // 8 * 8
    held_k, held_v = layer.materialize()
    assert torch.equal(held_v, v)
    middle = slice(2, 2 + packed)
    for part in (slice(0, 2), slice(2 + packed, 90)):
        assert torch.equal(held_k[:, :, part], k[:, :, part])
    gone = torch.ones(1, H, D, dtype=torch.bool).scatter(-1, layer.store.channels.long(), False)
    assert not held_k[:, :, middle].transpose(2, 3)[gone].any()
    assert torch.equal(held_k[:, :, middle].transpose(2, 3)[~gone], k[:, :, middle].transpose(2, 3)[~gone])
    assert layer.store.held.k.shape[3] == D // 2


@pytest.mark.parametrize("pads", [0, 23])
@pytest.mark.parametrize("sizes", [SIZES, (100, 40, 1), (90, *[1] * 30)], ids=["mixed", "expanded", "steps"])
def test_answers_are_those_of_zeros_in_the_channels(sizes, pads):
    """Packed, and full width with zeros: the same scores, in steps, chunks and where many queries unpack."""
    k, v, q = draw(2, sum(sizes))
    valid = torch.ones(2, sum(sizes), dtype=torch.bool)
    valid[1, :pads] = False
    layer, start = layer_of(Often(ratio=0.5, **SMALL)), 0
    before = [torch.zeros(H, 0, D, dtype=torch.float64)] * 2  # the keys of each row, as the last pass left them
    for size, got in zip(sizes, drive(layer, k, v, q, sizes, valid if pads else None), strict=True):
        now = slice(start, start + size)
        for row in range(2):
            own = valid[row, now]
            keys = torch.cat([before[row], k[row, :, now][:, own]], 1)
            values = v[row, :, : start + size][:, valid[row, : start + size]]
            asked, past = q[row, :, now][:, own], before[row].shape[1]
            hidden = torch.arange(keys.shape[1]) > past + torch.arange(asked.shape[1])[:, None]
            scores = asked.unflatten(0, (H, G)) @ keys[:, None].mT * naive.SCALE
            want = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values[:, None]
            torch.testing.assert_close(got[row][:, own], want.flatten(0, 1), rtol=1e-9, atol=1e-9)
            before[row] = layer.materialize()[0][row, :, : layer.held()[row]]
        start += size
    assert any(G * size > EXPAND for size in sizes[1:]) or sizes[1] == 1


def test_a_ratio_of_nothing_is_dense(llama):
    memory = longwave.cache(llama, longwave.ThinK(ratio=0.0))
    dense = longwave.cache(llama, "dense")
    ids, mask = left_padded(2, 120, [0, 31])
    for each in (memory, dense):
        read_in(llama, each, ids, (90, 20), mask)
    assert memory.method.whole
    assert memory.nbytes == dense.nbytes
    assert torch.equal(read(llama, memory, ids, mask), read(llama, dense, ids, mask))
    assert longwave.cache(llama, "think", 1.0).method.whole


def test_it_is_close_where_few_channels_go(llama):
    """On a model: one of eight changes less than four of eight, and neither nothing."""
    ids, found = tokens(1, 140), []
    dense = longwave.cache(llama, "dense")
    want = read_in(llama, dense, ids, (120, 20))[:, 120:]
    for ratio in (0.125, 0.5):
        memory = longwave.cache(llama, longwave.ThinK(ratio=ratio, **SMALL))
        found.append((read_in(llama, memory, ids, (120, 20))[:, 120:] - want).norm())
    assert 0 < found[0] < found[1]


# bytes and budgets


def test_bytes_are_those_of_packed_keys():
    k, v, q = draw(2, 400)
    layer = run(layer_of(longwave.ThinK(ratio=0.5, queries=5, **SMALL)), k, v, q, [400])
    packed = (400 - 9) // 64 * 64
    near = capacity(400 - packed) * 2 * H * D * 8
    assert layer.nbytes == 2 * (packed * H * (D // 2 + D) * 8 + near + 2 * H * (D // 2) + 5 * (H * G * D * 8 + 8))
    assert layer.nbytes == layer.bound.nbytes(400, 2)


@pytest.mark.parametrize(("budget", "channels"), [(0.5625, 1), (0.75, 4), (0.7499, 3), (0.95, 7), (1.0, 8)])
def test_a_budget_says_how_many_channels_stay(budget, channels):
    bound = longwave.ThinK().bind(naive.shape(), None, budget)
    assert bound.channels == channels
    assert bound.page_fraction() <= budget
    growth = bound.nbytes(200_000 + 64 * 100) - bound.nbytes(200_000)
    assert growth <= budget * 64 * 100 * bound.shape.token_bytes


def test_half_is_not_enough_and_the_smallest_is_said(llama):
    with pytest.raises(ValueError, match=r"cannot meet a budget of 0.5, its smallest is 0.5625"):
        longwave.cache(llama, "think", 0.5)
    longwave.cache(llama, "think", 0.5625)
    dense = longwave.cache(llama, "dense").method.nbytes(4000)  # a layer of three more while a turn is read
    fitted = longwave.cache(llama, longwave.ThinK(**SMALL), f"{int(0.95 * dense)}B", max_tokens=4000)
    with torch.no_grad():
        llama(tokens(1, 400), **into(fitted))
    assert 1 <= fitted.method.channels < 8
    assert fitted.nbytes == fitted.method.nbytes(400)
    assert 0.85 * dense < fitted.method.peak_bytes(4000) <= 0.95 * dense
    with pytest.raises(ValueError, match=r"the smallest that think can do is"):
        longwave.cache(llama, "think", f"{int(0.5 * dense)}B", max_tokens=4000)


def test_two_ratios_are_two_plans():
    bounds = [longwave.ThinK(ratio=ratio).bind(naive.shape(), None, None) for ratio in (0.5, 0.25)]
    assert bounds[0] != bounds[1]
    assert longwave.ThinK().bind(naive.shape(), None, None).channels == D - int(0.4 * D)


def test_tokens_and_channels_multiply(llama):
    """What an evicting method keeps is packed: a quarter of the bytes is two fifths of the tokens at 0.625."""
    method = longwave.H2O(store=longwave.ThinK(queries=5), store_budget=0.625, **SMALL)
    memory = longwave.cache(llama, method, budget=0.25)
    read_in(llama, memory, tokens(2, 480), (470, 1, 9))
    layer = next(memory.memory_layers())
    assert layer.store.held.k.shape[3] == 2  # of 8
    assert layer.store.tokens == [128, 128]
    assert layer.store.counts[0] * memory.method.span == 320
    assert memory.method.page_fraction() == pytest.approx(0.25)
    assert set(layer.store.decided) == {True}


# the store


def filled(segment=4, decided=True):
    g = torch.Generator().manual_seed(0)
    store = PackedStore(2, H, 3, D, segment, torch.float64, torch.device("cpu"))
    for row in range(2):
        store.decide(row, torch.rand(H, D, generator=g))
    k, v = torch.randn(2, 2, H, 8, D, generator=g, dtype=torch.float64)
    store.append(None, k, v)
    store.append(1, k[1:, :, :4], v[1:, :, :4])
    return store, k, v


def test_rows_may_differ_and_go_their_ways():
    store, k, v = filled()
    assert (store.tokens, store.counts) == ([8, 12], [2, 3])
    assert torch.equal(store.span(1, 6, 12)[1], torch.cat([v[1, :, 6:], v[1, :, :4]], 1))
    whole = store.materialize()[0]
    assert torch.equal(store.span(1, 3, 9)[0], whole[1, :, 3:9])
    twin = copy.deepcopy(store)
    twin.select(torch.tensor([0]))
    assert twin.tokens == [8]
    assert torch.equal(twin.materialize()[0][0], whole[0, :, :8])
    own = torch.zeros(H, D, dtype=torch.float64).scatter(-1, store.channels[0].long(), 1)
    assert torch.equal(whole[0, :, :8], k[0] * own[:, None])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("channels", lambda x: x.flip(-1)),
        ("channels", lambda x: x + 8),
        ("channels", lambda x: x[..., :2]),
        ("channels", lambda x: x.long()),
        ("decided", lambda x: [True, False]),
        ("decided", lambda x: [True]),
        ("held.lengths", lambda x: [8, 11]),
        ("held.k", lambda x: x[..., :2]),
        ("held.v", lambda x: x.float()),
    ],
)
def test_what_does_not_fit_together_is_refused(name, change):
    store, _, _ = filled()
    fresh = PackedStore(2, H, 3, D, 4, torch.float64, torch.device("cpu"))
    fresh.load_state(store.state())
    assert torch.equal(fresh.materialize()[0], store.materialize()[0])
    with pytest.raises(ValueError, match=r"channels|rows|packed|segments|v is"):
        PackedStore(2, H, 3, D, 4, torch.float64, torch.device("cpu")).load_state(
            store.state() | {name: change(store.state()[name])}
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: longwave.ThinK(ratio=1), "ratio is the share of channels that go, from 0 to below 1; got 1"),
        (lambda: longwave.ThinK(ratio=True), "got True"),
        (lambda: longwave.ThinK(queries=0), "queries"),
        (lambda: longwave.ThinK(ratio=0.4).bind(naive.shape(), None, 0.8), "a budget or a ratio, not both"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
