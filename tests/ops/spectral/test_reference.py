"""Attention over pages against rebuilding K and V, and what pages hold against the definitions."""

import pytest
import torch

from longwave.ops.codes import BITS, rotation
from longwave.ops.spectral import reference
from longwave.ops.spectral.basis import BASES, table
from longwave.ops.spectral.layout import OWN, Code, Layout

T, DIM, STATES = 16, 16, 3
RAW = Code(((OWN, 5),), STATES)
RESIDUAL = Code(((3, DIM),), 1, axis="token", residual=True, state_bits=8, zero=False)
# name -> K's and V's codes, a head each
CODES = {
    "raw": ((RAW, Code((), STATES)), (Code(((OWN, DIM),), 0), RAW)),
    "time": ((Code(((8, 3), (3, 4), (2, 1)), 2, state_bits=8),) * 2, (Code(((4, DIM),), 0),) * 2),
    "merged": ((Code((), 1, state_bits=8, merged=True), RAW), (Code((), 1, state_bits=8, merged=True), RAW)),
    "token": (
        (Code(((4, 8),), 2, axis="token"), Code(((2, DIM),), 0, axis="token", group=8)),
        (RESIDUAL, Code(((1, 8), (16, 2)), 1, axis="token", zero=False)),
    ),
}


def made(name, basis="dct"):
    """Layout, K and V [2, 2, 3 * T, DIM], the table, and their pages."""
    g = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(DIM, generator=g) for _ in range(4)])
    layout = Layout(*CODES[name], order[:2], order[2:], T, torch.float64)
    k, v = torch.randn(2, 2, 2, 3 * T, DIM, generator=g, dtype=torch.float64) + 0.5
    rows = table(basis, STATES, T, torch.float64)
    pages = reference.encode(layout, k, v, rows)
    reference.write_bias(layout, pages, torch.randn(2, 2, 3, generator=g))
    return layout, k, v, rows, pages


@pytest.mark.parametrize("basis", list(BASES))
@pytest.mark.parametrize("name", CODES)
def test_scores_and_mix_equal_rebuilding(name, basis):
    layout, _, _, rows, pages = made(name, basis)
    g = torch.Generator().manual_seed(4)
    q = torch.randn(2, 2, 5, DIM, generator=g, dtype=torch.float64)
    p = torch.rand(2, 2, 5, 3 * T, generator=g, dtype=torch.float64)
    k, v = reference.decode(layout, pages, rows)
    bias = reference.read_bias(layout, pages).repeat_interleave(T, -1)[:, :, None]
    assert bool(bias.any()) == any(group.code.merged for group in layout.k)
    torch.testing.assert_close(reference.scores(layout, pages, q, rows), q @ k.mT + bias, rtol=0, atol=1e-10)
    torch.testing.assert_close(reference.mix(layout, pages, p, rows), p @ v, rtol=0, atol=1e-10)


@pytest.mark.parametrize("basis", list(BASES))
def test_raw_channels_are_exact_and_the_others_projections(basis):
    layout, k, v, rows, pages = made("raw", basis)
    smooth = reference.synthesize(reference.project(k.unflatten(2, (-1, T)), rows), rows).flatten(2, 3)
    held_k, held_v = reference.decode(layout, pages, rows)
    kept = layout.k[0].order[0, :5].long()
    expected = smooth.clone()
    expected[:, 0][..., kept] = k[:, 0][..., kept]
    torch.testing.assert_close(held_k, expected, rtol=0, atol=1e-12)
    assert torch.equal(held_v[:, 0], v[:, 0])


@pytest.mark.parametrize("bits", BITS)
def test_codes_along_time_miss_at_most_half_a_step(bits):
    """Over the whole range of a channel in a segment; its scale and zero are float16."""
    layout = Layout(
        [Code(((bits, DIM),), 0, fit=False)], [], torch.arange(DIM)[None], torch.zeros(0, DIM), T, torch.float64
    )
    k = torch.randn(1, 1, 2 * T, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    rows = table("dct", 1, T, torch.float64)
    held, _ = reference.decode(layout, reference.encode(layout, k, k[:, :0], rows), rows)
    parts, missed = k.unflatten(2, (-1, T)), (held - k).unflatten(2, (-1, T)).abs().amax(3)
    step = (parts.amax(3) - parts.amin(3)) / (2**bits - 1)
    assert (missed <= step / 2 + 4e-3).all()
    assert (missed > step / 4).any()


def test_residual_codes_stand_for_what_the_states_leave():
    layout, _, v, rows, pages = made("token")
    group = next(group for group in layout.v if group.code == RESIDUAL)
    states = reference.synthesize(
        group.states.view(pages).double() * group.gains.view(pages).double()[..., None], rows[:1]
    )[:, :, 0]
    exact = v[:, 0][..., group.order[0].long()].unflatten(1, (-1, T))
    left = (exact - states) @ rotation(DIM)
    held = reference.decode(layout, pages, rows)[1][:, 0][..., group.order[0].long()].unflatten(1, (-1, T))
    coded = (held - states) @ rotation(DIM)
    scale = group.scales[0].view(pages).double()[:, :, 0, 0]  # a scale a token
    assert ((coded / scale).frac().abs() - 0.5).abs().max() < 1e-9  # codes of 3 bits without a zero: +-0.5 .. +-3.5
    assert (coded - left).square().mean() < 0.1 * left.square().mean()


@pytest.mark.parametrize("basis", list(BASES))
def test_synthesis_is_the_nearest_signal_in_the_band(basis):
    rows = table(basis, 6, 40, torch.float64)
    x = torch.randn(2, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    residual = x - reference.synthesize(reference.project(x, rows), rows)
    assert residual.abs().max() > 0.1
    assert reference.project(residual, rows).abs().max() < 1e-11


def test_an_impulse_comes_back_at_its_own_place():
    rows = table("dct", 16, 16, torch.float64)
    layout = Layout([Code((), 16)], [Code((), 16)], *torch.zeros(2, 1, 1, dtype=torch.int64), 16, torch.float64)
    for place in (0, 15, 16, 31, 47):  # both sides of every border
        x = torch.zeros(1, 1, 48, 1, dtype=torch.float64)
        x[0, 0, place] = 1
        for held in reference.decode(layout, reference.encode(layout, x, x, rows), rows):
            torch.testing.assert_close(held, x, rtol=0, atol=1e-12)
