"""What the kernel is measured against must answer rightly too, or its time says nothing.

On a CPU the Triton kernel runs in the interpreter, which multiplies in float32 and cuts bits off results.
"""

import pytest
import torch

from longwave.store.period import analyze, resynthesize

pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
from benchmarks import rivals

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = 4e-3 if torch.cuda.is_available() else 5e-3


def error(rival):
    want = rival.expected()
    return ((rival.attend().float() - want).norm() / want.norm()).item()


@pytest.mark.parametrize(("structure", "context"), [("segments", 1000), ("period", 2300)])
def test_rebuild(structure, context):
    launches = rivals.LAUNCHES[structure][:1] if structure == "period" else rivals.LAUNCHES[structure]
    for launch in launches:
        rival = rivals.Rebuild(structure, 1, context, seed=1, device=DEVICE, launch=launch)
        assert error(rival) < NEAR


@pytest.mark.parametrize("context", [2300, 5000])
def test_fft(context):
    assert error(rivals.FFT(2, context, seed=1, device=DEVICE)) < NEAR


def test_the_table_is_the_paper_stores():
    states, period, length = 64, 300, 270
    x = torch.randn(1, length, 3, dtype=torch.float64)
    coef = analyze(x, states, period)
    in_turn = torch.stack(coef.chunk(2, 1), 2).flatten(1, 2)
    made = rivals.period_table(states, period, length, torch.float64, "cpu") @ in_turn
    torch.testing.assert_close(made, resynthesize(coef, period, length))


def test_a_context_without_a_middle_is_refused():
    with pytest.raises(ValueError, match="no middle"):
        rivals.Rebuild("period", 1, 1000, device="cpu")
