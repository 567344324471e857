"""Probes on small random models whose heads all matter: against autograd, and against doing what they predict."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import longwave
from benchmarks import perturbation
from longwave import plan as planner
from longwave.evals.fork import fork, prefill
from longwave.evals.loss import score
from longwave.ops.attention.reference import dense_attention
from longwave.ops.spectral.layout import OWN, Code
from longwave.plan import BOTH_OPTIONS, KEY_OPTIONS, VALUE_OPTIONS, probe
from longwave.plan.plan import LayerCodes
from longwave.plan.probe import Bench, costs, measure, stored
from longwave.plan.recall import Windows
from longwave.shape import CacheShape
from tests.conftest import SMALL, into, merging_profile, shape_of
from tests.models.checks import build as build_row
from tests.models.table import ROWS

METHOD = longwave.Fourier(segment=16, sinks=2, window=16)
CONTEXT, SCORED = 84, 12


def make(kind="llama", dtype=torch.float32, scale=12.0, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, "head_dim": 16, "num_hidden_layers": 3, **more})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "proj" in name or "c_attn" in name:
            parameter.data *= scale
    return model.to(dtype).eval()


def make_windows(rows=2, seed=3):
    ids = torch.randint(1, 97, (rows, CONTEXT + SCORED + 1), generator=torch.Generator().manual_seed(seed))
    weight = torch.full((rows, SCORED), 1 / SCORED)
    recall = torch.arange(rows) % 2 == 1
    weight[recall] = 0
    weight[recall, 3:6] = 1 / 3
    return Windows(ids, CONTEXT, weight, recall)


@pytest.fixture(scope="module")
def model():
    return make()


# the pass with gradients


@pytest.mark.parametrize("block", [None, 5])
def test_the_backward_pass_is_autograds(block, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v, own_k, own_v = (
        torch.randn(2, heads, tokens, 8, generator=g, dtype=torch.float64)
        for heads, tokens in ((6, 7), (3, 20), (3, 20), (3, 7), (3, 7))
    )
    if block:
        monkeypatch.setattr(probe, "query_block", lambda rows, columns: block)
    asked = [x.requires_grad_() for x in (q, own_k, own_v)]
    seen = 20 + torch.arange(1, 8).expand(2, -1)
    plain = dense_attention(q, torch.cat([k, own_k], 2), torch.cat([v, own_v], 2), 0.3, seen)
    ours = probe.ContextAttention.apply(q, own_k, own_v, k, v, 0.3)
    torch.testing.assert_close(ours, plain)
    slope = torch.randn(plain.shape, generator=g, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, asked, slope), torch.autograd.grad(plain, asked, slope), strict=True):
        torch.testing.assert_close(a, b)


def test_learned_sinks_take_their_share_in_both_directions():
    g = torch.Generator().manual_seed(0)
    q, k, v, own_k, own_v = (
        torch.randn(2, heads, tokens, 8, generator=g, dtype=torch.float64)
        for heads, tokens in ((6, 7), (3, 20), (3, 20), (3, 7), (3, 7))
    )
    sinks = torch.randn(6, generator=g, dtype=torch.float64) + 2
    asked = [x.requires_grad_() for x in (q, own_k, own_v)]
    keys, values = (torch.cat(pair, 2).repeat_interleave(2, 1) for pair in ((k, own_k), (v, own_v)))
    scores = (q @ keys.mT * 0.3).masked_fill(torch.arange(27) > 20 + torch.arange(7)[:, None], float("-inf"))
    shares = torch.cat([scores, sinks[None, :, None, None].expand(2, 6, 7, 1)], -1).softmax(-1)[..., :-1]
    plain = shares @ values
    ours = probe.ContextAttention.apply(q, own_k, own_v, k, v, 0.3, sinks)
    torch.testing.assert_close(ours, plain)
    slope = torch.randn(plain.shape, generator=g, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, asked, slope), torch.autograd.grad(plain, asked, slope), strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_with_sinks_is_measured_with_them():
    """What each change moves is what attention with sinks gives less: by the definition, of V's means."""
    model = build_row(next(row for row in ROWS if row.kind == "gpt_oss"))
    bench = Bench(model, make_windows(), METHOD, 2)
    (layer,) = bench.layers
    k, v = layer.dense.view()
    flat = torch.zeros_like(v[:, :, bench.middle])
    (dots,) = bench.dots(0, iter([(None, flat, None)]))
    keys = torch.cat([k, layer.own[0]], 2).repeat_interleave(2, 1)
    scores = layer.q @ keys.mT * layer.scaling
    hidden = torch.arange(keys.shape[2]) > k.shape[2] + torch.arange(layer.q.shape[2])[:, None]
    beside = layer.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    shares = torch.cat([scores.masked_fill(hidden, float("-inf")), beside], -1).softmax(-1)
    moved = -shares[..., bench.middle] @ v[:, :, bench.middle].repeat_interleave(2, 1)
    want = (bench.probes[0] * moved).sum(-1).unflatten(2, (k.shape[1], -1)).sum(3)
    torch.testing.assert_close(dots, want, rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_the_plain_model(model):
    """Of the last layer's answer: moved by a hair before the output projection, what is said moves as they tell."""
    windows = make_windows()
    bench = Bench(model, windows, METHOD, 3, temperature=1.0)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    for position in (0, 2):
        moved = torch.zeros_like(bench.layers[position].out)

        def shift(module, args, moved=moved):
            flat = moved.transpose(1, 2).flatten(2)
            return (args[0] + flat if args[0].shape[1] == SCORED else args[0],)

        hook = plain.model.layers[position].self_attn.o_proj.register_forward_pre_hook(shift)
        moved.requires_grad_()
        cache = DynamicCache(config=plain.config)
        with torch.no_grad():
            plain(windows.ids[:, :CONTEXT], **into(cache), use_cache=True)
        logits = plain(windows.ids[:, CONTEXT:-1], **into(cache), use_cache=True).logits
        logp = logits[windows.weight > 0].log_softmax(-1)
        # what the first probe said, drawn again
        uniform = torch.cat(
            [torch.rand(3, n, generator=torch.Generator().manual_seed(i)) for i, n in ((0, 12), (1, 3))], -1
        )
        said = (logp.detach().exp().cumsum(-1) > uniform[0][:, None]).float().argmax(-1)
        weight = windows.weight[windows.weight > 0].sqrt()
        expected = torch.autograd.grad((logp.gather(1, said[:, None])[:, 0] * weight).sum(), moved)[0]
        torch.testing.assert_close(bench.probes[position][0], expected, rtol=1e-3, atol=1e-5)
        hook.remove()


def test_the_model_is_left_as_it_was(model):
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: (x.clone(), x.requires_grad) for name, x in model.named_parameters()}
    measure(model, make_windows(), METHOD, probes=1)
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name][0])
        assert x.requires_grad is before[name][1]
        assert x.grad is None
    frozen.requires_grad_()


