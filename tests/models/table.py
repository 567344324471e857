"""Models of today, as configurations of a few thousand weights: data for the checks, and for docs/models.md."""

from dataclasses import dataclass, field
from typing import Any

from tests.conftest import SMALL, VOCABULARY

BASE = dict(SMALL, num_hidden_layers=2)
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
WINDOW = dict(layer_types=[SLIDING, FULL], sliding_window=16)
ROTARY = dict(rope_type="default", rope_theta=10000.0)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=16)
DELTA = dict(
    layer_types=[LINEAR, FULL],
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
)
LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=16.0
)  # fmt: skip
GEMMA3N = dict(WINDOW, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, laurel_rank=8)
GEMMA3N |= dict(altup_num_inputs=2)
GEMMA4 = dict(WINDOW, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, global_head_dim=16)
SHARING = dict(layer_types=[SLIDING, FULL] * 2, num_hidden_layers=4, num_kv_shared_layers=2)
MLA = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
IMAGE = 2  # the token that stands for a part of an image
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
AUDIO = dict(
    hidden_size=16,
    intermediate_size=16,
    num_blocks=1,
    num_attention_heads=2,
    ext_pw_out_channel=16,
    nemo_conv_channels=16,
    depthwise_separable_out_channel=16,
    bias_max_distance=10,
)

NO_FULL = "has no full-attention layer, so there is nothing for a LongCache to hold"
YET = "longwave does not support that yet"
SHARED = f"shares K and V between layers (2 of 4 have none of their own): {YET}"
BEHIND = "works with K and V itself after its cache gave them back"
OUTSIDE = "does not call attention through transformers' AttentionInterface, so no cache can answer for it"


@dataclass(frozen=True)
class Row:
    """name: of the family. kind: transformers' model type. config: what it has beside `BASE`, or all where `whole`.

    refused: the error, word for word, where longwave does not support the model. unpaged: methods that pack bits do not
    fit it, and why. but: what a prompt in two calls has to mind.
    """

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    but: str = ""
    unpaged: str = ""
    whole: bool = False

    def __str__(self) -> str:
        return self.name


