"""The published setting. What its period does as a store: test_segmented.py and tests/store/test_period.py."""

import pytest
import torch

import longwave
from longwave.methods import get_method
from longwave.methods.base import CacheShape
from longwave.methods.fourier_paper import paper_share
from tests.conftest import build, into, random_profile, shape_of, tokens

SMALL = dict(states=16, sinks=2, window=8, reserve=16)


def test_the_defaults_are_the_published_ones():
    paper = get_method("fourier-paper")
    assert paper == longwave.FourierPaper()
    assert (paper.keep, paper.states, paper.sinks, paper.window, paper.stretch) == (None, 1024, 4, 1020, True)
    assert [paper_share(i, 32) for i in (0, 3, 4, 23, 24, 31)] == [(0.9, 0.95)] * 2 + [(0.8, 0.8)] * 2 + [
        (0.5, 0.7)
    ] * 2


def test_the_counts_of_the_published_profile():
    """Llama-3.1-8B: 8 heads of 128 channels, 32 layers."""
    shape = CacheShape(tuple(range(32)), (), 8, 128, torch.bfloat16)
    errors = torch.rand(32, 8, 128, generator=torch.Generator().manual_seed(0))
    kept = longwave.FourierPaper().bind(shape, longwave.Profile({}, {}, {}, errors, errors), None).kept
    compressed = [tuple(int((~table).sum()) for table in pair) for pair in kept]
    assert compressed == [(921, 972)] * 4 + [(819, 819)] * 20 + [(512, 716)] * 8
    assert sum(k + v for k, v in compressed) == 50156


def test_channels_are_ranked_over_a_layer(llama):
    profile = random_profile(llama)
    kept = longwave.FourierPaper(keep=(0.25, 0.5)).bind(shape_of(llama), profile, None).kept
    for position, pair in enumerate(kept):
        for side, table, count in zip("kv", pair, (4, 8), strict=True):
            errors = profile.error(side, position)
            assert int(table.sum()) == count
            assert errors[table].min() > errors[~table].max()
    assert any(len(set(table.sum(-1).tolist())) > 1 for pair in kept for table in pair)  # heads differ


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_all_or_nothing_needs_no_profile(llama, keep):
    kept = longwave.cache(llama, longwave.FourierPaper(keep=keep, **SMALL)).method.kept
    assert all(bool((table == (keep == 1.0)).all()) for pair in kept for table in pair)


def test_it_takes_no_budget(llama):
    with pytest.raises(ValueError, match="fourier-paper keeps what the paper keeps and takes no budget: use fourier"):
        longwave.cache(llama, "fourier-paper", 0.5, random_profile(llama))


def test_without_a_profile_it_names_calibrate(llama):
    with pytest.raises(ValueError, match="longwave calibrate MODEL --method fourier-paper --text FILE --out PROFILE"):
        longwave.cache(llama, "fourier-paper")


def test_other_channels_are_other_decisions(llama):
    shape = shape_of(llama)
    first, again, second = (longwave.FourierPaper().bind(shape, random_profile(llama, i), None) for i in (0, 0, 1))
    assert first == again
    assert first != second
    assert first != longwave.FourierPaper(stretch=False).bind(shape, random_profile(llama), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_everything_kept_equals_dense(dtype):
    model, ids = build("llama", dtype), tokens(2, 90)
    expected = model(ids, use_cache=False).logits
    memory = longwave.cache(model, longwave.FourierPaper(keep=1.0, **SMALL))
    with torch.no_grad():
        got = [model(ids[:, a:b], **into(memory)).logits for a, b in ((0, 60), (60, 89), (89, 90))]
    assert all(layer.store is not None for layer in memory.memory_layers())
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-4)


def test_stretching_changes_what_is_read(llama):
    ids, held = tokens(1, 90), {}
    for stretch in (True, False):
        memory = longwave.cache(llama, longwave.FourierPaper(keep=0.0, stretch=stretch, **SMALL))
        with torch.no_grad():
            llama(ids, **into(memory))
        held[stretch] = memory.layers[0].materialize()[0][:, :, 2:-8]
    exact = longwave.cache(llama, "dense")
    with torch.no_grad():
        llama(ids, **into(exact))
    true = exact.layers[0].materialize()[0][:, :, 2:-8]
    centred = {name: (x - x.mean(2, keepdim=True)).abs().amax(2) for name, x in {**held, "true": true}.items()}
    torch.testing.assert_close(centred[True], centred["true"], rtol=1e-4, atol=1e-5)
    assert (centred[False] < 0.95 * centred["true"]).any()


def test_growth_crosses_the_threshold(llama):
    """A short prompt that grows past sinks + window + states is compressed then; the release keeps it dense."""
    memory = longwave.cache(llama, longwave.FourierPaper(**SMALL), profile=random_profile(llama))
    llama.generate(tokens(1, 20), **into(memory), max_new_tokens=60, do_sample=False)
    assert all(layer.store is not None and layer.store.tokens[0] > 16 for layer in memory.memory_layers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep=1.5), "keep is a share of channels from 0 to 1.*1.5"),
        (dict(keep=-0.1), "from 0 to 1"),
        (dict(keep=float("nan")), "from 0 to 1"),
        (dict(keep="paper"), "from 0 to 1.*'paper'"),
        (dict(keep=(0.1, 0.2, 0.3)), r"\(K, V\)"),
        (dict(keep=(0.1, 2)), r"\(K, V\).*\(0.1, 2\)"),
        (dict(keep=True), "True"),
        (dict(states=0), "states is a whole number of coefficients, at least 2; got 0"),
        (dict(states=2.5), "2.5"),
        (dict(states=7), "must be even; got 7"),
        (dict(sinks=-1), "sinks is a whole number of tokens, at least 0; got -1"),
        (dict(window=0), "window is a whole number of tokens, at least 1; got 0"),
        (dict(reserve=0), "reserve is a whole number of tokens, at least 1; got 0"),
        (dict(stretch=1), "stretch is True or False, got 1"),
        (dict(stretch="max"), "stretch is True or False, got 'max'"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.FourierPaper(**options)
