"""A model of another shape that nobody tuned for: its plans without a measurement, with automatic measuring, and kivi.

    python -m benchmarks.hybrid --device cuda --train 270 --save FOLDER     # make it, and judge plans on it
    python -m benchmarks.hybrid --load FOLDER [--budgets 0.25,0.1] [--judged 6] [--out FILE]

A Qwen2 of SmolLM2's size: one of five layers attends over everything, the others over 512 tokens; two KV heads of 128
channels instead of three of 64. MLPs and embeddings are SmolLM2's, attention starts from SmolLM2's heads (two in one,
half of them at rotations of another speed; one head is in both) and is trained by `--train` seconds of distillation
from SmolLM2 on public-domain novels, Python's library and facts hidden in them, none of which plans are judged on. The
trained projections are kept in 8 bits, and the model is what these say. Its own loss stands beside SmolLM2's.
"""

import argparse
import json
import math
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import Qwen2Config, Qwen2ForCausalLM

import longwave
from benchmarks.sensitivity import Judge
from longwave.cli.console import show_table
from longwave.evals.data import data_folder
from longwave.plan import recall
from longwave.plan.automatic import profile_for
from longwave.shape import CacheShape

WINDOW, EVERY, CHANNELS = 512, 5, 128
# (query head of SmolLM2, which of the two it shares a key head with); None: a head that starts at nothing
HEADS = ((0, 0), (1, 0), (2, 0), (6, 1), (7, 1)), ((3, 0), (4, 0), (5, 0), (8, 1), (None, 0))
KEYS = (0, 2), (1, 2)  # SmolLM2's key heads in each of ours
ROWS, TOKENS, RATE = 8, 3072, 6e-4


def hybrid(plain):
    """The untrained model of SmolLM2's weights, float32."""
    config, old = plain.config, 64
    layers = range(config.num_hidden_layers)
    made = Qwen2Config(
        **{
            name: getattr(config, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings",
                "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "pad_token_id", "bos_token_id",
                "eos_token_id",
            )
        },
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=CHANNELS,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention" if i % EVERY == EVERY - 1 else "sliding_attention" for i in layers],
    )  # fmt: skip
    model = Qwen2ForCausalLM(made).float().eval()
    weights = model.state_dict()
    for name, weight in plain.state_dict().items():
        if "self_attn" not in name:
            weights[name].copy_(weight)
    # channel j of 128 turns as fast as j/2 of 64: the first of two heads takes the even channels, exactly, the second
    # the odd ones, at .84 of its speed
    half = torch.arange(old // 2)
    place = [torch.cat((2 * half + which, 2 * half + which + old)) for which in (0, 1)]
    for number, layer in enumerate(plain.model.layers):
        attention, prefix = layer.self_attn, f"model.layers.{number}.self_attn."
        q, k, v = (
            getattr(attention, part).weight.data.float().unflatten(0, (-1, old))
            for part in ("q_proj", "k_proj", "v_proj")
        )
        o = attention.o_proj.weight.data.float().unflatten(1, (-1, old))
        new_q, new_o = torch.zeros(10, CHANNELS, q.shape[-1]), torch.zeros(o.shape[0], 10, CHANNELS)
        new_k = torch.zeros(2, CHANNELS, k.shape[-1])
        for head, pair in enumerate(KEYS):
            for which in (0, 1):
                new_k[head, place[which]] = k[pair[which]]
        for index, (head, which) in enumerate(one for group in HEADS for one in group):
            if head is None:
                new_q[index].normal_(std=q.std().item())
            else:
                new_q[index, place[which]] = q[head] * math.sqrt(CHANNELS / old)  # scores are divided by its root
                new_o[:, index, which * old : (which + 1) * old] = o[:, head]
        weights[prefix + "q_proj.weight"].copy_(new_q.flatten(0, 1))
        weights[prefix + "k_proj.weight"].copy_(new_k.flatten(0, 1))
        weights[prefix + "v_proj.weight"].copy_(torch.cat([torch.cat([v[one] for one in pair]) for pair in KEYS]))
        weights[prefix + "o_proj.weight"].copy_(new_o.flatten(1))
        for part in ("q_proj", "k_proj", "v_proj"):
            weights[prefix + part + ".bias"].zero_()
    model.load_state_dict(weights)
    model.config._name_or_path = "smollm2 as a hybrid of another shape"
    return model


def train(model, teacher, tokenizer, seconds, seed=0):
    """Distil SmolLM2 into the attention of `model`: half the teacher's word, half the text's."""
    texts = [path.read_text() for path in sorted((data_folder() / "books" / "calibration").glob("*.txt"))]
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts += ["\n\n".join(path.read_text(errors="replace") for path in library)[:4_000_000]]
    ids = [torch.tensor(tokenizer(text, verbose=False).input_ids) for text in texts]
    sizes = [float(len(one)) for one in ids]
    draw, cuda = random.Random(seed), model.device.type == "cuda"
    trained = [parameter for name, parameter in model.named_parameters() if "self_attn" in name]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=cuda)
    began, step, read = time.perf_counter(), 0, 0
    while (done := (time.perf_counter() - began) / seconds) < 1:
        rows = []
        for _ in range(ROWS):
            text = draw.choices(ids, sizes)[0]
            start = draw.randrange(len(text) - TOKENS - 1)
            part = text[start : start + TOKENS + 1].tolist()
            if draw.random() < 0.25:
                part, _, _ = recall.hide(tokenizer, part, TOKENS - draw.choice((256, 512, 1024)), draw)
            rows.append(torch.tensor(part[: TOKENS + 1]))
        batch = torch.stack(rows).to(model.device)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * done))
        total = 0.0
        for row in batch.split(2):
            with torch.autocast(model.device.type, torch.bfloat16):
                with torch.no_grad():
                    wanted = log_softmax(teacher(row[:, :-1], use_cache=False).logits.float(), -1)
                said = log_softmax(model(row[:, :-1], use_cache=False).logits.float(), -1)
            loss = 0.5 * cross_entropy(said.flatten(0, 1), row[:, 1:].flatten()) + 0.5 * kl_div(
                said.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean"
            )
            (loss * len(row) / ROWS).backward()
            total += float(loss.detach()) * len(row) / ROWS
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, read = step + 1, read + batch[:, 1:].numel()
        if step % 50 == 1:
            print(f"step {step}, {read / 1e6:.1f} M tokens, {done:.0%} of the time, loss {total:.3f}", flush=True)
    print(f"trained {step} steps, {read / 1e6:.1f} M tokens, in {time.perf_counter() - began:.0f} s")
    model.requires_grad_(False)
    return {"steps": step, "tokens": read, "seconds": seconds}


