"""What transformers calls: an attention function and a mask function under one name of ours.

They serve two kinds of caches. For a `LongCache` layer the key that arrives is its `Handle`, and the layer answers. For
everything else (no cache, transformers' own caches, sliding layers) they are what the model used before: there is a
name for each implementation that a model may come with, "longwave" over sdpa.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "longwave"
# What a model attended by before -> our name over it. More come as they are met, by number: no part of such a name may
# be one that transformers looks for ("flash").
_OVER = {"sdpa": NAME}
_lock = threading.Lock()

# What these do depends on the cache: compiled code goes around them, and where it may not (fullgraph=True), says this.
uncompiled = partial(
    torch.compiler.disable,
    reason="a longwave cache is not compiled: leave fullgraph=True out, or let longwave.generate(compile=True) compile",
)


def is_ours(implementation: str | None) -> bool:
    """Whether a config's `_attn_implementation` is one of our names."""
    return implementation in _OVER.values()


class LogicalLength(int):
    """A count of tokens that says: the cache behind it is a LongCache. The mask function sees no cache otherwise."""


class StepMask:
    """What one forward pass may see, made once and handed to every layer."""

    def __init__(self, padding: torch.Tensor | None, causal: bool):
        self.causal = causal
        self.padding = padding  # bool [batch, columns], True where a token is real; None where all are
        self._rows: list[int] | None = None

    @property
    def rows(self) -> list[int]:
        """Real tokens of each row, this pass included. Read back from the device once a pass."""
        assert self.padding is not None
        if self._rows is None:
            self._rows = self.padding.sum(-1).tolist()
        return self._rows

    def to(self, device: torch.device, *args: Any, **kwargs: Any) -> "StepMask":
        """accelerate moves a layer's inputs to its device by calling this."""
        moved = StepMask(None if self.padding is None else self.padding.to(device), self.causal)
        moved._rows = self._rows
        return moved


class Handle:
    """What a memory layer returns in place of K and V; the attention function asks it for the answer."""

    def __init__(self, layer: Any):
        self.layer = layer

    def to(self, *args: Any, **kwargs: Any) -> "Handle":
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever only looks
            raise AttributeError(name)
        raise RuntimeError(
            "a longwave cache was given to a model that attends by something else: longwave.cache(model, ...) on that "
            "very model selects what can read it, and set_attn_implementation afterwards undoes that"
        )


# arguments that change what attention means; a layer that ignored one would be silently wrong
_REFUSED = {
    "softcap": "logit soft-capping",
    "position_bias": "a position bias",
    "cu_seq_lens_q": "packed sequences",
}


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    handle: Any,
    attention_mask: Any,
    dropout: float,
    scaling: float | None,
    given: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    for name, what in _REFUSED.items():
        if given.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} uses {what}, which a longwave cache cannot honour yet")
    if dropout or module.training:
        raise ValueError("a longwave cache is for inference: call model.eval() first")
    if given.get("output_attentions"):
        raise NotImplementedError("a longwave cache never forms attention weights: drop output_attentions=True")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = query.device.type
    with own_arithmetic(kind):
        positions, sinks = given.get("position_ids"), given.get("s_aux")
        out = handle.layer.forward(query, scaling, attention_mask, module, positions, sinks)
    return out.to(stored_dtype(out.dtype, kind)).transpose(1, 2).contiguous(), None


def stored_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What K and V come in where a model of `dtype` runs on a type of device: autocast's own type inside of it."""
    return torch.get_autocast_dtype(device) if dtype != torch.float64 and _mixes(device) else dtype


def own_arithmetic(device: str) -> AbstractContextManager[Any]:
    """In here torch.autocast does not reach what layers compute: that is of the types that they store."""
    return torch.autocast(device, enabled=False) if _mixes(device) else nullcontext()


def _mixes(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" has none


def _attention_over(origin: str) -> Callable[..., Any]:
    @uncompiled
    def longwave_attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: Any,
        value: Any,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query [B, Hq, Q, D], key and value as `update` returned them -> ([B, Q, Hq, D], weights or None)."""
        if isinstance(key, Handle):
            return _attend(module, query, key, attention_mask, dropout, scaling, kwargs)
        if origin == "eager":  # every model's file has its own
            plain = next(
                found
                for cls in type(module).__mro__
                if (found := getattr(sys.modules[cls.__module__], "eager_attention_forward", None)) is not None
            )
        else:
            if kwargs.get("s_aux") is not None and origin == "sdpa":  # it would ignore them
                name = type(module).__name__
                raise NotImplementedError(f"{name} learns attention sinks: load it with its own attention")
            plain = ALL_ATTENTION_FUNCTIONS[origin]
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)

    return longwave_attention


def _mask_over(origin: str) -> Callable[..., Any]:
    @uncompiled
    def longwave_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Any = causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        local_size: int | None = None,
        **kwargs: Any,
    ) -> StepMask | torch.Tensor | None:
        """A `StepMask` for a LongCache and a plain pattern; else the mask that the model's own attention wants."""
        plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
        if isinstance(kv_length, LogicalLength) and local_size is None and plain:
            if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, kv_length):
                raise ValueError(
                    f"the attention mask is {list(attention_mask.shape)} but the cache and the new tokens make "
                    f"[{batch_size}, {int(kv_length)}]. To continue a cache pass all ids, cached ones too, or new ids "
                    "together with a mask over everything"
                )
            return StepMask(attention_mask, mask_function is causal_mask_function)
        # a pattern of the model's own over a LongCache is a 4D mask, which sdpa's function makes
        known = origin in ALL_MASK_ATTENTION_FUNCTIONS and not isinstance(kv_length, LogicalLength)
        make = ALL_MASK_ATTENTION_FUNCTIONS[origin if known else "sdpa"]
        return make(
            batch_size,
            q_length,
            int(kv_length) if isinstance(kv_length, LogicalLength) else kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            local_size=local_size,
            **kwargs,
        )

    return longwave_mask


def use_longwave_attention(model: PreTrainedModel) -> None:
    """Select our functions on a model. Its other uses go on as before: they get what it attended by until now."""
    text_config = model.config.get_text_config(decoder=True)
    with _lock:
        origin = text_config._attn_implementation
        if is_ours(origin):
            return
        if not model._can_set_attn_implementation():
            raise NotImplementedError(
                f"{type(model).__name__} does not call attention through transformers' AttentionInterface, "
                "so no cache can answer for it"
            )
        if origin != "eager" and origin not in ALL_ATTENTION_FUNCTIONS:
            raise NotImplementedError(
                f"{type(model).__name__} attends by {origin!r}, which a cache cannot stand in front of: "
                'model.set_attn_implementation("sdpa") first'
            )
        name = _OVER.setdefault(origin, f"{NAME}_over_{len(_OVER)}")
        AttentionInterface.register(name, _attention_over(origin))
        AttentionMaskInterface.register(name, _mask_over(origin))
        nested = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text_config]
        model.set_attn_implementation({nested[0]: name} if nested else name)
