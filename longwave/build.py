"""`longwave.cache`: from a model, a method and a budget to an empty cache that fits them."""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from longwave.attention import use_longwave_attention
from longwave.budget import bind_to_size, parse_budget
from longwave.cache import LongCache, other_layers
from longwave.methods import Fourier, Method, get_method
from longwave.methods.base import CacheShape
from longwave.profile import Profile, shipped


def check_supported(model: PreTrainedModel) -> PretrainedConfig:
    """The decoder config of a model that a LongCache can serve; an error that says why for any other."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    reasons = {
        "is an encoder-decoder model": getattr(model.config, "is_encoder_decoder", False),
        "stores latents instead of K and V (MLA)": getattr(config, "kv_lora_rank", None),
        "caps attention logits (soft-capping)": getattr(config, "attn_logit_softcapping", None),
        "shares K and V between layers": getattr(config, "num_kv_shared_layers", None)
        or getattr(config, "kv_sharing_modes", None),
        "learns attention sinks": config.model_type.startswith("gpt_oss"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise NotImplementedError(f"{name} {reason}: longwave does not support that yet")
    if all(layer is not None for layer in other_layers(config)):
        raise NotImplementedError(f"{name} has no full-attention layer, so there is nothing for a LongCache to hold")
    return config


def cache(
    model: PreTrainedModel,
    method: str | Method = "fourier",
    budget: float | str | None = None,
    profile: Profile | str | Path | None = None,
    max_tokens: int | None = None,
    batch: int = 1,
    **options: object,
) -> LongCache:
    """An empty cache for `model.generate(past_key_values=...)`, holding its memory as `method` does.

    method: a name ("dense", "fourier", "fourier-paper", "kivi") with its `options` as keywords, or an instance.
    budget: a fraction such as 0.25 of the dense bytes of the middle of the context, or a size such as "512MiB" for
        the whole cache of `batch` rows of `max_tokens` (default: the model's context length); longer input is then
        refused. None leaves it to the method.
    profile: a `Profile` or its path; None takes the one that ships with the package, if the model has one.

    Selects longwave's attention function on the model (`model.set_attn_implementation`); its other caches keep working.
    Warns where "fourier" has to plan without a measurement of the model.
    Raises ValueError for options, budgets or profiles that do not fit, NotImplementedError for unsupported models.
    """
    config = check_supported(model)
    if isinstance(method, str):
        method = get_method(method, **options)
    elif not isinstance(method, Method):
        raise TypeError(f"method is a name or an instance such as longwave.Fourier(...), got {type(method).__name__}")
    elif options:
        raise ValueError(f"options belong in the method instance when one is given: {', '.join(options)}")
    fraction, size = (None, None) if budget is None else parse_budget(budget)
    shape = CacheShape.of(config, model.dtype)
    if isinstance(profile, (str, Path)):
        profile = Profile.load(profile)
    if profile is not None:
        profile.check(model, shape)
    elif isinstance(method, Fourier):
        profile = shipped(model, shape, paper=method.segment is None)

    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is a whole number of rows, at least 1; got {batch!r}")
    others = other_layers(config)
    if size is not None and not all(layer is None or getattr(layer, "is_sliding", False) for layer in others):
        raise NotImplementedError(
            "this model has layers that are neither full nor sliding attention, and what they hold is not known "
            "beforehand: give the budget as a fraction"
        )
    longest = max_tokens if max_tokens is not None else getattr(config, "max_position_embeddings", None)
    if max_tokens is not None and (max_tokens < 1 or size is None):
        raise ValueError('max_tokens is at least 1 and goes with a budget given as a size, such as "512MiB"')
    if size is None:
        method = method.bind(shape, profile, fraction)
    elif longest is None:
        raise ValueError("this model names no context length: give max_tokens with a budget in bytes")
    else:
        method = bind_to_size(method, shape, profile, size, longest, batch)

    if isinstance(method, Fourier) and method.warning:
        warnings.warn(method.warning, stacklevel=2)
    use_longwave_attention(model)
    layers = [method.layer(index, shape) if layer is None else layer for index, layer in enumerate(others)]
    built = LongCache(layers, method)
    if size is not None:
        for layer in built.memory_layers():
            layer.max_tokens, layer.max_rows = longest, batch
    return built