# what it predicts


def small_changes(bench, position, size):
    g = torch.Generator().manual_seed(position)
    for side, x in zip("kv", bench.layers[position].dense.view(), strict=True):
        middle = x[:, :, bench.middle]
        yield side, middle + size * middle.std() * torch.randn(middle.shape, generator=g)


def test_the_cost_of_a_small_change_is_its_divergence():
    """Against changing one head and running the model: the mean over many probes, positions together."""
    model, windows = make(dtype=torch.float64, scale=6.0), make_windows()
    ours, theirs = Bench(model, windows, METHOD, 600, temperature=1.0), perturbation.Bench(model, windows, METHOD)
    changes = list(small_changes(ours, 0, 0.3))
    given = ((middle, None, None) if side == "k" else (None, middle, None) for side, middle in changes)
    for (side, middle), dot in zip(changes, ours.dots(0, given), strict=True):
        found = costs(dot, "full").mean(0)  # [rows, heads]
        for head in range(2):
            with torch.no_grad():
                kl = theirs.cost(0, side, head, middle[:, head])
            assert kl.min() > 1e-6
            torch.testing.assert_close(found[:, head].double(), kl.double(), rtol=0.4, atol=0)


def test_a_temperature_flattens_what_is_drawn(model):
    """At 2 a probe is twice the gradient of the flattened log-probability; costs stay in nats of the model's logits."""
    windows = make_windows()
    cold, warm = (measure(model, windows, METHOD, 16, temperature=t).costs("v").sum() for t in (1.0, 2.0))
    assert 0.5 < float(warm / cold) < 20
    assert float(warm / cold) != pytest.approx(1.0, rel=0.01)


