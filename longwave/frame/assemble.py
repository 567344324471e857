"""An empty `LongCache` on a model: memory layers where it attends over everything, and all that they need to see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from longwave.frame.again import Reader
from longwave.frame.attention import stored_dtype, use_longwave_attention
from longwave.frame.beside import with_state
from longwave.frame.cache import LongCache, Origin
from longwave.frame.hidden import Watch
from longwave.frame.ids import Teller
from longwave.frame.layer import MemoryLayer
from longwave.frame.look import Looker
from longwave.frame.observe import Needs
from longwave.frame.surprise import Listener
from longwave.rotary import Rotary
from longwave.shape import check_supported, other_layers, states_beside


def assemble(model: PreTrainedModel, layer: Callable[[int], MemoryLayer], needs: Needs, method: Any) -> LongCache:
    """layer: from a model's layer index to an empty memory layer. method: what decided that, for reports."""
    config = check_supported(model)
    others, states = other_layers(config), states_beside(config)
    rotary = _rotary(model, needs)  # before anything is selected: it may refuse
    indices = tuple(index for index, other in enumerate(others) if other is None)
    if (needs.again or needs.look) and states:
        raise NotImplementedError(
            "layers of this model attend and keep a recurrent state as well, which has moved on when the text would be "
            "read again: use a method that reads it once"
        )
    watch = (
        Watch(model, indices) if needs.hidden else None,
        Listener(model) if needs.surprise else None,
        Reader(model, needs.again) if needs.again else None,
        Teller(model) if needs.ids else None,
        Looker(model) if needs.look else None,
    )
    layers = [layer(index) if other is None else other for index, other in enumerate(others)]
    layers = [with_state(made, states[index]) if index in states else made for index, made in enumerate(layers)]
    use_longwave_attention(model)
    built = LongCache(layers, method, rotary, watch)
    built.origin = Origin(model)
    built.drops = getattr(config, "original_max_position_embeddings", None) or 0
    built._progress.switch, built._progress.drifts = _switch(config)
    for memory in built.memory_layers():
        memory.planned = stored_dtype(model.dtype, model.device.type)
    return built


def _rotary(model: PreTrainedModel, needs: Needs) -> Rotary | None:
    if not (needs.unrotated or needs.shifts):
        return None
    try:
        return Rotary.of(model)
    except NotImplementedError:
        if needs.unrotated:
            raise
        return None


def _switch(config: Any) -> tuple[int | None, bool]:
    """Tokens beyond which a model's rotary embedding is another one, keys of earlier tokens included, and whether it
    changes with every token from there on."""
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        if rope.get("rope_type") == "longrope":
            return rope.get("original_max_position_embeddings") or config.original_max_position_embeddings, False
        if "dynamic" in str(rope.get("rope_type")):
            return config.max_position_embeddings, True
    return None, False


def observing(model: PreTrainedModel, needs: Needs | None = None) -> LongCache:
    """A dense cache that also observes what `needs` says, for others to be forked from."""
    seen = needs or Needs()
    return assemble(model, lambda index: MemoryLayer(index, seen), seen, "dense")