ROWS = [
    Row("Llama 2, 3", "llama"),
    Row("Mistral", "mistral", dict(sliding_window=None)),
    Row("Mistral 7B v0.1", "mistral", dict(sliding_window=16), f"MistralForCausalLM {NO_FULL}"),
    Row("Mixtral", "mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    Row("Qwen2, 2.5", "qwen2"),
    Row("Qwen2 with sliding layers", "qwen2", dict(use_sliding_window=True, max_window_layers=1, sliding_window=16)),
    Row("Qwen3", "qwen3"),
    Row("Qwen3 MoE", "qwen3_moe", dict(EXPERTS, num_experts=4)),
    Row("Qwen3-Next", "qwen3_next", dict(DELTA, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16)),
    Row("Qwen3.5", "qwen3_5_text", DELTA),
    Row(
        "Gemma 2", "gemma2", dict(WINDOW, query_pre_attn_scalar=8),
        f"Gemma2Attention caps attention logits (soft-capping): {YET}",
    ),
    Row("Gemma 3", "gemma3_text", dict(WINDOW, query_pre_attn_scalar=8)),
    Row(
        "Gemma 3n", "gemma3n_text",
        GEMMA3N | SHARING | dict(intermediate_size=[48] * 4, activation_sparsity_pattern=[0.0] * 4),
        f"Gemma3nForCausalLM {SHARED}",
    ),
    Row(
        "Gemma 3n, nothing shared", "gemma3n_text",
        GEMMA3N | dict(num_kv_shared_layers=0, intermediate_size=[48] * 2, activation_sparsity_pattern=[0.0] * 2),
    ),
    Row(
        "Gemma 4 (26B, 31B)", "gemma4_text",
        GEMMA4 | dict(num_kv_shared_layers=0, hidden_size_per_layer_input=0, num_global_key_value_heads=1,
                      attention_k_eq_v=True),
    ),
    Row("Gemma 4 (E2B, E4B)", "gemma4_text", GEMMA4 | SHARING, f"Gemma4ForCausalLM {SHARED}"),
    Row(
        "Phi-3, 3.5", "phi3",
        dict(sliding_window=None, original_max_position_embeddings=32, rope_parameters=LONGROPE),
        but="a prompt that passes its short window is read in one call, since all keys are rotated otherwise beyond",
    ),
    Row(
        "Phi-4-multimodal, text", "phi4_multimodal",
        dict(sliding_window=None, vision_config=VISION, audio_config=AUDIO),
    ),
    Row("OLMo 2", "olmo2"),
    Row("OLMo 3", "olmo3", WINDOW),
    Row("SmolLM3", "smollm3", dict(no_rope_layers=[1, 0])),
    Row(
        "Granite 4", "granitemoehybrid",
        dict(MAMBA, layer_types=[LINEAR, FULL], num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16,
             position_embedding_type=None),
    ),
    Row("Falcon-H1", "falcon_h1", dict(MAMBA, mamba_d_ssm=64)),
    Row(
        "Zamba2", "zamba2",
        dict(layers_block_type=[LINEAR, "hybrid"], num_key_value_heads=4, n_mamba_heads=4, mamba_d_state=8,
             chunk_size=16, use_mem_rope=True),
    ),
    Row("LFM2", "lfm2", dict(layer_types=["conv", FULL], block_multiple_of=8)),
    Row(
        "Llama 4, text", "llama4_text",
        dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48, attention_chunk_size=16,
             no_rope_layers=[1, 0], layer_types=["chunked_attention", FULL]),
    ),
    Row("gpt-oss", "gpt_oss", dict(WINDOW, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROTARY)),
    Row("Granite SWA", "granite_swa", WINDOW),
    Row("GLM-4", "glm4"),
    Row("Cohere 2 (Command R7B, A)", "cohere2", WINDOW),
    Row("GPT-NeoX, Pythia", "gpt_neox", dict(num_key_value_heads=None)),
    Row("StarCoder", "gpt_bigcode", dict(num_key_value_heads=None)),
    Row("GPT-2", "gpt2", dict(num_key_value_heads=None)),
    Row("OpenLLaMA 3B", "llama", dict(head_dim=12), unpaged="fourier and kivi: heads of 100 channels do not fit pages"),
    Row(
        "Gemma 3 with images", "gemma3",
        dict(text_config=BASE | WINDOW | dict(query_pre_attn_scalar=8), vision_config=VISION, image_token_id=IMAGE,
             mm_tokens_per_image=4),
        whole=True,
    ),
    Row(
        "Qwen2.5-VL", "qwen2_5_vl",
        dict(text_config=BASE | dict(rope_parameters=ROTARY | dict(mrope_section=[1, 1, 2])),
             vision_config=VISION | dict(depth=1, num_heads=2, out_hidden_size=32, window_size=28,
                                         fullatt_block_indexes=[0]),
             image_token_id=IMAGE),
        whole=True,
    ),
    Row(
        "DeepSeek-V3, R1", "deepseek_v3",
        dict(MLA, **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
        f"DeepseekV3Attention stores latents, which it expands to K and V itself (MLA): {YET}",
    ),
    Row(
        "MiMo-V2-Flash", "mimo_v2_flash", dict(WINDOW, **EXPERTS, v_head_dim=4, n_routed_experts=4),
        f"MiMoV2FlashForCausalLM has keys of 8 channels and values of 4: {YET}",
    ),
    Row("DiffLlama", "diffllama", {}, f"DiffLlamaAttention {BEHIND} (torch.chunk(value_states, 2, dim=1)): {YET}"),
    Row("Doge", "doge", {}, f"DogeAttention {BEHIND} (value_states.transpose): {YET}"),
    Row(
        "JetMoE", "jetmoe", dict(kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
        f"JetMoeAttention {BEHIND} (key_states.repeat): {YET}",
    ),
    Row("MiniMax-01", "minimax", {}, f"MiniMaxForCausalLM keeps its past in a cache of its own class: {YET}"),
    Row("BLOOM", "bloom", {}, f"BloomAttention {OUTSIDE}: {YET}"),
    Row("Mamba 2", "mamba2", dict(num_heads=4, head_dim=16, state_size=8, n_groups=1), f"Mamba2ForCausalLM {NO_FULL}"),
    Row(
        "T5", "t5", dict(decoder_start_token_id=0, num_decoder_layers=2),
        f"T5ForConditionalGeneration is an encoder-decoder model, which takes two caches: {YET}",
    ),
]  # fmt: skip
