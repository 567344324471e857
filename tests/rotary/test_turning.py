"""Rotation undone on what models really store, for every kind of rotary embedding that transformers has."""

import copy
import pickle

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from longwave.rotary import Rotary
from tests.conftest import into

FAR = 100_000
SIZES = dict(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
HALVES = {"head_dim": 8}
MOE = HALVES | {
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
}  # fmt: skip
TWO_KINDS = HALVES | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
SHARED = HALVES | {  # the last two layers read the keys of the first two
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 32,
}  # fmt: skip


def rope(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **parameters}}


@pytest.fixture(autouse=True)
def one_thread():  # for models as small as these more threads only wait for each other
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# name: (model type, what its config has beside SIZES, layers that turn nothing)
CASES = {
    "llama": ("llama", HALVES, []),
    "llama-linear": ("llama", HALVES | rope("linear", factor=4.0), []),
    "llama-llama3": (
        "llama",
        HALVES
        | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
        [],
    ),
    "llama-yarn": ("llama", HALVES | rope("yarn", factor=4.0, original_max_position_embeddings=16), []),
    "qwen2": ("qwen2", {}, []),
    "qwen3": ("qwen3", HALVES, []),
    "qwen3_moe": ("qwen3_moe", MOE, []),
    "qwen3_next": ("qwen3_next", MOE | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}, []),
    "qwen3_5": ("qwen3_5_text", {"head_dim": 32, "layer_types": ["linear_attention", "full_attention"]}, []),
    "mistral": ("mistral", HALVES, []),
    "ministral3": ("ministral3", HALVES, []),
    "gemma": ("gemma", HALVES, []),
    "gemma2": ("gemma2", TWO_KINDS, []),
    "gemma3": ("gemma3_text", TWO_KINDS, []),
    "gemma3n": (
        "gemma3n_text",
        SHARED | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2},
        [],
    ),
    "gemma4": ("gemma4_text", SHARED | {"global_head_dim": 16}, []),
    "phi": ("phi", {"qk_layernorm": True}, []),
    "phi3": ("phi3", {}, []),
    "gpt_neox": ("gpt_neox", {}, []),
    "stablelm": ("stablelm", {}, []),
    "persimmon": ("persimmon", {}, []),
    "nemotron": ("nemotron", HALVES, []),
    "cohere": ("cohere", {"use_qk_norm": True}, []),
    "cohere2": ("cohere2", TWO_KINDS, [1]),
    "glm": ("glm", HALVES, []),
    "glm4": ("glm4", HALVES, []),
    "olmo2": ("olmo2", {}, []),
    "olmo3": ("olmo3", TWO_KINDS, []),
    "starcoder2": ("starcoder2", {}, []),
    "granite": ("granite", {}, []),
    "granite_swa": ("granite_swa", HALVES | {"num_hidden_layers": 3, "layer_rope_theta": [500.0, 90_000.0, 0]}, [2]),
    "granitemoehybrid": (
        "granitemoehybrid",
        MOE
        | {
            "layer_types": ["attention"] * 2,
            "position_embedding_type": "rope",
            "shared_intermediate_size": 8,
            "mamba_n_heads": 4,
        },
        [],
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}, [1]),
    "llama4": ("llama4_text", MOE | {"no_rope_layers": [1, 0], "intermediate_size_mlp": 8}, [1]),
    "exaone4": ("exaone4", TWO_KINDS, [1]),
    "ernie4_5": ("ernie4_5", HALVES, []),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, []),
    "gpt_oss": ("gpt_oss", MOE, []),  # YaRN
    "nanochat": ("nanochat", {}, []),
    "falcon": ("falcon", {"alibi": False}, []),
    "gptj": ("gptj", {"max_position_embeddings": FAR + 1, "rotary_dim": 4}, []),
    "codegen": ("codegen", {"max_position_embeddings": FAR + 1, "rotary_dim": 4}, []),
}


