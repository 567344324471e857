"""The paper's store against its formulas, written out independently."""

import math

import pytest
import torch

from longwave.ops.spectral.basis import smooth_ge
from longwave.store.channels import ChannelSplit
from longwave.store.period import PeriodStore, analyze, resynthesize

S = 16


def signal(length, channels=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    walk = torch.randn(1, 2, length, channels, generator=g, dtype=torch.float64).cumsum(2) / 5
    return walk + 3 * torch.randn(1, 2, 1, channels, generator=g, dtype=torch.float64)


def stores(kept, reserve=40, stretch=True):
    table = torch.tensor(kept)
    return PeriodStore(1, ChannelSplit(table), ChannelSplit(~table), S, reserve, stretch)


KEPT = [[True, False, True, False, False, False], [False] * 6]


def published(x, period):
    """Section 5 of the notes: raw sums, 1/N synthesis, mean and maximum deviation; x [L] -> [L]. Mean removed first."""
    length, n = len(x), S // 2
    mean = sum(x) / length
    reach = max(abs(value - mean) for value in x)
    out = [0.0] * length
    for k in range(n):
        w = 2 * math.pi * k / period
        c = sum((x[t] - mean) * math.cos(w * t) for t in range(length))
        s = sum((x[t] - mean) * math.sin(w * t) for t in range(length))
        weight = (1 if k == 0 else 2) / period  # the true truncated inverse; 1/N instead is an affine image of it
        for t in range(length):
            out[t] += weight * (c * math.cos(w * t) + s * math.sin(w * t))
    centre = sum(out) / length
    span = max(abs(value - centre) for value in out)
    return [(value - centre) * reach / span + mean for value in out]


@pytest.mark.parametrize("length", [50, 71])
def test_channels_follow_the_published_formula(length):
    store = stores(KEPT)
    x = signal(length)
    store.append(None, x, x.flip(2))
    period = smooth_ge(length + 40)
    k, v = store.materialize()
    for head in range(2):
        for channel in range(6):
            true = x[0, head, :, channel]
            if KEPT[head][channel]:
                assert torch.equal(k[0, head, :, channel], true)
            else:
                expected = torch.tensor(published(true.tolist(), period), dtype=torch.float64)
                torch.testing.assert_close(k[0, head, :, channel], expected, rtol=0, atol=1e-9)
    assert torch.equal(v[0, 0, :, 1], x.flip(2)[0, 0, :, 1])


def test_without_reserve_the_published_scaling_gives_the_same():
    """With T = L the paper's 1/N synthesis is an affine image of our inverse, and its correction removes such."""
    x, length = signal(60), 60
    store = stores(KEPT, reserve=0)
    store.append(None, x, x)
    assert store.rows[0].period == length
    raw = x[0, 1, :, 2]
    t = torch.arange(length, dtype=torch.float64)
    r = torch.zeros(length, dtype=torch.float64)
    for n in range(S // 2):
        w = 2 * math.pi * n / length
        r += ((raw * torch.cos(w * t)).sum() * torch.cos(w * t) + (raw * torch.sin(w * t)).sum() * torch.sin(w * t)) / (
            S // 2
        )
    gain = (raw - raw.mean()).abs().max() / (r - r.mean()).abs().max()
    torch.testing.assert_close(
        store.materialize()[0][0, 1, :, 2], (r - r.mean()) * gain + raw.mean(), rtol=0, atol=1e-9
    )


def test_unstretched_it_is_the_plain_low_pass():
    x, length = signal(60), 60
    store = stores(KEPT, reserve=0, stretch=False)
    store.append(None, x, x)
    bins = torch.fft.rfft(x[0, 1, :, 2])
    bins[S // 2 :] = 0
    torch.testing.assert_close(store.materialize()[0][0, 1, :, 2], torch.fft.irfft(bins, n=length), rtol=0, atol=1e-9)


def test_tokens_that_join_later_land_on_their_own_place():
    """Linear in the signal: a token's phase is its index, so one by one and at once give the same coefficients."""
    x = signal(90)
    at_once, stepwise = stores(KEPT), stores(KEPT)
    for store in (at_once, stepwise):
        store.append(None, x[:, :, :60], x[:, :, :60])
    at_once.append(None, x[:, :, 60:], x[:, :, 60:])
    for t in range(60, 90):
        stepwise.append(None, x[:, :, t : t + 1], x[:, :, t : t + 1])
    for a, b in zip(at_once.materialize(), stepwise.materialize(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    group = at_once.rows[0].k[0]
    expected = analyze(x[0, 1:, :, :] - x[0, 1:, :60].mean(1, keepdim=True), S, at_once.rows[0].period)
    torch.testing.assert_close(group.coef, expected, rtol=0, atol=1e-9)


def test_an_impulse_peaks_at_its_own_place():
    coef = analyze(torch.eye(64, dtype=torch.float64)[:, 37:38], 32, 64)
    assert int(resynthesize(coef, 64, 64).argmax()) == 37


def test_a_full_period_is_fitted_again_and_old_tokens_stay():
    t = torch.arange(400, dtype=torch.float64)
    smooth = torch.sin(2 * math.pi * t / 200)[None, None, :, None].expand(1, 2, -1, 6)
    store = stores([[False] * 6] * 2)
    store.append(None, smooth[:, :, :100], smooth[:, :, :100])
    first = store.rows[0].period
    for start in range(100, 400, 20):
        store.append(None, smooth[:, :, start : start + 20], smooth[:, :, start : start + 20])
    assert store.rows[0].period > first
    assert store.rows[0].period >= 400
    k, _ = store.materialize()
    correlation = torch.corrcoef(torch.stack([k[0, 0, :, 0], smooth[0, 0, :, 0]]))[0, 1]
    assert correlation > 0.98  # wrapping round, as the released code does, would fold 400 tokens onto 140


@pytest.mark.parametrize("queries", [1, 17])
def test_attention_equals_the_rebuilt_channels(queries):
    store = stores(KEPT)
    x = signal(75)
    store.append(None, x, x * 0.5)
    store.append(None, signal(9, seed=2), signal(9, seed=3))
    g = torch.Generator().manual_seed(1)
    q, p = (
        torch.randn(1, 2, queries, 6, generator=g, dtype=torch.float64),
        torch.rand(1, 2, queries, 84, generator=g, dtype=torch.float64),
    )
    k, v = store.materialize()
    torch.testing.assert_close(store.scores(q), q @ k.mT, rtol=0, atol=1e-9)
    torch.testing.assert_close(store.mix(p), p @ v, rtol=0, atol=1e-9)


def test_compresses_only_when_it_saves():
    store = stores(KEPT)
    assert store.due(0, S) == 0
    assert store.due(0, S + 1) == S + 1
    store.append(None, signal(30), signal(30))
    assert store.due(0, 63) == 0
    assert store.due(0, 64) == 64


@pytest.mark.parametrize("lengths", [(50, 50, 50), (50, 71, 55)], ids=["equal", "ragged"])
def test_a_batch_is_its_rows(lengths):
    table = torch.tensor(KEPT)
    batch = PeriodStore(3, ChannelSplit(table), ChannelSplit(~table), S, 40, True)
    alone = [stores(KEPT) for _ in lengths]
    for row, length in enumerate(lengths):
        x = signal(length, seed=row)
        batch.append(row, x, x.flip(2))
        alone[row].append(None, x, x.flip(2))
    q = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    scores = batch.scores(q)
    p = torch.softmax(scores, -1)
    mixed = batch.mix(p)
    for row, length in enumerate(lengths):
        own = alone[row].scores(q[row : row + 1])
        torch.testing.assert_close(scores[row : row + 1, ..., :length], own)
        assert not scores[row, ..., length:].any()
        torch.testing.assert_close(mixed[row : row + 1], alone[row].mix(p[row : row + 1, ..., :length]))
