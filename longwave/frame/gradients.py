"""Nothing differentiates through a cache: what a layer answers says so when a backward pass reaches it."""

from __future__ import annotations

from typing import Any

import torch


class _Barrier(torch.autograd.Function):
    """The answer as it is, and an error in place of its gradient."""

    @staticmethod
    def forward(ctx: Any, answer: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return answer

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            "a longwave cache keeps no gradients, so no backward pass goes through it: leave the cache out, or read "
            "under torch.no_grad()"
        )


def bar_gradients(answer: torch.Tensor, sources: list[torch.Tensor]) -> torch.Tensor:
    """answer, whose backward pass is an error if autograd would have followed any of the tensors it was made from."""
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return _Barrier.apply(answer, *sources)
    return answer
