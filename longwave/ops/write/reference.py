"""One new token a row, written into storage where the device says: what a captured step does in every layer."""

import importlib

import torch

from longwave.ops.kernels import choice, wants_triton


def write_step(
    k_held: torch.Tensor,
    v_held: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    at: torch.Tensor,
) -> None:
    """Set k_held[b, :, at[b]] and v_held[b, :, at[b]] to k[b, :, 0] and v[b, :, 0].

    k_held, v_held [B, H, L, D]; k, v [B, H, 1, D] of the same dtype and device. rows int64 [B]: 0, 1, 2 ...; at int64
    [B], each at least 0 and below L. On CUDA one Triton launch, where Triton is installed; elsewhere plain torch.
    """
    if wants_triton(k.device):
        try:
            module = importlib.import_module("longwave.ops.write.triton")
        except ImportError:
            if choice() == "triton":
                raise
        else:
            module.write_step(k_held, v_held, k, v, at)
            return
    for held, new in ((k_held, k), (v_held, v)):
        held[rows, :, at] = new[:, :, 0]
