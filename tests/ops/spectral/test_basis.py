import math

import pytest
import torch

from longwave.ops.spectral import reference
from longwave.ops.spectral.basis import BASES, smooth_ge, table


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64, 255, 256, 1000])
@pytest.mark.parametrize("basis", list(BASES))
def test_rows_are_orthonormal(basis, tokens):
    rows = table(basis, tokens, tokens, torch.float64)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(tokens, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("basis", list(BASES))
def test_fewer_states_are_a_prefix(basis):
    assert torch.equal(table(basis, 5, 63, torch.float64), table(basis, 63, 63, torch.float64)[:5])


@pytest.mark.parametrize("basis", list(BASES))
def test_first_row_is_the_mean(basis):
    torch.testing.assert_close(
        table(basis, 1, 50, torch.float64)[0], torch.full((50,), 1 / math.sqrt(50), dtype=torch.float64)
    )


def test_dct_against_its_definition():
    rows = table("dct", 4, 9, torch.float64)
    for n in range(4):
        scale = math.sqrt((1 if n == 0 else 2) / 9)
        for t in range(9):
            assert rows[n, t] == pytest.approx(scale * math.cos(math.pi * n * (2 * t + 1) / 18), abs=1e-14)


def test_dft_spans_the_first_frequencies():
    """Five real rows must reproduce exactly what bins 0, 1 and 2 of a complex transform hold."""
    x = torch.randn(33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = table("dft", 5, 33, torch.float64)
    bins = torch.fft.rfft(x)
    bins[3:] = 0
    torch.testing.assert_close(rows.mT @ (rows @ x), torch.fft.irfft(bins, n=33))


def test_legendre_reproduces_polynomials():
    t = torch.linspace(-1, 1, 41, dtype=torch.float64)
    cubic = 3 * t**3 - t**2 + 0.5
    rows = table("legendre", 4, 41, torch.float64)
    torch.testing.assert_close(rows.mT @ (rows @ cubic), cubic)
    assert (
        table("legendre", 3, 41, torch.float64).mT @ (table("legendre", 3, 41, torch.float64) @ cubic) - cubic
    ).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("sine", 2, 8), "unknown basis 'sine'"), (("dct", 9, 8), "segment length 8, got 9"), (("dct", 0, 8), "got 0")],
)
def test_wrong_tables_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        table(*arguments)


def test_smooth_lengths():
    assert [smooth_ge(n) for n in (1, 2, 7, 97, 1001, 7711)] == [2, 2, 8, 100, 1024, 7776]


def test_tables_that_a_captured_graph_reads_are_never_dropped():
    assert table.cache_parameters()["maxsize"] is None
    assert reference._rotation.cache_parameters()["maxsize"] is None