def rounded(model):
    """The attention's weights in 8 bits by row, as files hold them; `model` becomes what they say."""
    held = {}
    for name, parameter in model.named_parameters():
        if "self_attn" not in name:
            continue
        if parameter.ndim == 1:
            held[name] = parameter.data.half()
            parameter.data.copy_(held[name])
            continue
        scale = (parameter.data.abs().amax(-1, keepdim=True) / 127).half().clamp(min=1e-7)
        held[name] = (parameter.data / scale.float()).round().clamp(-127, 127).to(torch.int8)
        held[name + ".scale"] = scale
        parameter.data.copy_(held[name].float() * scale.float())
    return {name: tensor.cpu().contiguous() for name, tensor in held.items()}


def layer_of(name):
    return int(name.split(".")[2])


def save(held, folder, files=4):
    """In several files, as small ones travel more easily."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = 1 + max(map(layer_of, held))
    for part in range(files):
        chosen = {name: tensor for name, tensor in held.items() if layer_of(name) * files // layers == part}
        save_file(chosen, folder / f"attention-{part}.safetensors")


def load(model, folder):
    held = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    for name, parameter in model.named_parameters():
        if "self_attn" in name:
            weight = held[name].float()
            parameter.data.copy_(weight * held[name + ".scale"].float() if name + ".scale" in held else weight)


def opened(name, dtype="float32"):
    """(model, tokenizer) as `longwave.load` gives them; the trained model of this file where `name` is its folder."""
    folder = Path(name)
    if not any(folder.glob("attention-*.safetensors")):
        return longwave.load(name, dtype=dtype)
    plain, tokenizer = longwave.load("smollm2-q4", dtype="float32")
    model = hybrid(plain)
    load(model, folder)
    return model.to(getattr(torch, dtype)), tokenizer


def judged(model, tokenizer, budgets, windows, context):
    """Rows of KL by budget and plan, and what measuring took."""
    judge = Judge(model, tokenizer, windows, context, 256)
    print(f"dense loss {judge.dense():.4f}, {windows} windows of {context}", flush=True)
    shape = CacheShape.of(model.config, model.dtype)
    began = time.perf_counter()
    profile, why = profile_for(model, shape, longwave.Fourier(), tokenizer=tokenizer)
    assert profile is not None, why
    seconds = time.perf_counter() - began
    share = 2 / model.dtype.itemsize  # budgets are of 16-bit numbers, whatever the model's type
    rows = []
    for budget in budgets:
        for name, method, given in (
            ("not measured", longwave.Fourier(plan="safe"), None),
            ("measured", longwave.Fourier(), profile),
            ("kivi", longwave.Kivi(), None),
        ):
            row = {"budget": budget, "plan": name}
            try:
                bound = method.bind(shape, given, budget * share)
            except ValueError as error:
                print(f"{budget} {name}: {error}", file=sys.stderr)
            else:
                row["kl"], row["error"], row["loss"] = judge(lambda bound=bound: longwave.cache(model, bound))
                row["middle"] = bound.page_fraction() / share
                if getattr(bound, "expected", None):
                    row["expected"] = [bound.expected.kl, bound.expected.error]
            rows.append(row)
            print(row, flush=True)
    return {"dense_loss": judge.dense(), "measured_in": seconds, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--budgets", default="0.25,0.15625,0.14,0.1,0.06,0.04", help="of 16-bit numbers")
    parser.add_argument("--context", type=int, default=3000)
    parser.add_argument("--judged", type=int, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain, tokenizer = longwave.load("smollm2-q4", dtype="float32")
    model = hybrid(plain).to(args.device)
    plain.to(args.device)
    about = {"command": sys.argv, "loss_smollm2": Judge(plain, tokenizer, args.judged, args.context, 256).dense()}
    print(f"loss of SmolLM2 {about['loss_smollm2']:.4f}", flush=True)
    if args.load:
        load(model, args.load)
    if args.train:
        about["training"] = train(model, plain, tokenizer, args.train)
        held = rounded(model)
        if args.save:
            save(held, args.save)
    budgets = [float(part) for part in args.budgets.split(",")]
    about |= judged(model, tokenizer, budgets, args.judged, args.context)
    show_table(
        "a hybrid",
        ["budget", "plan", "middle", "KL", "its error", "loss over dense"],
        [
            [
                row["budget"],
                row["plan"],
                *(f"{row[key]:.4f}" if key in row else "refused" for key in ("middle", "kl", "error", "loss")),
            ]
            for row in about["rows"]
        ],
    )
    if args.out:
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
