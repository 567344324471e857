"""Seeing what goes into an attention module, where a method asks for it: hooks that last as long as their cache."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.frame.hooks import Hooks


class _Seen(threading.local):
    """Threads may share a model: each has its own inputs, by the id of a module, held weakly."""

    def __init__(self) -> None:
        self.inputs: dict[int, weakref.ref[torch.Tensor]] = {}


_seen = _Seen()


class Watch(Hooks):
    """Hooks on the attention modules of some layers."""

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...]):
        found = {}
        for module in model.modules():
            index = getattr(module, "layer_idx", None)
            if index in layers and type(module).__name__.endswith("Attention"):
                found[index] = module
        if len(found) != len(layers):
            missing = sorted(set(layers) - set(found))
            raise NotImplementedError(
                f"{type(model).__name__}: no attention module says that it is of layer {missing[0]}, so what goes into "
                "it cannot be seen, and this method needs that"
            )
        super().__init__([module.register_forward_pre_hook(_see, with_kwargs=True) for module in found.values()])


@torch.compiler.disable  # a compiled layer hands its input over, too
def _see(module: Any, args: Any, kwargs: Any) -> None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if hidden is not None:
        _seen.inputs[id(module)] = weakref.ref(hidden)


def take_hidden(module: Any) -> torch.Tensor:
    """What went into an attention module in this pass: [batch, tokens, hidden_size]."""
    found = _seen.inputs.pop(id(module), None)
    hidden = None if found is None else found()
    if hidden is None:
        raise ValueError(
            f"the input of {type(module).__name__} was not seen: build the cache on the model that uses it"
        )
    return hidden
