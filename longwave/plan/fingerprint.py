"""Whose K and V are these? What a model's own projections make of a fixed input, in a few numbers.

Two models hold the same K and V where the weights that make them are the same, whatever they are wrapped in and in
whatever type they are kept. So the projections themselves are asked: an adapter that is on or merged shows, one that
is off, or is elsewhere in the model, does not. Beside them stands how keys are turned, where that is not as trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.rotary.extension import MARK

NUMBERS = 16  # of a projection
# How far a projection may be from the same one in other form, relatively: bfloat16 moves it by 0.002, 8 bits by 0.01,
# 4 bits by 0.15 (docs/planner.md). Of two forms the coarser one decides.
TOLERANCE = 0.005
EIGHT_BITS, FEWER_BITS = 0.03, 0.3
# children of an attention module that make neither K nor V
_OTHERS = ("q_", "o_", "out", "dense", "c_proj", "wq", "wo", "gate", "g_", "rotary", "sinks")


def _signs(rows: int, columns: int, seed: int) -> torch.Tensor:
    """The same everywhere and exact in every type: random signs [rows, columns]."""
    return torch.randint(0, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def _projections(model: PreTrainedModel, layers: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """What makes K and V in the first, middle and last of `layers`: (name, module)."""
    picked = {layers[0], layers[len(layers) // 2], layers[-1]}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if index in picked and type(module).__name__.endswith("Attention"):
            for name, child in module.named_children():
                if not name.lower().startswith(_OTHERS):
                    yield f"{index}.{name}", child


def _made(module: Any, dtype: torch.dtype) -> tuple[torch.Tensor, float] | None:
    """(what a module makes of the fixed input, how far other forms of it may be); None where it cannot be asked."""
    base: Any = getattr(module, "base_layer", None)  # under an adapter
    weight: Any = getattr(module if base is None else base, "weight", None)
    known = isinstance(weight, torch.Tensor)
    if known and weight.is_meta:
        return None
    plain = known and weight.is_floating_point() and weight.dtype.itemsize > 1
    if plain and weight.ndim == 1:  # a normalisation
        return weight.detach(), TOLERANCE
    size = getattr(module, "in_features", None) or (weight.shape[0] if plain and weight.ndim == 2 else None)
    if size is None:
        return None
    place = weight if known else next(iter(module.buffers()))
    given = torch.cat([_signs(2, size, 1), torch.zeros(1, size)]).to(place.device, weight.dtype if plain else dtype)
    made = module(given)
    if plain:
        allowed = TOLERANCE
    else:
        allowed = EIGHT_BITS if known and weight.dtype.itemsize == 1 and weight.dtype != torch.uint8 else FEWER_BITS
        if base is not None and _far(made, base(given)) > TOLERANCE:
            made = made * torch.nan  # quantised weights and an adapter: nobody else's
    return (made[:2] - made[2:]).flatten(), allowed  # without the bias, which may be far larger


def _far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative distance."""
    ours, theirs = ours.double().flatten(), theirs.double().flatten()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


@torch.no_grad()
def fingerprint(model: PreTrainedModel, layers: tuple[int, ...]) -> dict[str, list[float]]:
    """layers: those whose K and V a cache compresses. Name of a projection -> `NUMBERS` numbers that stand for what it
    makes and, last, its tolerance. Empty where no projection can be asked. A model whose rotation was extended
    (rotary/extension.py) has an entry more, whose name says how: the keys of one turned otherwise are others."""
    found = {}
    for name, module in _projections(model, layers):
        made = _made(module, model.dtype)
        if made is not None:
            values, allowed = made
            short = (_signs(NUMBERS, len(values), 2) @ values.double().cpu() / len(values) ** 0.5).tolist()
            found[name] = [*(float(f"{x:.6g}") for x in short), allowed]
    config = model.config.get_text_config(decoder=True)
    if found and getattr(config, MARK, None) is not None:
        found[f"rotation {json.dumps(config.rope_parameters, sort_keys=True)}"] = [1.0, 0.0]
    return found


def same(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> bool:
    """Whether two fingerprints are of models that make the same K and V, within the stated tolerance."""
    if ours.keys() != theirs.keys() or not ours:
        return False
    return all(
        _far(torch.tensor(mine[:-1]), torch.tensor(theirs[name][:-1])) <= max(mine[-1], theirs[name][-1])
        for name, mine in ours.items()
    )


def digest(found: dict[str, list[float]]) -> str:
    """A short name for a file."""
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]
