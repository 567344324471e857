"""What transformers calls: one attention function and one mask function, both under the name "longwave".

They serve two kinds of caches. For a `LongCache` layer the key that arrives is its `Handle`, and the layer answers.
For everything else (no cache, transformers' own caches, sliding layers) they are transformers' sdpa, unchanged.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

NAME = "longwave"


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


# arguments that change what attention means; a layer that ignored one would be silently wrong
_REFUSED = {
    "softcap": "logit soft-capping",
    "s_aux": "learned attention sinks",
    "position_bias": "a position bias",
    "cu_seq_lens_q": "packed sequences",
}


@torch.compiler.disable  # what it does depends on the cache: compiled layers go around it
def longwave_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query [B, Hq, Q, D], key and value as `update` returned them -> ([B, Q, Hq, D], None)."""
    if not isinstance(key, Handle):
        if kwargs.get("s_aux") is not None:  # sdpa would ignore it
            raise NotImplementedError(f"{type(module).__name__} learns attention sinks: load it with its own attention")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} uses {what}, which a longwave cache cannot honour yet")
    if dropout or module.training:
        raise ValueError("a longwave cache is for inference: call model.eval() first")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("a longwave cache never forms attention weights: drop output_attentions=True")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.layer.forward(query, scaling, attention_mask).transpose(1, 2).contiguous(), None


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
    """A `StepMask` for a LongCache and a plain pattern, transformers' sdpa mask otherwise."""
    plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    if isinstance(kv_length, LogicalLength) and local_size is None and plain:
        if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, kv_length):
            raise ValueError(
                f"the attention mask is {list(attention_mask.shape)} but the cache and the new tokens make "
                f"[{batch_size}, {int(kv_length)}]. To continue a cache pass all ids, cached ones too, or new ids "
                "together with a mask over everything"
            )
        return StepMask(attention_mask, mask_function is causal_mask_function)
    return sdpa_mask(
        batch_size,
        q_length,
        int(kv_length) if isinstance(kv_length, LogicalLength) else kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        **kwargs,
    )


def use_longwave_attention(model: PreTrainedModel) -> None:
    """Select our functions on a model. Its other caches go on working: they get transformers' sdpa."""
    AttentionInterface.register(NAME, longwave_attention)
    AttentionMaskInterface.register(NAME, longwave_mask)
    text_config = model.config.get_text_config(decoder=True)
    if text_config._attn_implementation == NAME:
        return
    if not model._can_set_attn_implementation():
        raise NotImplementedError(
            f"{type(model).__name__} does not call attention through transformers' AttentionInterface, "
            "so no cache can answer for it"
        )
    nested = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text_config]
    model.set_attn_implementation({nested[0]: NAME} if nested else NAME)
