"""The part of a model that decides how many bytes a cache takes and how long a context it knows, and whether a memory
layer can stand in its attention at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from longwave.attends import source_of, told, why_not
from longwave.rotary.extension import MARK


def other_layers(config: PretrainedConfig) -> list[Any]:
    """transformers' own cache layers for a decoder config; None where full attention wants a memory layer."""
    full = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
    return [None if type(layer) in full else layer for layer in DynamicCache(config=config).layers]


def states_beside(config: PretrainedConfig) -> dict[int, LinearAttentionLayer]:
    """Of the layers that want a memory layer, those that have a recurrent state as well: index -> its empty layer."""
    layers = enumerate(DynamicCache(config=config).layers)
    kind = LinearAttentionAndFullAttentionLayer
    return {i: LinearAttentionLayer(layer.number_of_states) for i, layer in layers if type(layer) is kind}


def holds_states(config: PretrainedConfig) -> bool:
    """Whether some layers hold what no configuration gives the size of: states of linear attention and the like."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


def context_limit(model: PreTrainedModel | PretrainedConfig) -> int | None:
    """Tokens that a model, or its config, reads at most, prompt and answer together; None where it names no limit."""
    whole: Any = getattr(model, "config", model)
    config = whole.get_text_config(decoder=True)
    extended = getattr(config, MARK, None)  # dynamic tables count from max_position_embeddings, which stays
    limit = getattr(config, "max_position_embeddings", None) if extended is None else extended["tokens"]
    return limit if isinstance(limit, int) else None


def check_supported(model: PreTrainedModel) -> PretrainedConfig:
    """The decoder config of a model that a LongCache can serve; NotImplementedError that says why for any other.

    Looks at configs, modules and their source: nothing runs, and the model stays as it is.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        _refuse(name, "is an encoder-decoder model, which takes two caches")
    takes_any = getattr(model, "_supports_default_dynamic_cache", None)  # private, of transformers
    if takes_any is not None and not takes_any():
        _refuse(name, "keeps its past in a cache of its own class")
    modes = getattr(config, "kv_sharing_modes", None)  # what transformers before 5.20 or so only counts
    sharing = sum(mode == "reuse" for mode in modes) if modes else getattr(config, "num_kv_shared_layers", 0) or 0
    if sharing:
        _refuse(
            name,
            f"shares K and V between layers ({sharing} of {config.num_hidden_layers} have none of their own)",
        )
    others = other_layers(config)
    memory = {index for index, layer in enumerate(others) if layer is None}
    if not memory:
        raise NotImplementedError(f"{name} has no full-attention layer, so there is nothing for a LongCache to hold")
    found = _attentions(model, others)
    if not found:
        _refuse(name, "has no attention module that gives K and V to a cache by update(keys, values, layer_idx)")
    shapes = {_shape_of(layer) for index, layer in enumerate(_layer_configs(config)) if index in memory}
    for module in found:
        if (why := why_not(module)) is not None:
            _refuse(type(module).__name__, why)
        heads, keys = shape = _shape_in(module, config)
        values = _value_channels(module, keys)
        if values != keys:
            _refuse(name, f"has keys of {keys} channels and values of {values}")
        if shape not in shapes:
            _refuse(name, f"has {heads} K and V heads of {keys} channels, and its config says other numbers")
    if len(shapes) > 1:
        said = " and ".join(f"{heads} heads of {channels} channels" for heads, channels in sorted(shapes))
        _refuse(name, f"has full-attention layers of different shapes ({said})")
    return config


def _refuse(name: str, why: str) -> NoReturn:
    raise NotImplementedError(f"{name} {why}: longwave does not support that yet")


def learns_sinks(model: PreTrainedModel) -> bool:
    """Whether a full-attention layer shares its attention with learned sinks."""
    others = other_layers(model.config.get_text_config(decoder=True))
    return any(told(module, "s_aux") for module in _attentions(model, others))


def _attentions(model: PreTrainedModel, others: list[Any]) -> list[Any]:
    """The modules of the text decoder that give K and V to a memory layer."""
    decoder = model.get_decoder() if callable(getattr(model, "get_decoder", None)) else None
    for top in (decoder, model):
        if isinstance(top, nn.Module):
            found: list[Any] = [m for m in top.modules() if source_of(m) is not None and hasattr(m, "layer_idx")]
            if found:  # a number that is no layer's is that of a module which several layers share (Zamba2)
                return [m for m in found if m.layer_idx not in range(len(others)) or others[m.layer_idx] is None]
    return []


def _layer_configs(config: PretrainedConfig) -> list[Any]:
    """A config for each layer, where layers may differ in head size and number."""
    return list(getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers)


def _shape_of(layer: Any) -> tuple[int, int]:
    """K and V heads and their channels, as a layer's config has them."""
    one = getattr(layer, "multi_query", False)  # as GPT-BigCode says it
    heads = 1 if one else getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    return heads, getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def _shape_in(module: Any, config: Any) -> tuple[int, int]:
    """The same, as an attention module has them; the query heads over each K and V head are what repeats K and V."""
    groups = getattr(module, "num_key_value_groups", 1)
    channels = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads // groups, channels


def _value_channels(module: Any, keys: int) -> int:
    given = getattr(module, "v_head_dim", None)
    if given is not None:
        return given
    k, v = (getattr(getattr(module, f"{side}_proj", None), "out_features", None) for side in ("k", "v"))
    return keys if not k or not v else keys * v // k


@dataclass(frozen=True)
class CacheShape:
    """Layers, heads and type of a model's cache."""

    memory_layers: tuple[int, ...]  # indices of the full-attention layers
    sliding_layers: tuple[tuple[int, int], ...]  # of each: tokens that it holds at most, bytes of one
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    query_heads: int = 0  # 0: as many as kv_heads
    hidden_size: int = field(default=0, repr=False, compare=False)  # it decides no plan

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype) -> CacheShape:
        """From a decoder config (`config.get_text_config(decoder=True)`) that `check_supported` has passed."""
        others, layers = other_layers(config), _layer_configs(config)
        memory = tuple(i for i, layer in enumerate(others) if layer is None)
        heads, channels = _shape_of(layers[memory[0]])
        return cls(
            memory_layers=memory,
            sliding_layers=tuple(
                (layer.sliding_window, _token_bytes(layers[i], dtype))
                for i, layer in enumerate(others)
                if getattr(layer, "is_sliding", False)
            ),
            kv_heads=heads,
            head_dim=channels,
            dtype=dtype,
            query_heads=layers[memory[0]].num_attention_heads,
            hidden_size=getattr(config, "hidden_size", 0),
        )

    @property
    def token_bytes(self) -> int:
        """Dense K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def check_pages(self) -> None:
        """NotImplementedError where pages of few bits cannot hold a head: they pack channels by eights."""
        if self.head_dim % 8:
            raise NotImplementedError(
                f"this model's heads have {self.head_dim} channels, and pages hold multiples of 8: take a method that "
                "keeps whole tokens, such as snapkv, h2o, streaming (without store) or quest"
            )

    def sliding_bytes(self, tokens: int) -> int:
        """At most: a window, a quarter more where transformers holds a view of it, and a counter."""
        return sum(min(tokens, limit + limit // 4) * each + 64 for limit, each in self.sliding_layers)


def _token_bytes(layer: Any, dtype: torch.dtype) -> int:
    heads, channels = _shape_of(layer)
    return heads * (channels + (getattr(layer, "v_head_dim", None) or channels)) * dtype.itemsize
