"""The last tokens of a coded row in 8 bits."""

import pytest
import torch

from longwave.saved.ends import ends, from_ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("size", [1e-7, 1.0, 3e4], ids=["tiny", "one", "large"])
def test_within_half_a_level(dtype, size):
    torch.manual_seed(0)
    x = (torch.rand(3, 2, 40, 8) * size + torch.arange(8) * size / 8).to(dtype)
    made = ends(x, 4, exact=False)
    assert sum(part.nbytes for part in made.values()) == 3 * 2 * 8 * (4 * dtype.itemsize + 36 + 8)
    for layers in (slice(0, 3), slice(1, 2)):
        got, want = from_ends(made, layers), x[layers]
        assert got.dtype == dtype
        assert torch.equal(got[:, :, :4], want[:, :, :4])
        last = want[:, :, 4:].float()
        level = (last.amax(2, keepdim=True) - last.amin(2, keepdim=True)) / 255
        rounding = torch.finfo(dtype).eps * last.abs()  # of what comes back, in its own type
        if dtype == torch.float16:
            rounding += 6e-8  # below its normal numbers
        assert ((got[:, :, 4:].float() - last).abs() <= 0.501 * level + rounding).all()


def test_channels_that_do_not_move_are_exact():
    x = torch.randn(1, 1, 1, 8).expand(2, 3, 20, 8)
    assert torch.equal(from_ends(ends(x, 4, exact=False), slice(0, 2)), x)


def test_exactly():
    x = torch.randn(2, 1, 20, 8)
    assert torch.equal(from_ends(ends(x, 4, exact=True), slice(0, 2)), x)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite(odd):
    x = torch.randn(2, 1, 20, 8)
    x[1, 0, 9, 3] = odd
    with pytest.raises(ValueError, match="not finite: save with exact=True"):
        ends(x, 4, exact=False)
