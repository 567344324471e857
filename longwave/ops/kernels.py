"""Which kernels answer: `LONGWAVE_KERNELS` is "auto" (default), "reference" or "triton".

auto: Triton on CUDA, numba on CPUs, plain torch where these cannot read what is stored. reference: plain torch alone.
triton: Triton or an error, on a CPU in Triton's interpreter (TRITON_INTERPRET=1), which is slow and for tests.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

NAMES = ("auto", "reference", "triton")


def choice() -> str:
    """The value of LONGWAVE_KERNELS; ValueError if it is none of `NAMES`."""
    value = os.environ.get("LONGWAVE_KERNELS", "auto")
    if value not in NAMES:
        raise ValueError(f"LONGWAVE_KERNELS is one of {', '.join(NAMES)}; it is set to {value!r}")
    return value


def wants_triton(device: torch.device) -> bool:
    """Whether tensors on this device are Triton's, where it is installed and can."""
    return choice() == "triton" or (choice() == "auto" and device.type == "cuda")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, wherever its tensors lie: with layers on several GPUs, on the wrong one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
