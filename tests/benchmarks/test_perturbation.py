"""Perturbation on a small random model whose heads all matter, against running the model the plain way."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import longwave
from benchmarks.perturbation import Bench, key_weights, measure
from longwave import plan
from longwave.plan import KEY_OPTIONS, VALUE_OPTIONS
from longwave.plan.plan import LayerCodes
from longwave.plan.recall import Windows
from longwave.store.pages import PageStore
from tests.conftest import into

LAYERS, HEADS, DIM = 3, 2, 16
METHOD = longwave.Fourier(segment=32, sinks=4, window=16)
# scoring the second lot moves the buffers to larger memory and back: 120 + 12 tokens are more than 128
LOTS = {"in place": (84, 12), "moved": (120, 12)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        num_hidden_layers=LAYERS,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    made = LlamaForCausalLM(config)
    for name, parameter in made.named_parameters():
        if "proj" in name:
            parameter.data *= 6
    return made.eval()


def make_windows(rows=4, context=84, scored=12, seed=3, even=True):
    ids = torch.randint(1, 97, (rows, context + scored + 1), generator=torch.Generator().manual_seed(seed))
    weight = torch.full((rows, scored), 1 / scored)
    recall = torch.arange(rows) % 2 == 1
    if not even:  # as answers are: few tokens count
        weight[recall] = 0
        weight[recall, 3:6] = 1 / 3
    return Windows(ids, context, weight, recall)


@pytest.fixture(scope="module", params=list(LOTS))
def windows(request):
    return make_windows(2, *LOTS[request.param], even=False)


@pytest.fixture(scope="module")
def bench(model, windows):
    with torch.no_grad():
        return Bench(model, windows, METHOD)


def memory_of(bench):
    return [x.clone() for layer in bench.layers for x in layer.dense.view()]


def exact_values(bench, position, side, head):
    return bench.layers[position].dense.view()["kv".index(side)][:, head, bench.middle].clone()


def plain_cost(model, windows, middle, position, side, head, values):
    """The same KL through transformers' own cache, with nothing shared."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    scores = []
    for replace in (False, True):
        cache = DynamicCache(config=plain.config)
        with torch.no_grad():
            plain(windows.ids[:, : windows.context], **into(cache), use_cache=True)
            if replace:
                layer = cache.layers[position]
                (layer.keys if side == "k" else layer.values)[:, head, middle] = values
            out = plain(windows.ids[:, windows.context : -1], **into(cache), use_cache=True)
        scores.append(out.logits.double().log_softmax(-1))
    kl = (scores[0].exp() * (scores[0] - scores[1])).sum(-1)
    return (kl * windows.weight).sum(-1).float()


@torch.no_grad()
def coarse(bench, model, position, k_option, v_option):
    """K and V of one layer as an option holds them: [rows, heads, M, dim]."""
    page = plan.Shape(32, DIM, 1, 8, torch.float32)
    k, v = (x[:, :, bench.middle].clone() for x in bench.layers[position].dense.view())
    weight = key_weights(bench)[position]
    order = weight.argsort(dim=-1, descending=True, stable=True)
    weights = weight.gather(-1, order).tolist()
    codes = LayerCodes(
        tuple(plan.key_code(weights[head], k_option, page) for head in range(HEADS)),
        (plan.value_code(v_option, page),) * HEADS,
        order,
        torch.arange(DIM).expand(HEADS, -1),
    )
    store = PageStore(len(k), codes.layout(32, torch.float32), "dct", codes.states, k.device)
    store.append(None, k, v)
    return store.materialize()


# one cost


@torch.no_grad()
@pytest.mark.parametrize("side", ["k", "v"])
def test_the_exact_values_cost_nothing(bench, side):
    for position in range(LAYERS):
        for head in range(HEADS):
            cost = bench.cost(position, side, head, exact_values(bench, position, side, head))
            assert cost.shape == (2,)
            assert cost.abs().max() < 1e-7


