"""write.py in Triton: K and V of all rows and heads in one launch, where indexing in torch takes two longer ones."""

import torch
import triton
import triton.language as tl

from longwave.ops.kernels import on_device


@triton.jit
def _write_kernel(
    k_held_ptr, v_held_ptr, k_ptr, v_ptr, at_ptr,
    k_held_b, k_held_h, k_held_t, k_held_d, v_held_b, v_held_h, v_held_t, v_held_d, k_b, k_h, k_d, v_b, v_h, v_d,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    d = tl.arange(0, BD)
    b, at = b.to(tl.int64), tl.load(at_ptr + b)
    k = tl.load(k_ptr + b * k_b + h * k_h + d * k_d, mask=d < D)
    v = tl.load(v_ptr + b * v_b + h * v_h + d * v_d, mask=d < D)
    tl.store(k_held_ptr + b * k_held_b + h * k_held_h + at * k_held_t + d * k_held_d, k, mask=d < D)
    tl.store(v_held_ptr + b * v_held_b + h * v_held_h + at * v_held_t + d * v_held_d, v, mask=d < D)


def write_step(k_held: torch.Tensor, v_held: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor) -> None:
    """As in write.py."""
    batch, heads, _, dim = k_held.shape
    with on_device(k.device):
        _write_kernel[(batch * heads,)](
            k_held, v_held, k, v, at,
            *k_held.stride(), *v_held.stride(), *(x.stride(i) for x in (k, v) for i in (0, 1, 3)),
            H=heads, D=dim, BD=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
