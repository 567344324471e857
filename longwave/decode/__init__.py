"""Decoding that Python does not hold up: steps over storage that stays where it is, on CUDA replayed as one graph."""

from longwave.decode.generate import generate
from longwave.decode.steps import StaticDecoder, Unsupported, supports

__all__ = ["StaticDecoder", "Unsupported", "generate", "supports"]