@torch.no_grad()
@pytest.mark.parametrize("side", ["k", "v"])
def test_costs_are_those_of_the_plain_model(model, bench, windows, side):
    for position in range(LAYERS):
        for head in range(HEADS):
            values = coarse(bench, model, position, 0.0, 0)["kv".index(side)][:, head]
            got = bench.cost(position, side, head, values)
            expected = plain_cost(model, windows, bench.middle, position, side, head, values)
            assert expected.min() > 1e-6
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=5e-7)  # of float32 logits


@torch.no_grad()
@pytest.mark.parametrize("side", ["k", "v"])
def test_a_cost_leaves_no_damage_behind(bench, side):
    """The next cost, whichever head's, must start from exact memory: heads once paid for those measured before."""
    before = memory_of(bench)
    for position in range(LAYERS):
        for head in range(HEADS):
            bench.cost(position, side, head, exact_values(bench, position, side, head) * 0 + 3)
            for held, exact in zip(memory_of(bench), before, strict=True):
                assert torch.equal(held, exact)


@torch.no_grad()
def test_scoring_from_a_layer_on_equals_the_whole_pass(model, bench):
    full = bench._score(0, None)
    torch.testing.assert_close(full, bench.exact, rtol=0, atol=1e-6)
    for first in range(1, LAYERS):
        torch.testing.assert_close(bench._score(first, bench.inputs[first]), full, rtol=0, atol=1e-6)
    assert len(model.get_decoder().layers) == LAYERS
    # and with a layer damaged: what comes before it does not see it
    position, other = LAYERS - 1, bench.layers[LAYERS - 1].dense
    kept = other.v.clone()
    other.v[:, 0, bench.middle] = 2.0
    part, whole = bench._score(position, bench.inputs[position]), bench._score(0, None)
    bench.layers[position].dense.v[:, :, : kept.shape[2]] = kept[:, :, : bench.layers[position].dense.v.shape[2]]
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-6)
    assert (part - full).abs().max() > 1e-3


def test_key_weights_are_spread_times_query_energy(model, windows, bench):
    seen = {}

    def watch(index):
        def hook(module, args, output):
            seen[index] = output

        return hook

    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    hooks = [layer.self_attn.q_proj.register_forward_hook(watch(i)) for i, layer in enumerate(plain.model.layers)]
    cache = DynamicCache(config=plain.config)
    with torch.no_grad():
        plain(windows.ids[:, : windows.context], **into(cache), use_cache=True)
        keys = [layer.keys.clone() for layer in cache.layers]
        plain(windows.ids[:, windows.context : -1], **into(cache), use_cache=True)
    for hook in hooks:
        hook.remove()
    weights = key_weights(bench)
    assert weights.shape == (LAYERS, HEADS, DIM)
    for position in range(LAYERS):
        pieces = keys[position][:, :, bench.middle].double().reshape(len(windows.ids), HEADS, -1, 32, DIM)
        spread = (pieces - pieces.mean(3, keepdim=True)).square().mean((0, 2, 3))
        q = seen[position].double().unflatten(-1, (HEADS, 2, DIM))  # before rotation, which mixes a pair's channels
        pairs = q.square().mean((0, 1, 3)).unflatten(-1, (2, DIM // 2)).sum(1)
        measured = (weights[position] / spread).unflatten(-1, (2, DIM // 2)).sum(1)
        torch.testing.assert_close(measured.double(), pairs, rtol=1e-3, atol=1e-6)


# the whole measurement


@torch.no_grad()
@pytest.mark.parametrize("lot", list(LOTS))
def test_each_cost_is_the_one_measured_alone(model, lot):
    windows = make_windows(2, *LOTS[lot])
    found = measure(model, windows, METHOD, batch=2)
    assert found.k.shape == (2, LAYERS, HEADS, len(KEY_OPTIONS))
    for position in (0, 2):
        for side, options, chosen in (("k", KEY_OPTIONS, (0, 5)), ("v", VALUE_OPTIONS, (0, 4))):
            for i in chosen:
                alone = Bench(model, windows, METHOD)
                pair = (options[i], 0) if side == "k" else (0.0, options[i])
                values = coarse(alone, model, position, *pair)["kv".index(side)][:, 1]
                cost = alone.cost(position, side, 1, values)
                torch.testing.assert_close(getattr(found, side)[:, position, 1, i], cost, rtol=1e-3, atol=1e-8)
