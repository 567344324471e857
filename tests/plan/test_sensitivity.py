"""Measuring on a small random model whose heads all matter, against running the model the plain way."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import longwave
from longwave import plan
from longwave.plan import KEY_OPTIONS, VALUE_OPTIONS, sensitivity
from longwave.plan.plan import LayerCodes
from longwave.plan.recall import Windows
from longwave.plan.sensitivity import Bench, measure, parts
from longwave.store.pages import PageStore

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
            plain(windows.ids[:, : windows.context], past_key_values=cache, use_cache=True)
            if replace:
                layer = cache.layers[position]
                (layer.keys if side == "k" else layer.values)[:, head, middle] = values
            out = plain(windows.ids[:, windows.context : -1], past_key_values=cache, use_cache=True)
        scores.append(out.logits.double().log_softmax(-1))
    kl = (scores[0].exp() * (scores[0] - scores[1])).sum(-1)
    return (kl * windows.weight).sum(-1).float()


@torch.no_grad()
def coarse(bench, model, position, k_option, v_option):
    """K and V of one layer as an option holds them: [rows, heads, M, dim]."""
    page = plan.Shape(32, DIM, 1, 8, torch.float32)
    k, v = (x[:, :, bench.middle].clone() for x in bench.layers[position].dense.view())
    weight = sensitivity.key_weights(bench)[position]
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
        plain(windows.ids[:, : windows.context], past_key_values=cache, use_cache=True)
        keys = [layer.keys.clone() for layer in cache.layers]
        plain(windows.ids[:, windows.context : -1], past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    weights = sensitivity.key_weights(bench)
    assert weights.shape == (LAYERS, HEADS, DIM)
    for position in range(LAYERS):
        pieces = keys[position][:, :, bench.middle].double().reshape(len(windows.ids), HEADS, -1, 32, DIM)
        spread = (pieces - pieces.mean(3, keepdim=True)).square().mean((0, 2, 3))
        q = seen[position].double().unflatten(-1, (HEADS, 2, DIM))  # before rotation, which mixes a pair's channels
        pairs = q.square().mean((0, 1, 3)).unflatten(-1, (2, DIM // 2)).sum(1)
        measured = (weights[position] / spread).unflatten(-1, (2, DIM // 2)).sum(1)
        torch.testing.assert_close(measured.double(), pairs, rtol=1e-3, atol=1e-6)


def test_windows_too_short_to_compress_are_refused(model):
    with pytest.raises(ValueError, match="window of 51 tokens is too short"):
        measure(model, make_windows(2, context=51), METHOD)  # 4 + 16 + 32 are needed


# the whole measurement


@pytest.fixture(scope="module")
def measured(model):
    return measure(model, make_windows(), METHOD, batch=4)


def test_shapes_and_what_it_is_about(measured):
    assert measured.k_prose.shape == measured.k_recall.shape == (LAYERS, HEADS, len(KEY_OPTIONS))
    assert measured.v_prose.shape == measured.v_recall.shape == (LAYERS, HEADS, len(VALUE_OPTIONS))
    about = measured.about
    assert (about["segment"], about["states"], about["coef_bits"]) == (32, 1, 8)
    assert (about["context"], about["scored"]) == (84, 12)
    assert (about["prose_windows"], about["recall_windows"]) == (2, 2)


@pytest.mark.parametrize("lot", list(LOTS))
def test_costs_fall_as_bits_rise_for_every_head(model, lot):
    """Head 0 included, which once stayed damaged by what had been measured before."""
    found = measure(model, make_windows(4, *LOTS[lot]), METHOD, batch=4)
    for side in ("k", "v"):
        costs = found.costs(side)
        for position in range(LAYERS):
            for head in range(HEADS):
                own = costs[position, head].tolist()
                assert own[0] > 1e-6, (side, position, head)
                assert own[-1] < own[0] / 10, (side, position, head)
                for less, more in pairwise(own):
                    assert more <= less * 1.05 + 1e-7, (side, position, head, own)


@torch.no_grad()
@pytest.mark.parametrize("lot", list(LOTS))
def test_each_cost_is_the_one_measured_alone(model, lot):
    windows = make_windows(2, *LOTS[lot])
    found = measure(model, windows, METHOD, batch=2)
    for position in (0, 2):
        for head in range(HEADS):
            for side, options, chosen in (("k", KEY_OPTIONS, (0, 5, 8)), ("v", VALUE_OPTIONS, (0, 2, 4))):
                for i in chosen:
                    alone = Bench(model, windows, METHOD)
                    pair = (options[i], 0) if side == "k" else (0.0, options[i])
                    values = coarse(alone, model, position, *pair)["kv".index(side)][:, head]
                    cost = alone.cost(position, side, head, values)
                    for kind, row in (("prose", 0), ("recall", 1)):
                        got = getattr(found, f"{side}_{kind}")[position, head, i]
                        torch.testing.assert_close(got, cost[row], rtol=1e-3, atol=1e-8)


def test_only_prose_or_only_recall(model):
    windows = make_windows(4)
    found = measure(model, windows.part(slice(0, 4, 2)), METHOD)
    assert not found.k_recall.any()
    assert not found.v_recall.any()
    assert found.k_prose[..., 0].min() > 0


def test_rows_do_not_depend_on_how_many_are_held_at_once(model):
    """Channels are ordered by the first part, so it is the same here: the first two rows are alike in all lots."""
    one = make_windows(1)
    rows = make_windows(6)
    ids = torch.cat([one.ids, one.ids, rows.ids[2:]])
    windows = Windows(ids, 84, rows.weight, rows.recall)
    small, large = (measure(model, windows, METHOD, batch=batch) for batch in (1, 2))
    for name in ("k_prose", "k_recall", "v_prose", "v_recall"):
        torch.testing.assert_close(getattr(small, name), getattr(large, name), rtol=0, atol=1e-5)
        assert getattr(small, name).max() > 1e-3
    torch.testing.assert_close(small.key_weight, large.key_weight, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_rows_cost_does_not_depend_on_the_other_rows(model):
    windows = make_windows(4)
    together = Bench(model, windows, METHOD)
    values = exact_values(together, 1, "v", 0).mean(1, keepdim=True).expand(-1, 64, -1)
    whole = together.cost(1, "v", 0, values)
    for row in range(4):
        alone = Bench(model, windows.part(slice(row, row + 1)), METHOD).cost(1, "v", 0, values[row : row + 1])
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-3, atol=1e-7)


def test_the_model_is_left_as_it_was(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    measure(model, make_windows(2), METHOD)
    assert len(model.model.layers) == LAYERS
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# going on after a kill


class Killed(Exception):
    pass


def killer(at):
    def progress(done, total):
        if done == at:
            raise Killed

    return progress


SENSITIVE = ("k_prose", "k_recall", "v_prose", "v_recall", "key_weight")


@pytest.fixture
def counted(monkeypatch):
    """Which (layer, rows' first id) were measured."""
    calls = []
    original = sensitivity._layer_costs

    def counting(bench, position, *rest):
        calls.append((int(bench.ids[0, 0]), position))
        return original(bench, position, *rest)

    monkeypatch.setattr(sensitivity, "_layer_costs", counting)
    return calls


@pytest.mark.parametrize("at", [0, 1, 3, 4, 5])
def test_a_killed_run_goes_on(model, tmp_path, counted, at):
    windows, path = make_windows(), tmp_path / "part.jsonl"
    whole = measure(model, windows, METHOD, batch=2)
    every = list(counted)
    assert len(every) == parts(model, windows, 2) == 6
    counted.clear()
    with pytest.raises(Killed):
        measure(model, windows, METHOD, batch=2, partial=path, progress=killer(at))
    assert path.exists()
    assert counted == every[:at]
    counted.clear()
    seen = []
    again = measure(model, windows, METHOD, 2, path, lambda done, total: seen.append((done, total)))
    assert counted == every[at:]  # what was finished is not measured again
    assert seen == [(i, 6) for i in range(7)]
    for name in SENSITIVE:
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert not path.exists()


def test_a_line_that_was_cut_off_is_measured_again(model, tmp_path, counted):
    windows, path = make_windows(), tmp_path / "part.jsonl"
    with pytest.raises(Killed):
        measure(model, windows, METHOD, batch=2, partial=path, progress=killer(4))
    done = list(counted)
    counted.clear()
    path.write_text(path.read_text()[:-40])
    with pytest.raises(Killed):  # killed once more, at once: the file must have been made whole
        measure(model, windows, METHOD, batch=2, partial=path, progress=killer(4))
    assert counted == done[-1:]
    for line in path.read_text().splitlines():
        json.loads(line)
    again = measure(model, windows, METHOD, batch=2, partial=path)
    whole = measure(model, windows, METHOD, batch=2)
    for name in SENSITIVE:
        assert torch.equal(getattr(again, name), getattr(whole, name)), name


OTHERS = {
    "windows": lambda model: (model, make_windows(seed=9), METHOD, 2),
    "weights": lambda model: (model, make_windows(even=False), METHOD, 2),
    "method": lambda model: (model, make_windows(), longwave.Fourier(segment=16, sinks=4, window=16), 2),
    "batch": lambda model: (model, make_windows(), METHOD, 4),
    "model": lambda model: (scaled(model), make_windows(), METHOD, 2),
    "dtype": lambda model: (copy.deepcopy(model).to(torch.bfloat16), make_windows(), METHOD, 2),
}


def scaled(model):
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data *= 1.5
    return other


@pytest.mark.parametrize("other", list(OTHERS))
def test_part_of_another_measurement_is_refused_and_left(model, tmp_path, other):
    path = tmp_path / "part.jsonl"
    with pytest.raises(Killed):
        measure(model, make_windows(), METHOD, 2, path, killer(1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"part\.jsonl holds part of another measurement"):
        measure(*OTHERS[other](model), path)
    assert path.read_bytes() == before


def test_a_file_that_is_something_else_is_refused_and_left(model, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match="holds part of another measurement"):
        measure(model, make_windows(), METHOD, 2, path)
    assert path.read_text() == "my notes\n"
