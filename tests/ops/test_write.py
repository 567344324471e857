"""One new token a row, in torch and in Triton: each lands where it should, and nothing else changes."""

import pytest
import torch

from longwave.ops.write.reference import write_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dim", [64, 80], ids=["64 channels", "80 channels"])
@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tokens_land_in_their_places(kernels, dtype, dim, monkeypatch):
    if kernels == "triton":
        pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    monkeypatch.setenv("LONGWAVE_KERNELS", kernels)
    g = torch.Generator().manual_seed(0)
    held = torch.randn(2, 3, 2, 7, dim, generator=g).to(dtype).to(DEVICE)
    new = torch.randn(2, 3, 1, 2, dim, generator=g).to(dtype).to(DEVICE).transpose(2, 3)  # as a model hands them over
    want, at = held.clone(), torch.tensor([6, 0, 3], device=DEVICE)
    for b, column in enumerate(at.tolist()):
        want[:, b, :, column] = new[:, b, :, 0]
    write_step(*held, *new, torch.arange(3, device=DEVICE), at)
    assert torch.equal(held, want)
