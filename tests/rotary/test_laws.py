"""The scaling law's figures: published factors, the lengths that they reach, and the critical dimensions."""

import math

import pytest

from longwave.rotary import critical_dimension, ntk_factor, ntk_reach

LLADA, LLAMA3, DREAM = (500_000, 128, 4096), (500_000, 128, 8192), (1_000_000, 128, 2048)


@pytest.mark.parametrize(
    ("model", "extra", "factors"),
    [
        (LLADA, 64, {8192: (3.40, 4), 16384: (13.60, 14), 24576: (30.60, 31), 32768: (54.40, 55)}),
        (LLAMA3, 70, {16384: (3.53, 4), 32768: (12.54, 13)}),
        (DREAM, 54, {4096: (4.68, 5)}),
    ],
    ids=["LLaDA", "LLaMA3", "Dream"],
)
def test_published_factors(model, extra, factors):
    base, dim, _ = model
    assert critical_dimension(*model) == extra
    for target, (raw, used) in factors.items():
        assert (target / (2 * math.pi)) ** (dim / extra) / base == pytest.approx(raw, abs=0.005)
        assert ntk_factor(*model, target) == used


def test_diffusion_models_see_distances_of_both_signs():
    """UltraLLaDA's: twice both lengths."""
    targets = (8192, 16384, 32768, 65536, 131072)
    assert critical_dimension(500_000, 128, 2 * 4096) == 70
    assert [ntk_factor(*LLADA, target, both_signs=True) for target in targets] == [4, 13, 45, 159, 562]
    for target in targets:
        factor = ntk_factor(*LLADA, target, both_signs=True)
        assert ntk_reach(*LLADA, factor, both_signs=True) >= target > ntk_reach(*LLADA, factor - 1, both_signs=True)


def test_what_a_factor_reaches():
    assert [round(ntk_reach(*LLADA, factor)) for factor in (1, 4, 14, 31, 55)] == [4443, 8886, 16624, 24737, 32949]
    llama2 = (10_000, 128, 4096)
    assert critical_dimension(*llama2) == 92
    assert [round(ntk_reach(*llama2, factor)) for factor in (1, 4, 100)] == [4712, 12762, 129027]
    for target in (5000, 9999, 100_000):
        assert ntk_reach(*llama2, ntk_factor(*llama2, target)) >= target


def test_all_channels_turned():
    """A base so small that nothing is beyond the critical dimension."""
    assert critical_dimension(100, 64, 100_000) == 64
    assert ntk_reach(100, 64, 100_000, ntk_factor(100, 64, 100_000, 200_000)) >= 200_000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1.0, 128, 4096, 8192), "above 1; got 1.0"),
        ((1e4, 0, 4096, 8192), "head_dim is a whole number of channels"),
        ((1e4, 128, 6, 8192), "trained is a whole number of tokens .*at least 7; got 6"),
        ((1e4, 128, 4096, 4096), "target is a whole number.*4,096 trained.*at least 4097; got 4096"),
    ],
)
def test_what_does_not_fit_is_said(given, message):
    with pytest.raises(ValueError, match=message):
        ntk_factor(*given)
