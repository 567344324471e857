import pytest
import torch

from longwave.diffusion import Dream, LLaDA
from longwave.diffusion.confidence import above, margin, order, probability, surest
from longwave.diffusion.noise import Draws, categorical
from longwave.diffusion.samplers import Moment

CPU = torch.device("cpu")
P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]], dtype=torch.float64)


def test_confidence():
    drawn = torch.tensor([1, 2, 0])
    assert probability(P, drawn).tolist() == [0.3, 0.8, 1.0]
    assert torch.allclose(margin(P, drawn), torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64))
    entropy = -torch.special.entr(P).sum(-1)
    assert torch.allclose(order(P, drawn), entropy, atol=1e-8)


def test_what_stays():
    sure = torch.tensor([0.3, 0.9, 0.9, 0.1])
    assert surest(sure, 1).tolist() == [False, True, False, False]
    assert surest(sure, 3).tolist() == [True, True, True, False]
    assert not surest(sure, 0).any()
    assert above(sure, 0.3).tolist() == [True, True, True, False]
    assert above(sure, 0.95).tolist() == [False, True, False, False]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_softmax_says(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, float("-inf")])
    drawn = categorical(logits.expand(40000, -1), temperature, Draws(0, CPU))
    share = drawn.bincount(minlength=4) / 40000
    assert torch.allclose(share, torch.softmax(logits / temperature, -1), atol=0.01)
    assert categorical(logits[None], 0.0, Draws(0, CPU)).tolist() == [0]


def test_gumbel_noise_is_of_double_precision_and_finite():
    noise = Draws(0, CPU).gumbel(100000)
    assert noise.dtype == torch.float64
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.5772) < 0.02


@pytest.mark.parametrize(("first", "steps"), [(8, 8), (8, 3), (8, 1), (8, 20), (7, 7)])
def test_llada_shares_a_blocks_masks_evenly(first, steps):
    counts, left = [], first
    for step in range(steps):
        counts.append(LLaDA().count(left, Moment(step, steps, first)))
        left -= counts[-1]
    assert left == 0
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 5, 32])
def test_dream_leaves_nothing(steps):
    left = 16
    for step in range(steps):
        left -= Dream().count(left, Moment(step, steps, 16))
    assert left == 0
    kept = Dream(algorithm="origin").keep(torch.zeros(9), Moment(steps - 1, steps, 9), Draws(0, CPU))
    assert kept.all()


def test_origin_keeps_each_by_itself():
    at = Moment(0, 4, 20000)
    kept = Dream(algorithm="origin").keep(torch.zeros(20000), at, Draws(0, CPU))
    assert abs(float(kept.double().mean()) - 0.25) < 0.01  # 1 - s / t, and eps is small


def test_choice_temperature_prefers_the_surer():
    sampler, at = Dream(choice_temperature=1.0), Moment(0, 2, 3)
    sure = torch.tensor([0.0, -2.0, -3.0], dtype=torch.float64)
    draws = Draws(0, CPU)
    kept = torch.stack([sampler.keep(sure, at, draws) for _ in range(4000)])
    assert (kept.sum(-1) == 1).all()
    share = float(kept[:, 0].double().mean())
    assert abs(share - float(torch.softmax(sure, -1)[0])) < 0.03


def test_top_p_and_top_k_cut_what_is_drawn_from():
    logits = P.log().float()[:1].expand(500, -1)
    for sampler, found in ((Dream(temperature=1.0, top_p=0.4), {0}), (Dream(temperature=1.0, top_p=0.6), {0, 1})):
        assert set(sampler.draw(logits, Draws(0, CPU), ())[0].tolist()) == found
    tokens, sure = Dream(temperature=1.0, top_k=2, algorithm="maskgit_plus").draw(logits, Draws(0, CPU), ())
    assert set(tokens.tolist()) == {0, 1}
    assert torch.allclose(sure, torch.where(tokens == 0, 0.625, 0.375).double())


def test_an_end_comes_last_or_never():
    logits = torch.tensor([[9.0, 1.0, 0.0], [0.0, 1.0, 0.5]])
    tokens, sure = LLaDA(eos="last").draw(logits, Draws(0, CPU), [0])
    assert tokens.tolist() == [0, 1]
    assert sure[0] == 0 < sure[1]
    assert LLaDA(eos="never").draw(logits, Draws(0, CPU), [0])[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: LLaDA(temperature=-1), "temperature is a number at least 0; got -1"),
        (lambda: LLaDA(temperature=float("nan")), "temperature is a number"),
        (lambda: LLaDA(guidance=True), "guidance is a number"),
        (lambda: LLaDA(remasking="low"), "unknown remasking 'low'"),
        (lambda: LLaDA(eos="lst"), "unknown eos 'lst': did you mean 'last'"),
        (lambda: LLaDA(eos="last", remasking="random"), 'eos="last"'),
        (lambda: Dream(algorithm="entrophy"), "did you mean 'entropy'"),
        (lambda: Dream(top_p=1.5), "top_p is a number from 0 to 1; got 1.5"),
        (lambda: Dream(top_p=0), "top_p=0 leaves no token"),
        (lambda: Dream(top_k=0), "top_k is a whole number of tokens, at least 1; got 0"),
        (lambda: Dream(eps=0), "eps is the noise"),
        (lambda: Dream(algorithm="origin", choice_temperature=1), "choice_temperature decides nothing"),
        (lambda: Dream(algorithm="origin", top_k=3), "decide nothing at temperature 0"),
    ],
)
def test_wrong_options(made, message):
    with pytest.raises(ValueError, match=message):
        made()
