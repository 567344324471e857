"""Which kernels answer: `LONGWAVE_KERNELS` is "auto" (default), "reference" or "triton".

auto: Triton on CUDA, numba on CPUs, plain torch where these cannot read what is stored. reference: plain torch alone.
triton: Triton or an error, on a CPU in Triton's interpreter (TRITON_INTERPRET=1), which is slow and for tests.
"""

import os

NAMES = ("auto", "reference", "triton")


def choice() -> str:
    """The value of LONGWAVE_KERNELS; ValueError if it is none of `NAMES`."""
    value = os.environ.get("LONGWAVE_KERNELS", "auto")
    if value not in NAMES:
        raise ValueError(f"LONGWAVE_KERNELS is one of {', '.join(NAMES)}; it is set to {value!r}")
    return value