# name: (model type, its config, the reason)
REFUSED = {
    "learned": ("gpt2", {}, "no rotary embedding module"),
    "alibi": ("bloom", {}, "no rotary embedding module"),
    "falcon-alibi": ("falcon", {"alibi": True}, "no layer turns the keys"),
    "dynamic": ("llama", HALVES | rope("dynamic", factor=2.0), 'changes with the length .rope_type "dynamic"'),
    "longrope": (
        "phi3",
        rope("longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, original_max_position_embeddings=32),
        'changes with the length .rope_type "longrope"',
    ),
    "latents": (
        "deepseek_v3",
        {
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
            "num_key_value_heads": 4, "first_k_dense_replace": 2,
        },
        "latents",
    ),
    "norm after rotation": ("hunyuan_v1_dense", HALVES, "something else too"),
}  # fmt: skip


def build(kind, options, dtype=torch.float32):
    """A small random model, norms and biases random too; skips what this transformers does not have."""
    try:
        config = AutoConfig.for_model(kind)
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    known = {key: value for key, value in SIZES.items() if hasattr(config, key)}
    config = AutoConfig.for_model(kind, **known | options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1)
    if kind in ("gptj", "codegen") and not any("Rotary" in type(m).__name__ for m in model.modules()):
        pytest.skip(f"{kind} of transformers {transformers.__version__} has no rotary module and no AttentionInterface")
    return model


def llama(dtype=torch.float32, **options):
    model = build("llama", HALVES | options, dtype)
    rotary = Rotary.of(model)
    return model, rotary, next(iter(rotary.turns))


class Stores(DynamicCache):
    """Keeps the keys as every layer hands them over."""

    def __init__(self, config):
        super().__init__(config=config)
        self.stored = {}

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.stored[layer_idx] = keys
        return super().update(keys, values, layer_idx, *args, **kwargs)


def stored_keys(model, modules, positions, raw=None):
    """Keys [1, heads, n, D] a layer, in a forward pass in which every attention module reads the same random input.

    raw: filled with each module's un-rotated keys, where a projection or a norm gives them.
    """
    n = positions.shape[1]
    generator = torch.Generator().manual_seed(1)
    hooks = []

    def same_input(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        same = torch.randn(hidden.shape, generator=generator.manual_seed(module.layer_idx)).to(hidden.dtype)
        return ((same, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": same})

    for index, module in modules.items():
        hooks.append(module.register_forward_pre_hook(same_input, with_kwargs=True))
        if raw is not None:
            names = [name for name in ("k_norm", "k_layernorm", "k_proj") if hasattr(module, name)]
            for name in names[:1]:
                getattr(module, name).register_forward_hook(lambda *call, i=index: raw.update({i: call[2]}))
    cache = Stores(model.config)
    with torch.no_grad():
        model(torch.ones(1, n, dtype=torch.long), position_ids=positions, **into(cache), use_cache=True)
    for hook in hooks:
        hook.remove()
    return cache.stored


def error(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_undoes_and_moves_what_the_model_stores(name):
    kind, options, still = CASES[name]
    model = build(kind, options)
    rotary = Rotary.of(model)
    modules = {module.layer_idx: module for module in rotary.turns}
    assert [i for i, module in modules.items() if not rotary.rotates(module)] == still
    here = torch.tensor([[0, 1, 2, 7, 30, 61, 12]])
    there = here + torch.tensor([[31, 2, 999, 0, 20_000, FAR - 61, 5]])
    before, raw = stored_keys(model, modules, here), {}
    after = stored_keys(model, modules, there, raw)
    assert set(modules) - set(before) == ({2, 3} if options.get("num_kv_shared_layers") else set())
    for index in before:
        module = modules[index]
        key = rotary.unrotate(module, before[index], here)
        assert error(rotary.unrotate(module, after[index], there), key) < 2e-6
        assert error(rotary.shift(module, before[index], here, there), after[index]) < 2e-6
        assert error(rotary.rotate(module, key, there), after[index]) < 2e-6
        if index in raw and name not in ("llama4", "nanochat"):  # their norms come after the rotation
            expected = raw[index]
            if expected.shape != key.shape:
                expected = expected.reshape(1, here.shape[1], -1, key.shape[-1]).transpose(1, 2)
            assert error(key, expected) < 2e-6


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_cannot_be_undone(name):
    kind, options, reason = REFUSED[name]
    model = build(kind, options)
    with pytest.raises(NotImplementedError, match=reason):
        Rotary.of(model)


def test_refuses_what_is_not_a_rotation(monkeypatch):
    module = transformers.models.llama.modeling_llama
    turn = module.apply_rotary_pos_emb

    def with_decay(q, k, cos, sin):  # as a rotation whose keys also fade with the position
        q, k = turn(q, k, cos, sin)
        return q, k * torch.arange(1, k.shape[2] + 1)[:, None]

    model = build("llama", HALVES)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", with_decay)
    with pytest.raises(NotImplementedError, match="something else too"):
        Rotary.of(model)
    monkeypatch.delattr(module, "apply_rotary_pos_emb")
    monkeypatch.setattr(module, "turned_by_another_name", turn, raising=False)
    with pytest.raises(NotImplementedError, match="not defined"):
        Rotary.of(model)


def test_images_give_tokens_three_positions():
    if not hasattr(transformers, "Qwen3_5Config"):
        pytest.skip(f"transformers {transformers.__version__} has no qwen3_5")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(transformers.Qwen3_5Config())
    with pytest.raises(NotImplementedError, match="three positions"):
        Rotary.of(model)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = build("llama", HALVES)
    with pytest.raises(NotImplementedError, match="meta"):
        Rotary.of(model)


def test_finds_the_text_decoder_beside_a_vision_tower():
    text = SIZES | TWO_KINDS
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    rotary = Rotary.of(AutoModelForImageTextToText.from_config(config))
    assert [dict(turn.table.options)["layer_type"] for turn in rotary.turns.values()] == TWO_KINDS["layer_types"]


def test_tables_are_the_layers_own_and_not_rounded():
    rotary = Rotary.of(build("gemma3_text", TWO_KINDS, torch.bfloat16))
    sliding, full = rotary.turns
    positions = torch.tensor([[0, 1, 3_001]])
    for module, theta in ((sliding, 1e4), (full, 1e6)):
        cos, sin = rotary.tables(module, positions)
        assert cos.dtype == sin.dtype == torch.float32
        assert cos.shape == (1, 3, 8)
        angles = (positions.double()[..., None] / theta ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)).repeat(
            1, 1, 2
        )
        assert (cos - angles.cos()).abs().max() < 3e-4  # float32 angles; bfloat16 tables would be 10 times off
        assert (sin - angles.sin()).abs().max() < 3e-4


@pytest.mark.parametrize("kind", [rope("default"), rope("yarn", factor=4.0, original_max_position_embeddings=16)])
def test_precision_far_out(kind):
    _, rotary, module = llama(head_dim=64, **kind)
    positions = torch.randint(0, FAR, (2, 500))
    for dtype, precision in ((torch.float32, 2e-7), (torch.float64, 4e-16)):
        x = torch.randn(2, 3, 500, 64, dtype=dtype)
        back = rotary.unrotate(module, rotary.rotate(module, x, positions), positions)
        assert back.dtype == dtype
        assert (back - x).norm() / x.norm() < precision
        new = positions // 3
        two = rotary.rotate(module, rotary.unrotate(module, x, positions), new)
        assert (rotary.shift(module, x, positions, new) - two).norm() / x.norm() < precision


def test_yarn_scaling_is_divided_out_and_kept():
    _, rotary, module = llama(**rope("yarn", factor=4.0, original_max_position_embeddings=16))
    x, positions = torch.randn(1, 2, 3, 8), torch.tensor([[4, 5, 60]])
    factor = rotary.rotate(module, x, positions).norm() / x.norm()
    assert factor > 1.1
    assert torch.isclose(x.norm() / rotary.unrotate(module, x, positions).norm(), factor)
    assert torch.isclose(rotary.shift(module, x, positions, positions + 7).norm(), x.norm())


@pytest.mark.parametrize("name", ["llama", "gptj", "llama4", "glm", "gpt_neox", "cohere"])
def test_positions_per_head(name):
    kind, options, _ = CASES[name]
    rotary = Rotary.of(build(kind, options))
    module = next(iter(rotary.turns))
    x = torch.randn(2, 3, 5, 8)
    old, new = torch.randint(0, 60, (2, 3, 5)), torch.randint(0, 60, (2, 5))

    def by_heads(call, *positions):
        return torch.cat(
            [call(module, x[:, h : h + 1], *(p[:, h] if p.ndim == 3 else p for p in positions)) for h in range(3)], 1
        )

    for call, positions in (
        (rotary.rotate, (old,)), (rotary.unrotate, (old,)), (rotary.shift, (old, new)), (rotary.shift, (new, old)),
        (rotary.shift, (old, old[:, :1] + 1)),
    ):  # fmt: skip
        expected = by_heads(call, *(p if p.ndim == 2 else p.expand(2, 3, 5) for p in positions))
        assert torch.allclose(call(module, x, *positions), expected, atol=1e-6)
    same = rotary.unrotate(module, x, new[:1].expand(2, 5))
    assert torch.equal(rotary.unrotate(module, x, new[:1]), same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_turned_in_float32(dtype):
    model, rotary, module = llama(dtype)
    x, positions = torch.randn(1, 2, 9, 8).to(dtype), torch.arange(9)[None] * 7_001
    expected = rotary.unrotate(module, x.float(), positions).to(dtype)
    assert torch.equal(rotary.unrotate(module, x, positions), expected)
    before, after = (stored_keys(model, {0: module}, positions + s)[0] for s in (0, 100))
    moved = rotary.shift(module, before, positions, positions + 100)
    assert error(moved.float(), after.float()) < 2 * torch.finfo(dtype).eps


def test_layers_that_turn_nothing():
    rotary = Rotary.of(build("smollm3", {"no_rope_layers": [1, 0]}))
    still = next(module for module in rotary.turns if not rotary.rotates(module))
    x, positions = torch.randn(1, 2, 3, 8), torch.arange(3)[None]
    assert rotary.rotate(still, x, positions) is x
    assert rotary.unrotate(still, x, positions) is x
    assert rotary.shift(still, x, positions, positions + 1) is x
    assert [list(table.shape) for table in rotary.tables(still, positions)] == [[1, 3, 0]] * 2


def test_leaves_the_model_and_the_input_as_they_were():
    model = build("gemma3_text", TWO_KINDS).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, config, random = list(model.modules()), model.config.to_dict(), torch.get_rng_state()
    rotary = Rotary.of(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    x, positions = torch.randn(1, 2, 3, 8), torch.arange(3)[None] + 5
    given = x.clone()
    rotary.shift(next(iter(rotary.turns)), x, positions, positions + 1)
    assert torch.equal(x, given)


def test_copies_and_pickles_leave_the_model_behind():
    _, rotary, module = llama()
    assert copy.deepcopy({"cache": [rotary]})["cache"][0] is rotary
    assert copy.copy(rotary) is rotary
    assert len(pickle.dumps(rotary)) < 100
    x, positions = torch.randn(1, 2, 3, 8), torch.arange(3)[None]
    with pytest.raises(ValueError, match="came without its model"):
        pickle.loads(pickle.dumps(rotary)).rotate(module, x, positions)
    with pytest.raises(ValueError, match="none of the model's attention modules"):
        rotary.rotate(copy.deepcopy(module), x, positions)


def test_reads_nothing_from_the_device_and_works_where_x_is():
    _, rotary, module = llama()
    x, positions = torch.empty(2, 4, 3, 8, device="meta"), torch.empty(2, 3, dtype=torch.long, device="meta")
    with torch.inference_mode():  # a read of a meta tensor raises
        for y in (
            rotary.rotate(module, x, positions),
            rotary.unrotate(module, x.half(), positions[:, None].expand(2, 4, 3)),
            rotary.shift(module, x, positions, positions + 1),
        ):
            assert y.device.type == "meta"
            assert y.shape == x.shape
        assert rotary.tables(module, positions)[0].device.type == "meta"
        real, here = torch.randn(1, 4, 3, 8), torch.arange(3)[None]
        assert error(rotary.unrotate(module, rotary.rotate(module, real, here), here), real) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4", "glm", "gptj"])
def test_in_a_captured_graph(name):
    kind, options, _ = CASES[name]
    rotary = Rotary.of(build(kind, options).to("cuda"))
    module = next(iter(rotary.turns))
    x = torch.randn(2, 2, 5, 8, device="cuda")
    old, new = torch.randint(0, 60, (2, 5), device="cuda"), torch.randint(0, 60, (2, 2, 5), device="cuda")

    def calls():
        return rotary.rotate(module, x, old), rotary.unrotate(module, x, new), rotary.shift(module, x, old, new)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = calls()
    x.normal_()
    old.random_(0, FAR)
    new.random_(0, FAR)
    graph.replay()
    for graphed, expected in zip(made, calls(), strict=True):
        assert torch.equal(graphed, expected)


def test_large_biases_hide_nothing_in_sixteen_bits():
    model = build("qwen2", {"hidden_size": 128} | rope("default"), torch.bfloat16)
    for layer in model.model.layers:  # as in Qwen 2.5's first layers
        layer.self_attn.k_proj.bias.data[::7] *= 300
    assert all(Rotary.of(model).turns.values())
    module = transformers.models.qwen2.modeling_qwen2
    turn = module.apply_rotary_pos_emb
    with pytest.MonkeyPatch.context() as patch:  # pairs that are not where the function takes them
        patch.setattr(
            module, "apply_rotary_pos_emb", lambda q, k, cos, sin: [t.roll(1, -1) for t in turn(q, k, cos, sin)]
        )
        with pytest.raises(NotImplementedError, match="something else too"):
            Rotary.of(model)


def test_a_model_that_accelerate_holds_elsewhere():
    accelerate = pytest.importorskip("accelerate")
    model, rotary, module = llama()
    x, positions = torch.randn(1, 2, 3, 8), torch.arange(3)[None] + 9
    expected = rotary.unrotate(module, x, positions)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.equal(Rotary.of(model).unrotate(module, x, positions), expected)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_errors_say_what_fits():
    _, rotary, module = llama()
    x, positions = torch.randn(2, 4, 3, 8), torch.arange(3)[None]
    for call, reason in (
        (lambda: rotary.rotate(module, x[0], positions), r"\[B, heads, n, D\]"),
        (lambda: rotary.rotate(module, x.long(), positions), "floating dtype"),
        (lambda: rotary.rotate(module, x, positions.float()), "integers"),
        (lambda: rotary.rotate(module, x, positions[0]), r"\[B, n\] or \[B, heads, n\]"),
        (lambda: rotary.shift(module, x, positions, positions[:, :2]), "do not fit"),
        (lambda: rotary.rotate(module, x, torch.zeros(2, 3, 3, dtype=torch.long)), "do not fit"),
        (lambda: rotary.rotate(module, x, torch.zeros(3, 3, dtype=torch.long)), "do not fit"),
        (lambda: rotary.rotate(module, x[..., :4], positions), "4 channels a head, LlamaAttention has 8"),
        (lambda: rotary.tables(module, positions[0]), r"positions \[B, n\]"),
        (lambda: rotary.tables(torch.nn.Linear(1, 1), positions), "does not know the Linear"),
    ):
        with pytest.raises(ValueError, match=reason):
            call()
