"""The re-associated products against rebuilding K and V."""

import pytest
import torch

from longwave.ops.spectral import reference
from longwave.ops.spectral.basis import BASES, table

# B, H, R, segments, T, S, kept, compressed
SHAPES = [(1, 1, 1, 1, 1, 1, 1, 1), (2, 3, 5, 2, 63, 4, 6, 2), (1, 2, 17, 3, 100, 9, 0, 8), (1, 2, 3, 1, 8, 3, 8, 0)]


def made(shape, basis):
    b, h, r, segments, t, s, n, c = shape
    g = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    rows = table(basis, s, t, torch.float64)
    comp = draw(b, h, segments * t, c)
    return draw(b, h, r, n), draw(b, h, r, c), draw(b, h, segments * t, n), comp, rows, draw(b, h, r, segments * t)


@pytest.mark.parametrize("basis", list(BASES))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-H{}-R{}-N{}-T{}-S{}-k{}-c{}".format(*s))
def test_scores_and_mix_equal_rebuilding(shape, basis):
    q_kept, q_comp, kept, comp, rows, p = made(shape, basis)
    coef = reference.project(comp, rows)
    assert coef.shape == (*shape[:2], shape[3], shape[5], shape[7])
    rebuilt = reference.synthesize(coef, rows)
    torch.testing.assert_close(
        reference.scores(q_kept, q_comp, kept, coef, rows), q_kept @ kept.mT + q_comp @ rebuilt.mT, rtol=0, atol=1e-11
    )
    out_kept, out_comp = reference.mix(p, kept, coef, rows)
    torch.testing.assert_close(out_kept, p @ kept, rtol=0, atol=1e-11)
    torch.testing.assert_close(out_comp, p @ rebuilt, rtol=0, atol=1e-11)


@pytest.mark.parametrize("basis", list(BASES))
def test_synthesis_is_the_nearest_signal_in_the_band(basis):
    *_, comp, rows, _ = made((1, 2, 1, 2, 40, 6, 0, 3), basis)
    residual = comp - reference.synthesize(reference.project(comp, rows), rows)
    assert residual.abs().max() > 0.1
    torch.testing.assert_close(
        reference.project(residual, rows), torch.zeros(1, 2, 2, 6, 3, dtype=torch.float64), rtol=0, atol=1e-11
    )


def test_an_impulse_comes_back_at_its_own_place():
    rows = table("dct", 16, 16, torch.float64)
    x = torch.zeros(1, 1, 48, 1, dtype=torch.float64)
    for place in (0, 15, 16, 31, 47):  # both sides of every border
        x.zero_()
        x[0, 0, place] = 1
        torch.testing.assert_close(reference.synthesize(reference.project(x, rows), rows), x, rtol=0, atol=1e-12)
