"""Decoder layers run through torch.compile: what lies between cache and attention becomes a few fused launches.

Both are opaque to the compiler, `OpaqueCache.update` and `attention.longwave_attention`, so a layer is a handful of
graphs, compiled once for all layers alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

BACKEND = "inductor"
# Layers differ in the number they have, which is no reason to compile again; where something else is, for too many
# layers or batch sizes, say so instead of going on slowly.
CONFIG = {"allow_unspec_int_on_nn_module": True, "recompile_limit": 64, "fail_on_recompile_limit_hit": True}


class Uncompiled(RuntimeError):
    """A pass that torch.compile could not take."""


class OpaqueCache(Cache):
    """A cache whose `update` is called as it is, from compiled code too."""

    update = torch.compiler.disable(Cache.update)


def layers_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers, as transformers marks them; none of a model that it has not."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


class Compiled:
    """A model's decoder layers, compiled: `within()` alone, so that other passes stay as they are."""

    def __init__(self, model: PreTrainedModel):
        self._calls: list[tuple[Any, Any]] = [
            (layer, torch.compile(layer._call_impl, backend=BACKEND)) for layer in layers_of(model)
        ]

    @contextmanager
    def within(self) -> Iterator[None]:
        """Passes in here are compiled, or raise Uncompiled."""
        before = [layer._compiled_call_impl for layer, _ in self._calls]
        try:
            for layer, call in self._calls:
                layer._compiled_call_impl = call
            with torch._dynamo.config.patch(CONFIG):
                yield
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise Uncompiled(" ".join(str(error).split())[:200]) from error
        finally:
            for (layer, _), call in zip(self._calls, before, strict=True):
                layer._compiled_call_impl = call
