"""Merged segments against the definition, and what the bias is for."""

import pytest
import torch

from longwave.ops.merge import EVEN, MOST, merge, merge_heads

B, H, G, P, N, T, D = 2, 2, 3, 5, 4, 8, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.fixture(params=["reference", "triton"])
def kernels(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    monkeypatch.setenv("LONGWAVE_KERNELS", request.param)
    return request.param


def halves(dtype, tokens, dim, group=3, probes=13):
    """q, k, v as they lie in storage with room, and lse; one query of the second row is not there."""
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, probes, 3 * group, dim, generator=g).to(DEVICE, dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, 3, tokens + 5, dim, generator=g).to(DEVICE, dtype)[:, :, :, 2 : tokens + 2]
    lse = torch.logsumexp(0.7 * q.double() @ k.double().repeat_interleave(group, 1).mT, -1).float() + 0.3
    lse[1, :, 0] = -torch.inf
    return q, k, v, lse


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("heads", "segment", "dim"), [([2], 32, 20), ([0, 2], 16, 16), ([0, 1, 2], 32, 64)])
def test_some_heads_become_what_the_definition_says(kernels, dtype, heads, segment, dim, monkeypatch):
    q, k, v, lse = halves(dtype, 2 * segment, dim)
    before = k.clone(), v.clone()
    new_k, new_v, bias = merge_heads(q, k, v, lse, 0.7, segment, heads)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])
    monkeypatch.setenv("LONGWAVE_KERNELS", "reference")
    keys, values, raised = merge(q.double(), k.double(), v.double(), lse.double(), 0.7, segment)
    near = dict(rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 8)
    for head in range(3):
        mine = slice(head, head + 1)
        if head in heads:
            for found, means in ((new_k, keys), (new_v, values)):
                torch.testing.assert_close(
                    found[:, mine].double(), means[:, mine].repeat_interleave(segment, 2), **near
                )
            torch.testing.assert_close(bias[:, mine].double(), raised[:, mine], rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(new_k[:, mine], k[:, mine])
            assert torch.equal(new_v[:, mine], v[:, mine])
            assert not bias[:, mine].any()


def test_nothing_is_asked_and_nothing_is_looked_at(kernels):
    q, k, v, lse = halves(torch.float16, 32, 16)
    plain = k.float().mean(2, keepdim=True).expand_as(k)
    found, _, bias = merge_heads(q, k, v, torch.full_like(lse, -torch.inf), 0.7, 32, [0, 1, 2])
    torch.testing.assert_close(found.float(), plain, rtol=0, atol=1e-3)
    assert not bias.any()
    found, _, bias = merge_heads(q, k, v, lse + 1e4, 0.7, 32, [0, 1, 2])
    torch.testing.assert_close(found.float(), plain, rtol=0, atol=1e-3)
    assert bias.abs().max() <= MOST


def test_triton_says_why_it_cannot(monkeypatch):
    pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    monkeypatch.setenv("LONGWAVE_KERNELS", "triton")
    q, k, v, lse = halves(torch.float16, 36, 16)
    with pytest.raises(RuntimeError, match="power of two"):
        merge_heads(q, k, v, lse, 0.7, 12, [0])
    with pytest.raises(RuntimeError, match="float16 or bfloat16"):
        merge_heads(q.float(), k.float(), v.float(), lse, 0.7, 12, [0])
