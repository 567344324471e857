"""Fisher weights: gradients at the cached K and V, and noise that costs the same wherever it lies."""

import pytest
import torch
from transformers import DynamicCache

from longwave.codec import weigh
from longwave.codec.rotation import Rotation
from longwave.evals.fork import prefill
from longwave.frame import cache_argument
from longwave.plan.probe import NoGradients, drawn
from longwave.plan.recall import Windows
from tests.conftest import build, shape_of, tokens

CONTEXT, SCORED = 60, 12


def windows(rows=1, scored=SCORED, seed=1):
    weight = torch.full((rows, scored), 1 / scored)
    return Windows(tokens(rows, CONTEXT + scored + 1, seed), CONTEXT, weight, torch.zeros(rows, dtype=torch.bool))


class Leaves(DynamicCache):
    """transformers' own cache, whose stored tokens have gradients."""

    def __init__(self, config, pairs):
        super().__init__(config=config)
        self.pairs = pairs

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        k, v = self.pairs[layer_idx]
        return torch.cat([k, key_states], 2), torch.cat([v, value_states], 2)

    def get_seq_length(self, *args, **kwargs):
        return CONTEXT

    def get_mask_sizes(self, query_length, *args, **kwargs):
        return CONTEXT + query_length, 0


def test_gradients_are_autograds_through_a_plain_model(models):
    model, stock = models["llama"]
    rows = windows()
    memory = weigh.read(model, rows.ids[:, :CONTEXT])
    ((k, v),) = weigh.gradients(model, memory, rows, 1)
    pairs = [[x.clone().requires_grad_() for x in layer.dense.view()] for layer in memory.memory_layers()]
    cache = Leaves(stock.config, pairs)
    positions = torch.arange(CONTEXT, CONTEXT + SCORED)[None]
    logits = stock(
        rows.ids[:, CONTEXT:-1], **cache_argument(stock, cache), use_cache=True, position_ids=positions
    ).logits
    (score,) = drawn(logits[0].float().log_softmax(-1), rows, 1)
    score.backward()
    for layer, pair in enumerate(pairs):
        for ours, leaf in zip((k[layer], v[layer]), pair, strict=True):
            assert float(leaf.grad.abs().max()) > 0
            assert torch.allclose(ours, leaf.grad, rtol=1e-3, atol=1e-5 * float(leaf.grad.abs().max()))


def noisy(model, memory, rows, noise, rotation):
    """KL in nats a scored token after `noise` [K's or V's, L, n, H, D] on the context, K's before rotation."""
    made, logits = prefill(model, rows.ids[:, :CONTEXT]), []
    for changed in (False, True):
        if changed:
            made = prefill(model, rows.ids[:, :CONTEXT])
            turned = rotation.rotate(noise[0], torch.arange(CONTEXT))
            for number, layer in enumerate(made.memory_layers()):
                k, v = layer.dense.view()
                k += turned[number].transpose(0, 1)
                v += noise[1][number].transpose(0, 1)
        logits.append(
            model(rows.ids[:, CONTEXT:-1], **cache_argument(model, made), use_cache=True).logits.log_softmax(-1)
        )
    exact, now = logits
    return float((exact.exp() * (exact - now)).sum(-1).mean())


@torch.no_grad()
def test_weighted_white_noise_costs_half_its_variance_a_token_wherever_it_lies():
    model = build("llama").double()
    rotation = Rotation.of(model, shape_of(model).memory_layers)
    rotation = Rotation(rotation.partner, rotation.frequency.double(), rotation.scale.double())
    rows, fisher = windows(scored=24), weigh.Fisher(rotation, slice(0, CONTEXT))
    memory = weigh.read(model, rows.ids[:, :CONTEXT])
    for pair in weigh.gradients(model, memory, rows, 400):
        fisher.add(*pair)
    sides, costs = fisher.weights(), []
    draw = torch.Generator().manual_seed(2)
    every = torch.arange(3 * 2 * 8).view(3, 1, 2, 8)
    parts = [
        (0, every < 16),
        (0, every >= 32),
        (1, every < 16),
        (1, every >= 32),
        (0, every % 2 == 0),
        (1, every % 2 == 1),
    ]
    variance = 1e-6
    for side, where in parts:
        kls = []
        for _ in range(6):
            noise = torch.randn(2, 3, CONTEXT, 2, 8, generator=draw, dtype=torch.float64) * variance**0.5
            noise[1 - side] = 0
            noise[side] = torch.where(where, noise[side] / sides[side][:, None], 0)
            kls.append(noisy(model, memory, rows, noise, rotation))
        expected = CONTEXT * int(where.sum()) * variance / 2
        costs.append(sum(kls) / len(kls) / expected)
    assert all(0.6 < cost < 1.6 for cost in costs), costs


def test_a_channel_without_gradient_is_floored():
    rotation = Rotation(torch.arange(8), torch.zeros(1, 8), torch.ones(1, 8))
    fisher = weigh.Fisher(rotation, slice(2, None))
    k, v = (torch.ones(1, 2, 6, 8) for _ in range(2))
    k[..., 3] = 0
    v[:, 1] = 0
    fisher.add([k], [v])
    keys, values = fisher.weights()
    assert float(keys[0, 0, 0]) == pytest.approx(1)
    assert float(keys[0, 0, 3] ** 2) == pytest.approx(weigh.FLOOR * 7 / 8)
    assert bool((values > 0).all())


def test_no_gradients_are_refused():
    rotation = Rotation(torch.arange(8), torch.zeros(1, 8), torch.ones(1, 8))
    for value, why in ((0.0, "no gradients"), (float("nan"), "not finite")):
        fisher = weigh.Fisher(rotation, slice(None))
        fisher.add([torch.full((1, 2, 6, 8), value)], [torch.zeros(1, 2, 6, 8)])
        with pytest.raises(NoGradients, match=why):
            fisher.weights()
    with pytest.raises(NoGradients):
        weigh.Fisher(rotation, slice(None)).weights()


def test_a_reading_leaves_the_cache_as_it_was(llama):
    rows = windows()
    memory = weigh.read(llama, rows.ids[:, :CONTEXT])
    before = [tuple(x.clone() for x in layer.dense.view()) for layer in memory.memory_layers()]
    weigh.gradients(llama, memory, rows, 1)
    for layer, pair in zip(memory.memory_layers(), before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(layer.dense.view(), pair, strict=True))
    assert all(p.requires_grad for p in llama.parameters())
