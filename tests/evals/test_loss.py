import math

import pytest
import torch

import longwave
from longwave.evals import loss
from longwave.evals.fork import fork, prefill
from longwave.evals.loss import Scored, score
from tests.conftest import random_profile, tokens


@pytest.fixture
def dense(llama):
    return prefill(llama, tokens(1, 120))


def after(llama, dense, method="dense", **options):
    profile = None if method == "dense" else random_profile(llama)
    return fork(dense, longwave.cache(llama, method, profile=profile, **options))


def test_score_is_the_loss_of_the_next_tokens(llama, models, dense):
    context, ids = tokens(1, 120), tokens(1, 31, seed=2)
    with torch.no_grad():
        logits = models["llama"][1](torch.cat([context, ids], dim=1)).logits[0, 120:-1].double()
    chances = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = -sum(math.log(chances[i, ids[0, i + 1]]) for i in range(30)) / 30
    scored = score(llama, after(llama, dense), ids)
    assert scored.loss == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(scored.logprobs[0].double(), chances.log(), rtol=1e-3, atol=1e-3)


def test_hits_are_where_the_most_likely_token_came(llama, dense):
    ids = tokens(1, 31, seed=2)
    scored = score(llama, after(llama, dense), ids)
    assert not bool(scored.hits.all())
    likely = scored.logprobs.argmax(-1)
    assert torch.equal(scored.hits, likely == ids[:, 1:])
    said = ids.clone()
    said[:, 1] = likely[:, 0]
    assert bool(score(llama, after(llama, dense), said).hits[0, 0])


def test_single_tokens_are_decoded_in_place(llama, dense, monkeypatch):
    """And a cache that cannot be is read by ordinary passes."""
    ids, made = tokens(1, 31, seed=2), []
    real = loss.StaticDecoder
    monkeypatch.setattr(loss, "StaticDecoder", lambda *args, **more: made.append(more) or real(*args, **more))
    options = {"tokens": 40, "sinks": 2, "window": 8}
    stepped = score(llama, fork(dense, longwave.cache(llama, "streaming", **options)), ids, step=1)
    assert made == [{"new_tokens": 30}]
    monkeypatch.setattr(loss, "supports", lambda model, memory: "it does not")
    passed = score(llama, fork(dense, longwave.cache(llama, "streaming", **options)), ids, step=1)
    assert len(made) == 1
    torch.testing.assert_close(stepped.losses, passed.losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(stepped.hits, passed.hits)


@pytest.mark.parametrize("step", [1, 7, 30, 100])
def test_steps_through_a_dense_cache_change_nothing(llama, dense, step):
    ids = tokens(1, 31, seed=2)
    whole = score(llama, after(llama, dense), ids)
    parts = score(llama, after(llama, dense), ids, step=step, keep=False)
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-4, atol=1e-4)
    assert parts.logprobs is None


def test_later_steps_read_what_earlier_ones_compressed(llama, dense):
    ids = tokens(1, 61, seed=2)
    options = {"budget": 0.3, "segment": 16, "sinks": 0, "window": 1}
    once = score(llama, after(llama, dense, "fourier", **options), ids)
    steps = score(llama, after(llama, dense, "fourier", **options), ids, step=1)
    torch.testing.assert_close(steps.losses[:, 0], once.losses[:, 0], rtol=1e-4, atol=1e-4)
    assert (steps.losses - once.losses)[:, 20:].abs().max() > 1e-2


def test_rows_are_scored_apart(llama):
    context, ids = tokens(3, 120), tokens(3, 31, seed=2)
    together = score(llama, fork(prefill(llama, context), longwave.cache(llama, "dense")), ids)
    for row in range(3):
        alone = score(llama, prefill(llama, context[row : row + 1]), ids[row : row + 1])
        torch.testing.assert_close(together.losses[row : row + 1], alone.losses, rtol=1e-4, atol=1e-4)
    assert together.loss == pytest.approx(float(together.losses.mean()))


def test_score_feeds_all_but_the_last(llama, dense):
    memory = after(llama, dense)
    score(llama, memory, tokens(1, 31, seed=2))
    assert memory.get_seq_length() == 150


def test_dense_does_not_diverge_from_itself(llama, dense):
    ids = tokens(1, 31, seed=2)
    kl, same = score(llama, after(llama, dense), ids).divergence(score(llama, after(llama, dense), ids))
    assert kl.shape == same.shape == (1, 30)
    assert float(kl.abs().max()) == pytest.approx(0, abs=1e-6)
    assert bool(same.all())


def test_full_budget_does_not_diverge(llama, dense):
    ids = tokens(1, 31, seed=2)
    whole = after(llama, dense, "fourier", budget=1.0, segment=16, window=16)
    kl, same = score(llama, whole, ids).divergence(score(llama, after(llama, dense), ids))
    assert float(kl.abs().max()) == pytest.approx(0, abs=1e-4)
    assert bool(same.all())


def test_fewer_channels_diverge_more(llama, dense):
    ids = tokens(1, 31, seed=2)
    exact = score(llama, after(llama, dense), ids)
    options = {"segment": 16, "sinks": 0, "window": 1}
    kls = [
        score(llama, after(llama, dense, "fourier", budget=budget, **options), ids).divergence(exact)[0].mean()
        for budget in (0.9, 0.15)
    ]
    assert 0 < kls[0] < kls[1]


def test_divergence_by_hand():
    nothing = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    dense = Scored(*nothing, torch.tensor([[[0.5, 0.5], [0.2, 0.8]]]).log())
    other = Scored(*nothing, torch.tensor([[[0.25, 0.75], [0.4, 0.6]]]).log())
    kl, same = other.divergence(dense)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.2 * math.log(0.2 / 0.4) + 0.8 * math.log(0.8 / 0.6)
    assert kl[0].tolist() == pytest.approx([first, second], rel=1e-5)
    assert same.tolist() == [[0, 1]]  # a tie counts as the first of the two


def test_divergence_needs_the_distributions(llama, dense):
    ids = tokens(1, 31, seed=2)
    bare = score(llama, after(llama, dense), ids, keep=False)
    with pytest.raises(ValueError, match="score with keep=True"):
        bare.divergence(bare)
