"""The part of a model that decides how many bytes a cache takes, and how long a context it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def other_layers(config: PretrainedConfig) -> list[Any]:
    """transformers' own cache layers for a decoder config; None where full attention wants a memory layer."""
    return [None if type(layer) is DynamicLayer else layer for layer in DynamicCache(config=config).layers]


def context_limit(model: PreTrainedModel | PretrainedConfig) -> int | None:
    """Tokens that a model, or its config, reads at most, prompt and answer together; None where it names no limit."""
    config: Any = getattr(model, "config", model)
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


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


@dataclass(frozen=True)
class CacheShape:
    """Layers, heads and type of a model's cache."""

    memory_layers: tuple[int, ...]  # indices of the full-attention layers
    sliding_tokens: tuple[int, ...]  # tokens that each sliding layer holds at most
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    query_heads: int = 0  # 0: as many as kv_heads

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype) -> CacheShape:
        """From a decoder config (`config.get_text_config(decoder=True)`)."""
        others = other_layers(config)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(
            memory_layers=tuple(i for i, layer in enumerate(others) if layer is None),
            sliding_tokens=tuple(layer.sliding_window for layer in others if getattr(layer, "is_sliding", False)),
            kv_heads=heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
            query_heads=config.num_attention_heads,
        )

    @property
    def token_bytes(self) -> int:
        """Dense K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def sliding_bytes(self, tokens: int) -> int:
        """At most: a window, a quarter more where transformers holds a view of it, and a counter."""
        return sum(min(tokens, limit + limit // 4) * self.token_bytes + 64 for limit in self.sliding_tokens)
