"""Orthonormal transforms, quantiser and its whole-number steps."""

import pytest
import torch

from longwave.codec.quantise import LARGEST, OCTAVE, quantise, restore, step_of
from longwave.codec.transform import BANDS, TOKENS, bands, cosines, principal


@pytest.mark.parametrize("tokens", [1, 2, 5, 124, 128])
def test_the_cosine_transform_is_orthonormal(tokens):
    table = cosines(tokens, torch.empty(0, dtype=torch.float64))
    assert torch.allclose(table @ table.mT, torch.eye(tokens, dtype=torch.float64), atol=1e-12)


def test_principal_axes_are_orthonormal_and_decorrelate():
    x = torch.randn(500, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * torch.arange(1, 13)
    moment = x.mT @ x / len(x)
    axes, variance = principal(moment)
    assert torch.allclose(axes.mT @ axes, torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(axes.mT @ moment @ axes, torch.diag(variance), atol=1e-9)
    assert bool((variance.diff() <= 0).all())
    few, least = principal(moment, 3)
    assert torch.equal(few, axes[:, :3])
    assert torch.equal(least, variance[:3])


def test_bands_double_and_short_segments_follow_the_frequency():
    whole = bands(TOKENS)
    assert torch.bincount(whole).tolist() == [1, 1, 2, 4, 8, 16, 32, 64]
    assert bands(64).tolist() == [0, *whole[2::2].tolist()]
    assert bands(1).tolist() == [0]
    assert all(int(bands(n).max()) < BANDS for n in range(1, TOKENS + 1))


def test_the_quantiser_against_its_formula():
    c = torch.tensor([[0.0, 0.59, 0.61, -0.61, 1.59, 1.61, -7.3]], dtype=torch.float64)
    assert quantise(c, 1.0)[0].tolist() == [[0, 0, 1, -1, 1, 2, -7]]
    assert quantise(c * 4, 4.0)[0].tolist() == [[0, 0, 1, -1, 1, 2, -7]]
    x = torch.randn(10, 100) * 5
    made, right = quantise(x, 0.5)
    assert right.tolist() == [True] * 10
    back = restore(made, 0.5)
    assert float((back - x).abs().max()) <= 0.6 * 0.5 + 1e-6
    assert torch.equal(quantise(back, 0.5)[0], made)


def test_what_cannot_be_counted_is_told_segment_by_segment():
    x = torch.ones(6, 2, 3)
    for number, bad in enumerate((2.0 * LARGEST, float("inf"), float("nan"), -float("inf"), LARGEST)):
        x[number, 1, number % 3] = bad
    assert quantise(x, 1.0)[1].tolist() == [False] * 4 + [True] * 2
    assert quantise(x[:, :0], 1.0)[1].tolist() == [True] * 6  # nothing to count


def test_steps_double_by_octave():
    assert step_of(0) == 1.0
    assert step_of(OCTAVE) == 2.0
    assert step_of(-2 * OCTAVE) == 0.25
