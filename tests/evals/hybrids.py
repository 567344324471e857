"""Small random models some of whose layers are not full attention but sliding, delta rule, state space, convolution,
or attend beside such a state."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import SMALL, build

LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=8)
KINDS = {
    "gemma3": {},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], **LINEAR},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 0, **MAMBA},
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}


def hybrid(kind):
    if kind == "gemma3":
        return build(kind)
    torch.manual_seed(0)
    options = {**SMALL, "num_hidden_layers": 2, **KINDS[kind]}
    if kind == "granitemoehybrid":
        options = {name: value for name, value in options.items() if name != "head_dim"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    for name, parameter in model.named_parameters():  # at the usual scale a random model repeats one token
        if parameter.ndim == 2 and "conv" not in name:
            parameter.data *= 12
    return model.eval()
