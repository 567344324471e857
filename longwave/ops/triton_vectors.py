"""What Triton kernels over queries and keys share: vectors of storage, of any strides."""

import triton
import triton.language as tl

# the interpreter multiplies the bits of bfloat16, not the numbers
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def vectors(base, at, held, stride, D: tl.constexpr, BD: tl.constexpr):
    """[n, BD]: the vectors of D numbers at `at` [n], zeros behind them and where not `held` [n]."""
    d = tl.arange(0, BD)
    x = tl.load(base + at[:, None] + d[None, :] * stride, mask=held[:, None] & (d < D)[None, :], other=0.0)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x
