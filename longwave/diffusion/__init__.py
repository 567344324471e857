"""Masked-diffusion language models (LLaDA, Dream): an answer begins as masks, and steps put tokens in their place.

`generate` is the way in; samplers, confidence, noise and reading are a file each.
"""

from longwave.diffusion.bound import loss_bound
from longwave.diffusion.generate import Block, blocks, generate
from longwave.diffusion.samplers import Dream, LLaDA, Sampler

__all__ = ["Block", "Dream", "LLaDA", "Sampler", "blocks", "generate", "loss_bound"]
