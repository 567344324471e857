"""Merged segments against the definition, and what the bias is for."""

import pytest
import torch

from longwave.ops.merge import EVEN, MOST, merge

B, H, G, P, N, T, D = 2, 2, 3, 5, 4, 8, 6


@pytest.fixture
def drawn():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, H * G, P, D, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, B, H, N * T, D, generator=g, dtype=torch.float64)
    lse = torch.logsumexp(0.7 * q @ k.repeat_interleave(G, 1).mT, -1) + 0.5  # there are keys elsewhere too
    return q, k, v, lse


def shares(q, k, lse):
    """p [B, H, G P, N, T]."""
    p = torch.exp(0.7 * q @ k.repeat_interleave(G, 1).mT - lse[..., None])
    return p.unflatten(1, (H, G)).flatten(2, 3).unflatten(-1, (N, T))


def test_means_and_bias_are_those_of_the_definition(drawn):
    q, k, v, lse = drawn
    keys, values, bias = merge(q, k, v, lse, 0.7, T)
    p = shares(q, k, lse)
    for b, h, n in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(N)).tolist():
        weight = p[b, h, :, n].sum(0)
        weight = weight + EVEN * weight.mean()
        weight /= weight.sum()
        part = slice(n * T, (n + 1) * T)
        torch.testing.assert_close(keys[b, h, n], weight @ k[b, h, part])
        torch.testing.assert_close(values[b, h, n], weight @ v[b, h, part])
        own = q[b, h * G : (h + 1) * G].flatten(0, 1) @ keys[b, h, n] * 0.7 - lse[b, h * G : (h + 1) * G].flatten()
        torch.testing.assert_close(bias[b, h, n], (p[b, h, :, n].sum() / (T * own.exp().sum())).log())


def test_a_segment_keeps_the_attention_that_it_had(drawn):
    q, k, v, lse = drawn
    keys, _, bias = merge(q, k, v, lse, 0.7, T)
    score = 0.7 * q.unflatten(1, (H, G)).flatten(2, 3) @ keys.mT + bias[:, :, None]
    got = T * torch.exp(score - lse.unflatten(1, (H, G)).flatten(2, 3)[..., None]).sum(2)
    torch.testing.assert_close(got, shares(q, k, lse).sum((2, 4)))


def test_equal_keys_make_plain_means_and_no_bias(drawn):
    q, k, v, _ = drawn
    k = k[:, :, :1].expand_as(k)
    lse = torch.logsumexp(0.7 * q @ k.repeat_interleave(G, 1).mT, -1)
    keys, values, bias = merge(q, k, v, lse, 0.7, T)
    torch.testing.assert_close(keys, k[:, :, ::T])
    torch.testing.assert_close(values, v.unflatten(2, (N, T)).mean(3))
    torch.testing.assert_close(bias, torch.zeros_like(bias), rtol=0, atol=1e-9)


def test_queries_that_are_not_there_say_nothing(drawn):
    q, k, v, lse = drawn
    hidden = lse.clone()
    hidden[:, :, :2] = -torch.inf
    some = merge(q[:, :, 2:], k, v, lse[:, :, 2:], 0.7, T)
    for ours, theirs in zip(merge(q, k, v, hidden, 0.7, T), some, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_any_query_means_are_plain(drawn):
    q, k, v, lse = drawn
    keys, values, bias = merge(q, k, v, torch.full_like(lse, -torch.inf), 0.7, T)
    torch.testing.assert_close(keys, k.unflatten(2, (N, T)).mean(3))
    torch.testing.assert_close(values, v.unflatten(2, (N, T)).mean(3))
    assert not bias.any()


def test_what_nobody_looks_at_stays_within_bounds(drawn):
    q, k, v, lse = drawn
    for far in (1e4, 40.0):
        keys, values, bias = merge(q.float(), k.float(), v.float(), (lse + far).float(), 0.7, T)
        assert all(x.isfinite().all() for x in (keys, values, bias))
        assert bias.abs().max() <= MOST
