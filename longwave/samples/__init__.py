"""A document to try things on: "Baker Farm", a chapter of Thoreau's Walden (1854), which is in the public domain."""

from __future__ import annotations

from importlib import resources


def sample() -> str:
    """The chapter: 14,000 characters, 3,300 tokens of SmolLM2. Nothing was calibrated on it."""
    return resources.files(__name__).joinpath("baker_farm.txt").read_text(encoding="utf-8")
