"""Small checkpoints in the layouts of LLaDA and Dream, random weights in two shards, and their own forward."""

import json
import math

import torch
from safetensors.torch import save_file

LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "clip_qkv": None,
    "d_model": 32,
    "embedding_size": 97,
    "eos_token_id": 94,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 95,
    "max_sequence_length": 512,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 3,
    "pad_token_id": 94,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 97,
    "weight_tying": False,
}
DREAM = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 94,
    "eos_token_id": 94,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": 95,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 94,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 97,
}


def weights(said):
    """Random weights under the names that a checkpoint has them by."""
    torch.manual_seed(0)
    made = {}

    def matrix(name, *shape):
        made[name] = torch.randn(shape) * (0.12 if len(shape) == 2 else 0.1)

    def norm(name, size):
        made[name] = 1 + 0.2 * torch.randn(size)

    if said["model_type"] == "llada":
        width, inner, top = said["d_model"], said["mlp_hidden_size"], "model.transformer."
        matrix(top + "wte.weight", said["embedding_size"], width)
        for i in range(said["n_layers"]):
            for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
                matrix(f"{top}blocks.{i}.{name}.weight", width, width)
            for name, shape in (("ff_proj", (inner, width)), ("up_proj", (inner, width)), ("ff_out", (width, inner))):
                matrix(f"{top}blocks.{i}.{name}.weight", *shape)
            norm(f"{top}blocks.{i}.attn_norm.weight", width)
            norm(f"{top}blocks.{i}.ff_norm.weight", width)
        norm(top + "ln_f.weight", width)
        matrix(top + "ff_out.weight", said["embedding_size"], width)
        return made
    width, inner = said["hidden_size"], said["intermediate_size"]
    kv = width // said["num_attention_heads"] * said["num_key_value_heads"]
    matrix("model.embed_tokens.weight", said["vocab_size"], width)
    for i in range(said["num_hidden_layers"]):
        top = f"model.layers.{i}."
        for name, size in (("q_proj", width), ("k_proj", kv), ("v_proj", kv)):
            matrix(f"{top}self_attn.{name}.weight", size, width)
            matrix(f"{top}self_attn.{name}.bias", size)
        matrix(top + "self_attn.o_proj.weight", width, width)
        matrix(top + "mlp.gate_proj.weight", inner, width)
        matrix(top + "mlp.up_proj.weight", inner, width)
        matrix(top + "mlp.down_proj.weight", width, inner)
        norm(top + "input_layernorm.weight", width)
        norm(top + "post_attention_layernorm.weight", width)
    norm("model.norm.weight", width)
    matrix("lm_head.weight", said["vocab_size"], width)
    return made


def write(folder, said, tokenizer):
    """A checkpoint as the hub has it: config.json, two shards with their index, a tokenizer, code that must not run."""
    folder.mkdir(parents=True, exist_ok=True)
    held = weights(said)
    names = sorted(held)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: held[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    about = {"metadata": {"total_size": sum(x.nbytes for x in held.values())}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(said))
    for file in said["auto_map"].values():
        (folder / f"{file.partition('.')[0]}.py").write_text("raise SystemExit('remote code ran')\n")
    return held


def forward(said, held, ids):
    """Logits [batch, tokens, vocabulary], float64, of ids that all see each other, none of them padding."""
    w = {name: x.double() for name, x in held.items()}
    llada = said["model_type"] == "llada"
    heads = said["n_heads" if llada else "num_attention_heads"]
    kv_heads = said["n_kv_heads" if llada else "num_key_value_heads"]
    eps = said["rms_norm_eps"]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def turn(x):  # channel c of the first half and of the second are the two sides of a plane
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[2])[:, None] / said["rope_theta"] ** (torch.arange(half).double() / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def split(x, count):
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    if llada:
        names = dict(embed="model.transformer.wte", last="model.transformer.ln_f", head="model.transformer.ff_out")
        inner = dict(one="attn_norm", q="q_proj", k="k_proj", v="v_proj", o="attn_out")
        inner |= dict(two="ff_norm", gate="ff_proj", up="up_proj", down="ff_out")
        layers = [f"model.transformer.blocks.{i}." for i in range(said["n_layers"])]
    else:
        names = dict(embed="model.embed_tokens", last="model.norm", head="lm_head")
        inner = dict(one="input_layernorm", two="post_attention_layernorm")
        inner |= {x: f"self_attn.{x}_proj" for x in "qkvo"} | {x: f"mlp.{x}_proj" for x in ("gate", "up", "down")}
        layers = [f"model.layers.{i}." for i in range(said["num_hidden_layers"])]
    x = w[names["embed"] + ".weight"][ids]
    for layer in layers:
        h = norm(x, layer + inner["one"])
        q, k = turn(split(linear(h, layer + inner["q"]), heads)), turn(split(linear(h, layer + inner["k"]), kv_heads))
        v = split(linear(h, layer + inner["v"]), kv_heads)
        k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (k, v))
        seen = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
        x = x + linear(seen.transpose(1, 2).flatten(2), layer + inner["o"])
        h = norm(x, layer + inner["two"])
        gate = linear(h, layer + inner["gate"])
        x = x + linear(gate * torch.sigmoid(gate) * linear(h, layer + inner["up"]), layer + inner["down"])
    return linear(norm(x, names["last"]), names["head"])
