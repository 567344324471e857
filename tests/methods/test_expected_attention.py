"""expected_attention: the closed form against draws, the averaged rotation against a loop, scores written out."""

from dataclasses import replace

import pytest
import torch

import longwave
from longwave.methods.held import held_by
from tests.conftest import tokens
from tests.reading import read_in

METHOD = longwave.ExpectedAttention(queries=16, stride=1, ahead=12, sinks=2, window=8)


def settled(model, method=METHOD, length=50, batch=2):
    """What a layer holds after a prompt in which nothing goes yet."""
    memory = longwave.cache(model, replace(method, tokens=300))
    read_in(model, memory, tokens(batch, length), (length,))
    return held_by(memory.layers[0])


def test_the_averaged_rotation_is_that_of_a_loop(llama):
    held = settled(llama)
    positions = torch.arange(50, 62)
    got = METHOD.rotation(held, positions[None].expand(2, -1), torch.float64)
    half = 4
    turns = []
    for p in positions.tolist():
        angle = p * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
        turns.append(torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]))
    torch.testing.assert_close(got[1, 0], torch.stack(turns).mean(0), rtol=0, atol=1e-5)


def test_moments_are_those_of_the_last_queries_before_rotation(llama):
    held = settled(llama)
    seen = []
    hook = llama.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        llama(tokens(2, 50), use_cache=False)
    hook.remove()
    q = seen[0].view(2, 50, 4, 8).transpose(1, 2)[:, :, -16:].double()
    ahead = METHOD.rotation(held, torch.arange(50, 62).expand(2, -1), torch.float64)
    mean, covariance = METHOD.moments(held, torch.float64)
    torch.testing.assert_close(mean, (ahead @ q.mean(2)[..., None])[..., 0], rtol=1e-4, atol=1e-4)
    off = q - q.mean(2, keepdim=True)
    torch.testing.assert_close(covariance, ahead @ (off.mT @ off / 16) @ ahead.mT, rtol=1e-3, atol=1e-3)
    assert float(torch.linalg.eigvalsh(covariance).min()) > -1e-9


def test_sinks_are_left_out_of_the_moments(llama):
    """As many queries remembered as were asked, or those of the sinks not."""
    all_of_them, others = (settled(llama, replace(METHOD, queries=n)) for n in (50, 48))
    for got, want in zip(*(METHOD.moments(held, torch.float64) for held in (all_of_them, others)), strict=True):
        torch.testing.assert_close(got, want)


def test_a_row_of_sinks_alone_is_finite(llama):
    held = settled(llama, length=2)
    assert torch.isfinite(METHOD.score(held)).all()


def test_the_closed_form_is_the_mean_over_gaussian_queries():
    """E exp(q k / sqrt d) of q ~ N(mu, C), by a million draws."""
    g = torch.Generator().manual_seed(0)
    mean, root = torch.randn(8, generator=g).double(), torch.randn(8, 8, generator=g).double() * 0.4
    k, scaling = torch.randn(8, generator=g).double(), 8**-0.5
    draws = mean + torch.randn(1_000_000, 8, generator=g).double() @ root.T
    want = (draws @ k * scaling).exp().mean()
    covariance = root @ root.T
    got = torch.exp(mean @ k * scaling + k @ covariance @ k * scaling**2 / 2)
    assert float(got) == pytest.approx(float(want), rel=0.01)


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("eps", [0.0, 0.02])
def test_the_score_written_out(llama, covariance, eps):
    held, method = settled(llama), replace(METHOD, covariance=covariance, eps=eps)
    mean, spread = method.moments(held, torch.float64)
    got = method.score(held)
    for b in range(2):
        for h in range(2):
            total = 0
            for head in (2 * h, 2 * h + 1):
                z = []
                for key in held.k[b, h, 2:].double():  # without sinks
                    power = mean[b, head] @ key * held.scaling
                    if covariance:
                        power = power + key @ spread[b, head] @ key * held.scaling**2 / 2
                    z.append(power.exp())
                total = total + torch.stack(z) / sum(z)
            want = (total / 2 + eps) * held.v[b, h, 2:].double().norm(dim=-1)
            torch.testing.assert_close(got[b, h, 2:].double(), want, rtol=1e-3, atol=1e-6)


def test_with_a_large_eps_the_length_of_a_value_decides(llama):
    held = settled(llama)
    worth = replace(METHOD, eps=1e6).score(held) / 1e6
    torch.testing.assert_close(worth, held.v.norm(dim=-1), rtol=1e-5, atol=0)


def test_a_shorter_row_is_judged_by_its_own_tokens(llama):
    held = settled(llama)
    short = replace(held, lengths=torch.tensor([50, 30]))
    score = replace(METHOD, eps=0.0).score(short)
    assert not score[1, :, 30:].any()
    assert bool((score[1, :, 2:30] > 0).all())


def test_what_goes_is_what_is_worth_least(llama):
    memory = longwave.cache(llama, replace(METHOD, tokens=24))
    held = settled(llama)
    read_in(llama, memory, tokens(2, 50), (50,))
    worth = METHOD.score(held)[:, :, 2:42]
    stay = worth.argsort(-1, descending=True)[..., :14].sort(-1).values + 2
    assert torch.equal(memory.layers[0].dense.column("position")[:, :, 2:16].long(), stay)


def test_pages_take_what_is_worth_most(llama):
    method = replace(METHOD, store=longwave.Kivi(bits=8, group=8))
    memory = longwave.cache(llama, method, budget=0.06)
    read_in(llama, memory, tokens(1, 130), [120, *[1] * 10])
    layer = memory.layers[0]
    assert layer.store.tokens[0] >= 8
    assert layer.store.tokens[0] // 8 * layer.bound.span + layer.dense.lengths[0] == 130


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(queries=0), "queries is a whole number of tokens, at least 1; got 0"),
        (dict(stride=0), "stride is a whole number of tokens, at least 1; got 0"),
        (dict(ahead=0), "ahead is a whole number of positions, at least 1; got 0"),
        (dict(eps=-1), "eps is a weight beside those of a softmax, at least 0; got -1"),
        (dict(covariance=1), "covariance is True or False, got 1"),
        (dict(positions="slots"), "expected_attention asks with queries that it remembers"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.ExpectedAttention(**options)
