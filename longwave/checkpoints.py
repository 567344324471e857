"""Checkpoints whose own classes are code on the hub, read into transformers' stock ones; that code never runs.

They are masked-diffusion models: LLaDA-8B (Base, Instruct, 1.5) is a Llama under other names, Dream-7B is a Qwen2. Both
attend in both directions, which transformers does where a config says `is_causal=False`. What a sampler has to know
stands in the config too, and so in whatever is saved of the model: `mask_token_id`, and `logit_shift`, whether the
logits at a position speak of the next token, as in Dream, or of that very one, as in LLaDA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

DREAM_CONTEXT = 2048  # tokens it was trained on, say its authors; its config has the context of its origin, Qwen2.5


@dataclass(frozen=True)
class Layout:
    """How to read one kind: `config` makes the stock config of what config.json says; names: patterns of weights'
    names and what stands in a stock model for them."""

    model: type[PreTrainedModel]
    config: Callable[[Mapping[str, Any]], PretrainedConfig]
    tokenizer: Any
    names: Mapping[str, str] = field(default_factory=dict)


def layout_of(path: str | Path, **shared: Any) -> tuple[Layout, PretrainedConfig] | None:
    """How to read the checkpoint of a hub id or path, and its stock config; None where transformers knows it itself.

    ValueError for one of ours that a stock class would compute otherwise.
    """
    if "gguf_file" in shared:
        return None
    where = {name: value for name, value in shared.items() if name != "trust_remote_code"}
    said, _ = PretrainedConfig.get_config_dict(path, **where)
    layout = LAYOUTS.get(str(said.get("model_type")))
    return None if layout is None else (layout, layout.config(said))


def read_model(layout: Layout, config: PretrainedConfig, path: str | Path, **options: Any) -> Any:
    """What `from_pretrained` gives: the model, or with output_loading_info=True the model and what was missing."""
    options.pop("trust_remote_code", None)
    names = dict(layout.names) or None
    read: Any = layout.model.from_pretrained(path, config=config, key_mapping=names, **options)
    loaded = read[0] if isinstance(read, tuple) else read
    if hasattr(loaded, "_weight_conversions"):
        del loaded._weight_conversions  # it would be saved under the old names, and a stock config beside them
    return read


def read_tokenizer(layout: Layout, path: str | Path, **shared: Any) -> PreTrainedTokenizerBase:
    shared.pop("trust_remote_code", None)
    return layout.tokenizer.from_pretrained(path, **shared)


# LLaDA

# the options of its code that a Llama has not: what stands there must be this, where it stands there
LLADA_PLAIN: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "clip_qkv": (None,),
    "multi_query_attention": (None, False),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "bias_for_layer_norm": (False, None),
    "scale_logits": (False,),
    "input_emb_norm": (False,),
}


def llada_config(said: Mapping[str, Any]) -> LlamaConfig:
    """The Llama that a LLaDA is. ValueError names the first option that no Llama has."""
    for name, plain in LLADA_PLAIN.items():
        if name in said and said[name] not in plain:
            raise ValueError(
                f"this LLaDA has {name}={said[name]!r}, and a stock Llama computes {name}={plain[0]!r}: it cannot be "
                "read as one"
            )
    return LlamaConfig(
        vocab_size=said.get("embedding_size") or said["vocab_size"],
        hidden_size=said["d_model"],
        intermediate_size=said.get("mlp_hidden_size") or said["mlp_ratio"] * said["d_model"],
        num_hidden_layers=said["n_layers"],
        num_attention_heads=said["n_heads"],
        num_key_value_heads=said.get("n_kv_heads") or said["n_heads"],
        max_position_embeddings=said["max_sequence_length"],
        rms_norm_eps=said["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": said["rope_theta"]},
        tie_word_embeddings=said.get("weight_tying", False),
        bos_token_id=None,
        eos_token_id=said["eos_token_id"],
        pad_token_id=said.get("pad_token_id"),
        **_common(said, logit_shift=False),
    )


LLADA_NAMES = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
}


# Dream


def dream_config(said: Mapping[str, Any]) -> Qwen2Config:
    """The Qwen2 that a Dream is, with the context that it was trained on."""
    own = {"auto_map", "architectures", "model_type", "transformers_version", *_common(said, True), "torch_dtype"}
    kept = {name: value for name, value in said.items() if name not in own}
    if kept.get("use_sliding_window"):
        raise ValueError("this Dream has use_sliding_window=True, and what its code makes of that is not known")
    kept["max_position_embeddings"] = min(kept.get("max_position_embeddings", DREAM_CONTEXT), DREAM_CONTEXT)
    return Qwen2Config(**kept, **_common(said, logit_shift=True))


def _common(said: Mapping[str, Any], logit_shift: bool) -> dict[str, Any]:
    dtype = said.get("dtype") or said.get("torch_dtype")
    return {
        **({} if dtype is None else {"dtype": dtype}),
        "is_causal": False,
        "use_cache": False,
        "mask_token_id": said["mask_token_id"],
        "logit_shift": logit_shift,
    }


LAYOUTS = {  # by the model_type of config.json
    "llada": Layout(LlamaForCausalLM, llada_config, PreTrainedTokenizerFast, LLADA_NAMES),
    "Dream": Layout(Qwen2ForCausalLM, dream_config, Qwen2Tokenizer),
}
