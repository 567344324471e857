"""What is drawn by chance: one generator a row, so that a row draws the same whatever rows are beside it."""

from __future__ import annotations

import torch


class Draws:
    """The random numbers of one row, seeded, on the device where they are used. All of them are float64."""

    def __init__(self, seed: int, device: torch.device):
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = device

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform on (0, 1): neither end, so that logarithms are finite."""
        drawn = torch.rand(shape, generator=self._generator, device=self._device, dtype=torch.float64)
        return drawn.clamp_(min=torch.finfo(torch.float64).tiny)

    def gumbel(self, *shape: int) -> torch.Tensor:
        """Standard Gumbel noise, -log(-log U): adding it to logits and taking the highest draws by their softmax.

        float64 because in fewer bits large values come too rarely and the drawn text gets worse (arXiv 2409.02908).
        """
        return -torch.log(-torch.log(self.uniform(*shape)))


def categorical(logits: torch.Tensor, temperature: float, draws: Draws) -> torch.Tensor:
    """A token for each of logits [n, vocabulary], by softmax(logits / temperature); the likeliest at 0: int64 [n]."""
    if not temperature:
        return logits.argmax(-1)
    return (logits.double() + temperature * draws.gumbel(*logits.shape)).argmax(-1)
