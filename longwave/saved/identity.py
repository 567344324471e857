"""Which model a saved cache is of: everything that decides K and V of a text, not the projections alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.plan.fingerprint import fingerprint, same
from longwave.saved.container import SavedCacheError
from longwave.shape import CacheShape

NUMBERS = 64  # looked at in each weight
# what a config says of how K and V come about; other entries come and go with transformers' versions
_CONFIG = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "intermediate_size", "layer_types", "sliding_window", "rope_parameters", "rms_norm_eps", "hidden_act",
)  # fmt: skip


@torch.no_grad()
def weights(model: PreTrainedModel) -> str:
    """Hex digest of a sample of every weight by name, in float32 as in bfloat16: what is sampled is rounded."""
    found = hashlib.blake2b(digest_size=16)
    for name, x in sorted(model.named_parameters()):
        flat = x.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // NUMBERS)][:NUMBERS]
        if some.is_floating_point() and some.dtype.itemsize > 1:
            some = some.to(torch.bfloat16)
        found.update(f"{name} {list(x.shape)}\0".encode())
        found.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def identity(model: PreTrainedModel, shape: CacheShape) -> dict[str, Any]:
    """What a file says of its model."""
    config = model.config.get_text_config(decoder=True)
    said = {name: getattr(config, name, None) for name in _CONFIG}
    return json.loads(
        json.dumps(
            {
                "name": getattr(model.config, "_name_or_path", "") or type(model).__name__,
                "class": type(model).__name__,
                "config": {
                    name: value for name, value in said.items() if isinstance(value, (int, float, str, list, dict))
                },
                "shape": repr(shape),
                "weights": weights(model),
                "projections": fingerprint(model, shape.memory_layers),
            }
        )
    )  # as a file gives it back


def check_identity(model: PreTrainedModel, shape: CacheShape, theirs: dict[str, Any], path: Any) -> None:
    """SavedCacheError where a file is of another model than this."""
    ours = identity(model, shape)
    differs = ""
    if ours["config"] != theirs["config"]:
        odd = next(name for name in _CONFIG if ours["config"].get(name) != theirs["config"].get(name))
        differs = f"its {odd} was {theirs['config'].get(odd)}, and this one's is {ours['config'].get(odd)}"
    elif ours["shape"] != theirs["shape"]:
        differs = f"its cache was {theirs['shape']}, and here it is {ours['shape']}: load the model in the same type"
    elif ours["weights"] != theirs["weights"]:
        differs = "its weights were others"
    elif (ours["projections"] or theirs["projections"]) and not same(ours["projections"], theirs["projections"]):
        differs = "it makes other K and V of the same input: an adapter that was on, or off?"
    if differs:
        raise SavedCacheError(f"{path} was saved from another model than {ours['name']} ({theirs['name']}): {differs}")
