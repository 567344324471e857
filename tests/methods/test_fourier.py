"""What fourier decides: its plans, what it says of them, and what it refuses. What its pages do: test_segmented.py."""

import warnings
from dataclasses import replace

import pytest
import torch

import longwave
from longwave.methods.base import CacheShape
from longwave.plan.profile import Sensitivity
from tests.conftest import random_profile, shape_of

# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(segment=0), "segment is a whole number of tokens, at least 8; got 0"),
        (dict(segment=100), "segment is a multiple of 8, got 100"),
        (dict(segment=None), "segment is a whole number of tokens.*None"),
        (dict(segment=True), "segment is a whole number of tokens.*True"),
        (dict(sinks=-1), "sinks is a whole number of tokens, at least 0; got -1"),
        (dict(window=0), "window is a whole number of tokens, at least 1; got 0"),
        (dict(window=2.5), "window is a whole number of tokens.*2.5"),
        (dict(plan="best"), "plan is measured, uniform, bits or safe, got 'best'"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.Fourier(**options)


@pytest.mark.parametrize("option", ["keep", "keep_bits", "states", "coef_bits", "basis", "gain", "quota", "reserve"])
def test_options_that_earned_nothing_are_gone(llama, option):
    with pytest.raises(ValueError, match=f"fourier has no option '{option}'"):
        longwave.cache(llama, "fourier", **{option: 1})


# the plan


@pytest.mark.parametrize("plan", ["measured", "uniform", "bits"])
def test_budget_bounds_the_pages(llama, plan):
    options = longwave.Fourier(plan=plan, segment=16)
    biggest = 1 / 6  # of the pages: three layers of two heads, and a plan decides a head at a time
    for budget in (1.0, 0.75, 0.5, 0.25):
        bound = options.bind(shape_of(llama), random_profile(llama), budget)
        assert budget - biggest < bound.page_fraction() <= budget


def test_smallest_plan_is_named(llama):
    shape, options, profile = shape_of(llama), longwave.Fourier(segment=16), random_profile(llama)
    # of 1,024 bytes a head: an int8 mean of 8 channels and its gain, for K and V, each in 16 bytes
    assert options.least_budget(shape, profile) == 64 / 1024
    assert not any(table.any() for pair in options.bind(shape, profile, 0.0625).kept for table in pair)
    with pytest.raises(ValueError, match=r"0\.062 is less than fourier can do.*smallest plan takes 0\.0625"):
        options.bind(shape, profile, 0.062)


def test_without_a_measurement_a_plan_is_safe_or_refused():
    """Nothing but means in the last third of the layers at most, and 0.14 of 16 bits at least."""
    shape, options = CacheShape(tuple(range(6)), (), 2, 128, torch.bfloat16), longwave.Fourier()
    assert options.least_budget(shape) == 0.14
    for budget in (0.14, 0.15625, 0.25):
        bound = options.bind(shape, None, budget)
        assert 0.9 * budget < bound.page_fraction() <= budget
        assert bound.expected is None
        for position, layer in enumerate(bound.plan):
            for key, value in zip(layer.k, layer.v, strict=True):
                assert position >= 4 or (key.kept == value.kept == 128)
                assert key.kept == 0 or min(bits for bits, _ in key.runs) >= 3
                assert value.kept == 0 or min(bits for bits, _ in value.runs) >= 2
    with pytest.raises(ValueError, match=r"0\.13 .* not measured \(0\.14\): .* fall apart.*measure=False.*larger"):
        options.bind(shape, None, 0.13)
    with pytest.raises(ValueError, match=r"0\.001 is less than fourier can do with these options"):
        options.bind(shape, None, 0.001)
    assert longwave.Fourier().least_budget(replace(shape, dtype=torch.float32)) == 0.07


def test_a_safe_plan_looks_at_no_measurement(llama):
    forced, shape = longwave.Fourier(segment=16, plan="safe"), shape_of(llama)
    ours, theirs = (forced.bind(shape, profile, 0.3) for profile in (random_profile(llama), None))
    assert ours == theirs
    assert ours.profile == ""


def test_bits_compress_no_channel(llama):
    bound = longwave.Fourier(plan="bits", segment=16).bind(shape_of(llama), random_profile(llama), 0.4)
    assert all(table.all() for pair in bound.kept for table in pair)


def test_a_head_that_costs_more_gets_more(llama):
    profile = random_profile(llama)
    found = profile.sensitivity
    costs = [torch.linspace(1, 0.1, x.shape[-1]).expand_as(x).clone() for x in (found.k, found.v)]
    for x in costs:
        x[:, 1, 0] *= 100
    measured = Sensitivity(found.about, *costs, found.both + 100, found.recall, found.key_weight)
    bound = longwave.Fourier(segment=16).bind(shape_of(llama), replace(profile, sensitivity=measured), 0.15)
    bits = [
        sum(b * n for code in (layer.k[head], layer.v[head]) for b, n in code.runs)
        for layer in bound.plan
        for head in range(2)
    ]
    assert bits[2] == max(bits) > min(bits)


def test_everything_is_kept_where_the_budget_allows_it_and_nothing_costs_anything(llama):
    profile = random_profile(llama)
    found = profile.sensitivity
    free = [torch.zeros_like(x) for x in (found.k, found.v, found.both)]
    measured = Sensitivity(found.about, *free, found.recall, found.key_weight)
    bound = longwave.Fourier(segment=16).bind(shape_of(llama), replace(profile, sensitivity=measured), 1.0)
    assert bound.page_fraction() == 1


def test_nothing_measured_says_so(llama):
    profile = replace(random_profile(llama), sensitivity=None)
    with pytest.warns(UserWarning, match="not measured"):
        memory = longwave.cache(llama, "fourier", profile=profile)
    assert "nothing measured" in str(memory.method)
    for kind in ("measured", "uniform", "bits"):
        with pytest.raises(ValueError, match=f'plan="{kind}" needs a measurement of the model.*longwave calibrate'):
            longwave.cache(llama, "fourier", plan=kind, profile=profile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longwave.cache(llama, "fourier", plan="safe", profile=profile)


# of which pages the costs were measured


def cut(profile, **about):
    """A profile that was measured on pages cut as `about` says."""
    found = profile.sensitivity
    return replace(profile, sensitivity=replace(found, about={**found.about, **about}))


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (dict(segment=128, states=1), "segment 128, not 16"),
        (dict(segment=128), "segment 128, not 16"),
        (dict(segment=16, states=4), "states 4, not 1"),
        (dict(segment=32, states=2), "segment 32, not 16, states 2, not 1"),
    ],
    ids=str,
)
def test_costs_of_other_pages_are_not_called_a_measurement(llama, about, words):
    profile = cut(random_profile(llama), **about)
    with pytest.warns(UserWarning, match=rf"costs are of other pages than these \({words}\).*measure again"):
        memory = longwave.cache(llama, "fourier", segment=16, budget=0.4, profile=profile)
    assert f"by costs of other pages ({words})" in str(memory.method)


@pytest.mark.parametrize(
    ("about", "budget"),
    [(dict(segment=16, states=1, coef_bits=8, basis="dct"), 0.4), ({}, 0.4), (dict(segment=128), 1.0)],
    ids=["the same", "not said", "all is kept"],
)
def test_costs_of_the_same_pages_are(llama, about, budget):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile = cut(random_profile(llama), **about)
        memory = longwave.cache(llama, "fourier", segment=16, budget=budget, profile=profile)
    start = "everything kept" if budget == 1 else f"measured plan for {budget:g}, expected KL"
    assert str(memory.method).startswith(f"fourier({start}")
    assert memory.method.warning is None


def test_the_shipped_measurement_is_of_the_default_pages(smollm2):
    model, _ = smollm2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(longwave.cache(model, "fourier").method).startswith("fourier(measured plan for 0.25, expected KL ")
    with pytest.warns(UserWarning, match="not measured"):  # pages of another cut are
        longwave.cache(model, "fourier", segment=16, measure=False)
