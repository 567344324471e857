"""Decoder layers run through torch.compile: what lies between cache and attention becomes a few fused launches.

Both are opaque to the compiler, `OpaqueCache.update` and `attention.longwave_attention`, so a layer is a handful of
graphs, compiled once for all layers alike. Other passes of the model, in other threads too, go on as they were.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
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

_lock = threading.Lock()  # of what is installed on layers
_here = threading.local()  # .calls: layer -> what answers for it in this thread, while it is inside `within`


class Uncompiled(RuntimeError):
    """A pass that torch.compile could not take."""


class OpaqueCache(Cache):
    """A cache whose `update` is called as it is, from compiled code too."""

    update = torch.compiler.disable(Cache.update)


def layers_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers, as transformers marks them; none of a model that it has not."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


class Switch:
    """In place of a layer's `forward` while somebody has it compiled: that in `within`, elsewhere what was there.

    Not `_compiled_call_impl`, which torch reads twice a call: another thread could find it gone the second time.
    """

    def __init__(self, layer: Any):
        self.layer, self.own, self.plain, self.users = layer, vars(layer).get("forward"), layer.forward, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(_here, "calls", {}).get(self.layer, self.plain)(*args, **kwargs)


def _install(layers: list[Any]) -> list[Switch]:
    with _lock:
        for layer in layers:
            if not isinstance(layer.forward, Switch):
                layer.forward = Switch(layer)
            layer.forward.users += 1
        return [layer.forward for layer in layers]


def _remove(switches: list[Switch]) -> None:
    with _lock:
        for switch in switches:
            switch.users -= 1
            if switch.users or vars(switch.layer).get("forward") is not switch:  # or someone has put theirs over it
                continue
            if switch.own is None:
                del switch.layer.forward
            else:
                switch.layer.forward = switch.own


class Compiled:
    """A model's decoder layers, compiled: `within()` alone, and in the thread that is in it. `close` ends it."""

    def __init__(self, model: PreTrainedModel):
        switches = _install(layers_of(model))
        self.close = weakref.finalize(self, _remove, switches)  # at the latest with this object; once, however often
        self._calls: dict[Any, Callable[..., Any]] = {
            switch.layer: torch.compile(switch.plain, backend=BACKEND) for switch in switches
        }

    @contextmanager
    def within(self) -> Iterator[None]:
        """Passes in here are compiled, or raise Uncompiled."""
        before = getattr(_here, "calls", {})
        _here.calls = self._calls
        try:
            with torch._dynamo.config.patch(CONFIG):
                yield
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise Uncompiled(" ".join(str(error).split())[:200]) from error
        finally:
            _here.calls = before
