"""Codecs of the small models, fitted once, and what caches of them hold."""

import functools

import pytest
import torch

from longwave.codec import Effort, build, calibrate
from longwave.evals.fork import prefill
from longwave.plan.automatic import own_texts
from tests.conftest import build as model_of
from tests.conftest import tokens

EFFORT = Effort(tokens=400, windows=4, probed=2, probes=2, scored=80, apart=2, channels=64)
KINDS = ("llama", "qwen3", "gemma3", "qwen3next")


def held(model, ids):
    """K and V of the memory layers after reading ids [tokens]: [L, n, H, D] each."""
    pairs = [layer.dense.view() for layer in prefill(model, ids[None]).memory_layers()]
    return tuple(torch.stack([pair[side][0].transpose(0, 1) for pair in pairs]) for side in (0, 1))


class Fitted:
    """A small model, what was read of it, its codec, and a text with its K and V."""

    def __init__(self, kind, tokenizer):
        self.model = model_of(kind)
        self.read = calibrate(self.model, tokenizer, own_texts(), EFFORT)
        self.codec = build(self.read)
        self.ids = tokenizer(own_texts()[1][-2000:], return_tensors="pt").input_ids[0, :300]
        self.k, self.v = held(self.model, self.ids)

    def part(self, start, end):
        return self.k[:, start:end], self.v[:, start:end], self.ids[start:end]


@pytest.fixture(scope="session")
def fitted(tokenizer):
    """kind -> Fitted."""
    return functools.cache(lambda kind: Fitted(kind, tokenizer))


@pytest.fixture(scope="session")
def small(fitted):
    return fitted("llama")


def error(x, exact):
    """Relative, of norms."""
    return float((x.double() - exact.double()).norm() / exact.double().norm())


__all__ = ["EFFORT", "KINDS", "error", "held", "tokens"]
