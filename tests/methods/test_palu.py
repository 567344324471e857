"""palu: axes against the paper's whitened decomposition, attention against rebuilt K and V, ranks, bytes, refusals."""

from dataclasses import replace

import pytest
import torch

import longwave
from longwave.methods.palu import shared
from longwave.plan import automatic, axes
from tests.conftest import ask, build, own_axes, shape_of, tokens
from tests.matrix import ENDS, SmallPalu
from tests.reading import read, read_in


@pytest.fixture(scope="module")
def model():
    return build("llama", torch.float64)


def cached(model, budget=0.5, **options):
    return longwave.cache(model, SmallPalu(axes=own_axes(model), **ENDS, **options), budget=budget)


# axes


def test_axes_are_those_of_the_whitened_decomposition(model):
    """|X (W - L R)| is least: W' M = U S V' with M M' = X'X, the first ones kept, is K on its own first axes."""
    ids, seen = tokens(2, 64, seed=9), {}
    attention = model.model.layers[1].self_attn
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=(args[0] if args else kwargs["hidden_states"])[:, axes.FIRST :]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    x, rank, found = seen["x"].flatten(0, 1), 5, own_axes(model)
    root = torch.linalg.cholesky(x.T @ x)
    for weight, own, powers in (
        (attention.k_proj.weight, found.k, found.powers[0]),
        (attention.v_proj.weight, found.v, found.powers[1]),
    ):
        u, s, vt = torch.linalg.svd(weight.detach() @ root, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ torch.linalg.solve_triangular(root, vt[:rank], upper=False, left=False)
        full = x @ weight.detach().T
        kept = own[1, 0, :rank].double()
        torch.testing.assert_close(full @ kept.T @ kept, x @ low.T, rtol=1e-5, atol=1e-4)
        lost = (full - full @ kept.T @ kept).square().sum()
        torch.testing.assert_close(lost, s[rank:].square().sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(powers[1, 0].double() * len(x), s[: powers.shape[-1]].square(), rtol=1e-4, atol=1e-6)


def test_groups_of_heads_have_axes_of_their_own(model):
    one, two = axes.fit(model, [tokens(2, 64, seed=9)], 1), own_axes(model)
    assert one.k.shape == (3, 2, 8, 8)
    assert two.k.shape == (3, 1, 16, 16)
    for found in (one, two):
        unit = torch.eye(found.k.shape[-1]).expand_as(found.k)
        torch.testing.assert_close(found.k @ found.k.mT, unit, rtol=0, atol=1e-5)
        assert (found.powers.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(one.powers.sum((2, 3)), two.powers.sum((2, 3)))  # nothing is lost


def test_axes_are_measured_once_and_kept(monkeypatch, tmp_path, tokenizer, capsys):
    monkeypatch.setattr(automatic, "_folder", lambda: tmp_path)
    model = build("llama")
    with pytest.raises(ValueError, match="pass tokenizer="):
        longwave.cache(model, "palu", budget=0.5)
    first = longwave.cache(model, "palu", budget=0.5, tokenizer=tokenizer).method
    assert "measured" in capsys.readouterr().err
    second = longwave.cache(model, "palu", budget=0.5).method
    assert not capsys.readouterr().err
    assert first == second
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"damaged")
    assert longwave.cache(model, "palu", budget=0.5, tokenizer=tokenizer).method == first
    assert longwave.cache(build("llama", torch.float64), "palu", budget=1.0).method.ranks == ()


# attention


def test_the_whole_rank_is_exact(model):
    memory, dense, ids = cached(model), longwave.cache(model, "dense"), tokens(2, 80)
    whole = longwave.cache(model, replace(memory.method, ranks=((16, 16),) * 3))
    sizes = (50, 1, 1, 20, 8)
    got, want = (read_in(model, held, ids, sizes) for held in (whole, dense))
    assert max(next(whole.memory_layers()).store.tokens) > 40
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)  # axes are float32
    for ours, theirs in zip(whole.memory_layers(), dense.memory_layers(), strict=True):
        for a, b in zip(ours.materialize(), theirs.materialize(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("queries", [1, 5], ids=["step", "chunk"])
def test_it_answers_as_attention_over_what_it_stands_for(model, queries, heads):
    """Values that are mixed as latents and turned back are values rebuilt first, and keys stand where they stood."""
    method = SmallPalu(axes=axes.fit(model, [tokens(2, 64, seed=9)], heads), heads=heads, **ENDS)
    memory = longwave.cache(model, method, budget=0.5)
    read(model, memory, tokens(2, 60))
    layer = list(memory.memory_layers())[1]
    q = torch.randn(2, 4, queries, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer._before = [n - queries for n in layer.dense.lengths]
    got, (k, v) = ask(layer, q, 0.3), layer.materialize()
    scores = 0.3 * q @ k.repeat_interleave(2, 1).mT
    hidden = torch.arange(k.shape[2]) > torch.arange(k.shape[2] - queries, k.shape[2])[:, None]
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_what_is_kept_of_a_token_is_its_part_on_the_axes(model):
    memory, dense, ids = cached(model), longwave.cache(model, "dense"), tokens(1, 60)
    read(model, memory, ids)
    read(model, dense, ids)
    ours, theirs = next(memory.memory_layers()), next(dense.memory_layers())
    (_, got), (_, v) = ours.materialize(), theirs.materialize()
    own = own_axes(model).v[0, 0, : memory.method.ranks[0][1]].double()
    middle = v[0, :, 2:50].transpose(0, 1).flatten(1)  # both heads side by side
    torch.testing.assert_close(got[0, :, 2:50].transpose(0, 1).flatten(1), middle @ own.T @ own, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[:, :, 50:], v[:, :, 50:])


# ranks


def test_ranks_go_where_most_is_carried():
    powers = torch.tensor([[8.0, 1, 1, 0], [4, 3, 2, 1]])[:, None, None].expand(2, 1, 2, 4)  # K .8 .1 .1 0, V .4 .3 ..
    assert [shared(powers, n) for n in range(2, 9)] == [
        ((1, 1),), ((1, 2),), ((1, 3),), ((2, 3),), ((3, 3),), ((3, 4),), ((4, 4),)
    ]  # fmt: skip


@pytest.mark.parametrize("budget", [0.12, 0.3, 0.5, 0.9])
def test_a_budget_is_spent_and_not_more(model, budget):
    bound = cached(model, budget).method
    token = sum(sum(pair) for pair in bound.ranks) * 8 + 3 * 4
    dense = 3 * bound.shape.token_bytes
    assert budget * dense - 8 < token <= budget * dense
    assert bound.page_fraction() == pytest.approx(token / dense)


def test_less_is_lost_with_more(model):
    ids, dense = tokens(2, 90), longwave.cache(model, "dense")
    want = read_in(model, dense, ids, (60, 30))[:, 60:].log_softmax(-1)
    losses = []
    for budget in (0.2, 0.5, 0.8):
        got = read_in(model, cached(model, budget), ids, (60, 30))[:, 60:].log_softmax(-1)
        losses.append(float((want.exp() * (want - got)).sum(-1).mean()))
    assert losses[0] > losses[1] > losses[2] > 0


def test_a_size_decides_as_well(model):
    whole = longwave.cache(model, "dense").method.nbytes(300)
    memory = longwave.cache(model, SmallPalu(axes=own_axes(model), **ENDS), budget=f"{whole * 4 // 5}B", max_tokens=300)
    read(model, memory, tokens(1, 300))
    assert memory.nbytes <= whole * 4 // 5
    assert memory.method.ranks


def test_what_cannot_be_is_refused(model):
    for options, message in (
        (dict(sinks=-1), "sinks is a whole number"),
        (dict(window=0), "window is a whole number"),
        (dict(heads=0), "heads is a whole number"),
        (dict(axes="found"), "axes are what"),
    ):
        with pytest.raises(ValueError, match=message):
            longwave.Palu(**options)
    with pytest.raises(ValueError, match="store is a method of pages"):
        longwave.SnapKV(store="palu")
    with pytest.raises(ValueError, match="leaves no axis"):
        cached(model, 0.05)
    with pytest.raises(ValueError, match="heads divides the model's 2 KV heads"):
        longwave.cache(model, "palu", 0.5, heads=3)
    with pytest.raises(ValueError, match=r"axes are \[3, 1, 16, 16\]"):
        cached(model, heads=1)
    with pytest.raises(ValueError, match="not known"):
        longwave.Palu().bind(shape_of(model), None, 0.5)
