"""Packing is exact; quantisation is as fine as its bits allow."""

import pytest
import torch

from longwave.ops.codes import BITS, pack, packed_bytes, quantize, rotation, unpack

LEADING = [(), (1,), (3,), (2, 1, 3), (0,), (2, 0, 5)]


def draw(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rebuilt(codes, scale, zero):
    return codes.double() * scale.double() + zero.double()


# packing


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("n", [8, 24, 64])
def test_codes_come_back(bits, leading, n):
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (*leading, n), generator=g, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, n * bits // 8)
    assert packed.shape[-1] == packed_bytes(n, bits)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_every_byte_is_used(bits):
    every = torch.arange(256, dtype=torch.uint8).repeat(bits)  # any bytes stand for some codes
    codes = unpack(every, bits)
    assert codes.shape == (256 * 8,)
    assert codes.max() == 2**bits - 1
    assert torch.equal(pack(codes, bits), every)


def test_codes_of_one_shift_are_contiguous():
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8), 4).tolist() == [0x51, 0x62, 0x73, 0x84]
    codes = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.uint8)
    assert pack(codes, 2).tolist() == [0b01_11_10_00, 0b00_10_11_01]
    # three bits: the two low ones as above, then a byte of the third
    high = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8)
    assert pack(codes | high << 2, 3).tolist() == [0b01_11_10_00, 0b00_10_11_01, 0b1100_0001]


def test_packing_reads_what_is_not_contiguous():
    codes = torch.randint(0, 8, (16, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes.mT, 3), 3), codes.mT)


@pytest.mark.parametrize("n", [1, 4, 12, 63])
def test_counts_that_fill_no_bytes_are_refused(n):
    with pytest.raises(ValueError, match=f"by eights, got {n}"):
        packed_bytes(n, 2)


# quantisation


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_is_at_most_half_a_step(bits, zero, dtype):
    x = draw(50, 32, dtype=dtype) * torch.logspace(-2, 3, 50, dtype=dtype)[:, None] + (3 if zero else 0)
    codes, scale, start = quantize(x, bits, zero=zero, fit=False)
    assert (codes.dtype, scale.dtype, start.dtype) == (torch.uint8, torch.float16, torch.float16)
    assert (codes.shape, scale.shape, start.shape) == ((50, 32), (50, 1), (50, 1))
    assert codes.max() == 2**bits - 1
    wide = start if zero else -scale.double() * (2**bits - 1) / 2
    error = (rebuilt(codes, scale, wide) - x.double()).abs()
    # rounding scale and zero to float16 moves a group's ends by no more than 2^-11 of themselves each
    spread = x.double().abs().amax(-1, keepdim=True)
    slack = (scale.double() * (2**bits - 1) + spread) * 2**-10
    assert bool((error <= scale.double() / 2 + slack).all())
    assert bool((scale.double() * (2**bits - 1) <= (2 * spread + 1e-4) * (1 + 2**-10)).all())


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_fitting_is_never_worse_and_sometimes_better(bits, zero):
    x = draw(200, 64) + (0.7 if zero else 0)
    x[:20, 0] = 9  # outliers
    errors = []
    for fit in (False, True):
        codes, scale, start = quantize(x, bits, zero=zero, fit=fit)
        wide = start if zero else -scale.double() * (2**bits - 1) / 2
        errors.append((rebuilt(codes, scale, wide) - x).square().sum(-1))
    plain, fitted = errors
    if bits > 1:  # one bit never spans the whole range when fitted
        assert bool((fitted <= plain).all())
    if bits < 8:
        assert fitted.sum() < 0.95 * plain.sum()
    else:
        assert torch.equal(fitted, plain)


def test_one_fitted_bit_is_far_better_than_the_ends():
    x = draw(200, 64)
    plain, fitted = ((rebuilt(*quantize(x, 1, fit=fit)) - x).square().sum(-1) for fit in (False, True))
    assert bool((fitted < plain / 2).all())


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 2.0**-20, 1000.0])
def test_constant_groups_come_back(bits, fit, value):
    codes, scale, start = quantize(torch.full((3, 16), value, dtype=torch.float64), bits, fit=fit)
    assert bool((scale > 0).all())
    # there is no step smaller than 2^-14, and a zero is a float16
    torch.testing.assert_close(
        rebuilt(codes, scale, start), torch.full((3, 16), value, dtype=torch.float64), rtol=2**-11, atol=2**-14
    )


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_without_a_zero_codes_are_symmetric(bits, fit):
    x = draw(40, 16).float() + 0.3
    top = 2**bits - 1
    codes, scale, start = quantize(x, bits, zero=False, fit=fit)
    assert not bool(start.any())
    mirrored, same, _ = quantize(-x, bits, zero=False, fit=fit)
    assert torch.equal(scale, same)
    value = codes.double() * scale.double() - scale.double() * top / 2
    other = mirrored.double() * scale.double() - scale.double() * top / 2
    off = (value + other).abs() > 1e-9
    # only a number half-way between two codes may fall to either side
    halfway = ((x / scale.float() + top / 2) % 1 - 0.5).abs() < 1e-3
    assert not bool((off & ~halfway).any())


def test_groups_do_not_see_each_other():
    x = draw(5, 16)
    whole = quantize(x, 3)
    for i in range(5):
        for part, alone in zip(whole, quantize(x[i], 3), strict=True):
            assert torch.equal(part[i], alone)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("fit", [True, False])
def test_what_float16_cannot_hold_is_refused(zero, fit):
    # one bit: the largest step for a range
    x = torch.tensor([[-1.0, 1.0] * 4, [-3e5, 3e5] * 4])
    quantize(x[:1], 1, zero, fit)
    with pytest.raises(ValueError, match=r"float16.*keep these channels at 16 bits"):
        quantize(x, 1, zero, fit)


def test_a_zero_that_float16_cannot_hold_is_refused():
    x = torch.tensor([[1e5, 1e5 + 1] * 4])
    with pytest.raises(ValueError, match="65504"):
        quantize(x, 4)


# rotation


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12, 41, 64, 96, 128])
def test_rotations_are_orthonormal(n):
    table = rotation(n)
    assert table.dtype == torch.float64
    torch.testing.assert_close(table @ table.mT, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(table.mT @ table, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [8, 64, 96])
def test_rotations_spread_one_channel_over_all(n):
    spread = torch.eye(n, dtype=torch.float64) @ rotation(n)
    assert spread.abs().max() <= (1 if n & (n - 1) == 0 else 2**0.5) / n**0.5 + 1e-12