def test_positions_alone_miss_what_they_have_in_common(model):
    dot = torch.randn(5, 2, 3, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(costs(dot, "diag"), dot.square().sum(-1) / 2)
    assert torch.equal(costs(dot, "full"), dot.sum(-1).square() / 2)
    alike = torch.ones(1, 1, 1, 12)
    assert float(costs(alike, "full")) == 12 * float(costs(alike, "diag"))
    with pytest.raises(ValueError, match="form is diag or full, got 'best'"):
        measure(model, make_windows(), METHOD, form="best")


@pytest.mark.parametrize("form", probe.FORMS)
def test_costs_of_options_go_with_those_of_perturbation(model, form):
    windows = make_windows(4)
    ours, theirs = measure(model, windows, METHOD, 16, form, batch=4), perturbation.measure(model, windows, METHOD)
    torch.testing.assert_close(ours.key_weight, theirs.key_weight, rtol=1e-3, atol=1e-6)
    for side in "kv":
        both = torch.stack([x.costs(side).clamp(min=1e-9).log().flatten() for x in (ours, theirs)])
        assert float(torch.corrcoef(both)[0, 1]) > 0.9


def test_what_merging_costs_is_what_a_cache_loses_by_it():
    """Of every head alone, K, V and bias together: measured by probes, and by a cache that merges that head."""
    model, windows = make(dtype=torch.float64, scale=8.0), make_windows(2)
    windows = replace(windows, weight=torch.full_like(windows.weight, 1 / SCORED), recall=windows.recall & False)
    found = measure(model, windows, METHOD, 300, "full", temperature=1.0).both[..., 0]
    page, order = METHOD.page(shape_of(model)), torch.arange(16).expand(2, -1)
    merged, whole = planner.both_codes("merged", page), Code(((OWN, 16),), states=0)
    bound = METHOD.bind(shape_of(model), merging_profile(model), 0.5)
    memory = prefill(model, windows.ids[:, :CONTEXT], needs=bound.needs)
    exact = score(model, fork(memory, longwave.cache(model, "dense")), windows.ids[:, CONTEXT:])
    lost = torch.zeros_like(found)
    for position in range(3):
        for head in range(2):
            plan = [LayerCodes((whole,) * 2, (whole,) * 2, order, order) for _ in range(3)]
            k, v = ([side if h == head else whole for h in range(2)] for side in merged)
            plan[position] = LayerCodes(tuple(k), tuple(v), order, order)
            alone = fork(memory, longwave.cache(model, replace(bound, plan=tuple(plan))))
            lost[:, position, head] = score(model, alone, windows.ids[:, CONTEXT:]).divergence(exact)[0].mean(-1)
    assert lost.min() > 1e-6
    assert torch.corrcoef(torch.stack([found.flatten().log(), lost.flatten().log()]))[0, 1] > 0.9
    assert 0.7 < float((found / lost).median()) < 1.4


def test_options_are_stored_as_pages_store_them(model):
    bench = Bench(model, make_windows(), METHOD, 1)
    page = METHOD.page(shape_of(model))
    weight = bench.key_weight(1, 16)
    made = list(stored(bench, 1, weight, page))
    assert [tuple(x is not None for x in one) for one in made] == [
        *[(True, False, False)] * len(KEY_OPTIONS),
        *[(False, True, False)] * len(VALUE_OPTIONS),
        *[(True, True, True)] * len(BOTH_OPTIONS),
    ]
    k, v = (x[:, :, bench.middle] for x in bench.layers[1].dense.view())
    mean = k.unflatten(2, (-1, 16)).mean(3, keepdim=True).expand(-1, -1, -1, 16, -1).flatten(2, 3)
    torch.testing.assert_close(made[0][0], mean, rtol=0, atol=0.02 * float(k.abs().max()))
    errors = [
        float((v - value if key is None else k - key).square().mean()) for key, value, _ in made[: -len(BOTH_OPTIONS)]
    ]
    assert errors[: len(KEY_OPTIONS)] == sorted(errors[: len(KEY_OPTIONS)], reverse=True)
    assert errors[len(KEY_OPTIONS) :] == sorted(errors[len(KEY_OPTIONS) :], reverse=True)


# the whole measurement


def test_shapes_and_what_it_is_about(model):
    seen = []
    found = measure(model, make_windows(3), METHOD, 2, progress=lambda *n: seen.append(n))
    assert found.k.shape == (3, 3, 2, len(KEY_OPTIONS))
    assert found.v.shape == (3, 3, 2, len(VALUE_OPTIONS))
    assert found.recall.tolist() == [False, True, False]
    wanted = {"segment": 16, "states": 1, "context": CONTEXT, "scored": SCORED, "probes": 2, "form": "diag"}
    assert {key: found.about[key] for key in wanted} == wanted
    assert seen[0] == (0, 12)
    assert seen[-1] == (12, 12)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_rows_do_not_depend_on_how_many_are_held_at_once(model):
    windows = make_windows(4)
    windows.ids[1] = windows.ids[0]  # channels are ordered by the first part, so it is the same here
    one, two = (measure(model, windows, METHOD, 2, batch=batch) for batch in (1, 2))
    for name in "kv":
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_measure_what_32_do(dtype):
    exact = measure(make(scale=6.0), make_windows(4), METHOD, 8)
    found = measure(make(dtype=dtype, scale=6.0), make_windows(4), METHOD, 8)
    for side in "kv":
        both = torch.stack([x.costs(side).clamp(min=1e-8).log().flatten() for x in (exact, found)])
        assert float(torch.corrcoef(both)[0, 1]) > 0.97


def test_windows_too_short_to_compress_are_refused(model):
    windows = make_windows()
    short = Windows(windows.ids[:, : 33 + SCORED + 1], 33, windows.weight, windows.recall)
    with pytest.raises(ValueError, match="window of 33 tokens is too short for fourier"):
        measure(model, short, METHOD)


class Opaque(torch.nn.Linear):
    """Weights whose product has no backward pass, as some kernels of quantised weights."""

    def forward(self, x):
        return super().forward(x.detach()).detach()


@pytest.mark.parametrize("which", [slice(None), slice(1, 2)], ids=["all layers", "one layer"])
def test_weights_without_gradients_say_so(which):
    model = make()
    for layer in model.model.layers[which]:
        for part, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            plain = getattr(part, name)
            opaque = Opaque(plain.in_features, plain.out_features, bias=False)
            opaque.weight = plain.weight
            setattr(part, name, opaque)
    with pytest.raises(probe.NoGradients, match="no gradients go through this model's weights"):
        measure(model, make_windows(), METHOD, 1)


LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
HYBRIDS = {
    "gemma3_text": dict(num_hidden_layers=6, sliding_window=32),
    "qwen3_5_text": dict(LINEAR, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]),
    "gpt2": dict(hidden_size=64, num_hidden_layers=2, num_key_value_heads=4),
    "phi3": dict(num_hidden_layers=2),
}


@pytest.mark.parametrize("kind", list(HYBRIDS))
def test_any_architecture(kind):
    """Sliding and linear layers take part, and layers may be named as they like."""
    model = make(kind, scale=6.0, **HYBRIDS[kind])
    shape = CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)
    found = measure(model, make_windows(), METHOD, 2)
    assert found.k.shape[1:3] == (len(shape.memory_layers), shape.kv_heads)
    for side in "kv":
        every = found.costs(side)
        assert (every[..., 0] > 0).all()
        assert every[..., -1].sum() < every[..., 0].sum() / 2
