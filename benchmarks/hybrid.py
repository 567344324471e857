"""A model of another shape that nobody tuned for: SmolLM2 whose layers but every fourth see a window alone.

    python -m benchmarks.hybrid [--window 512] [--every 4] [--budgets 0.25,0.1] [--judged 6] [--out FILE]

SmolLM2's weights go into a Qwen2 of the same size (whose biases are 0), with sliding layers where SmolLM2 has full
ones: another architecture, another number of full layers and heads, and heads that are needed for other things, as the
layers between them cannot look back. It is not trained further; its own loss stands beside SmolLM2's. Plans are judged
without a measurement, measured automatically, and against kivi at the same bytes.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import longwave
from benchmarks.sensitivity import Judge
from longwave.cli.console import show_table
from longwave.plan.automatic import profile_for
from longwave.shape import CacheShape


def hybrid(plain, window, every):
    """A Qwen2 of a Llama's weights, every `every`-th layer of which attends over everything."""
    config = plain.config
    layers = range(config.num_hidden_layers)
    made = Qwen2Config(
        **{
            name: getattr(config, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
                "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
            )
        },
        use_sliding_window=True,
        sliding_window=window,
        layer_types=["full_attention" if i % every == every - 1 else "sliding_attention" for i in layers],
    )  # fmt: skip
    model = Qwen2ForCausalLM(made).to(plain.dtype).eval()
    missing, unknown = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unknown
    assert all(name.endswith("bias") for name in missing if name != "lm_head.weight"), missing
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    model.config._name_or_path = f"smollm2 as a hybrid, window {window}, one of {every} layers full"
    return model.to(plain.device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--budgets", default="0.25,0.15625,0.14,0.1,0.06", help="of 16-bit numbers")
    parser.add_argument("--context", type=int, default=3000)
    parser.add_argument("--judged", type=int, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain, tokenizer = longwave.load("smollm2", dtype=args.dtype)
    plain.to(args.device)
    model = hybrid(plain, args.window, args.every)
    before = Judge(plain, tokenizer, args.judged, args.context, 256).dense()
    judge = Judge(model, tokenizer, args.judged, args.context, 256)
    print(f"loss of SmolLM2 {before:.4f}, of the hybrid {judge.dense():.4f}, {args.judged} windows of {args.context}")
    shape = CacheShape.of(model.config, model.dtype)
    began = time.perf_counter()
    profile, why = profile_for(model, shape, longwave.Fourier(), tokenizer=tokenizer)
    assert profile is not None, why
    seconds = time.perf_counter() - began
    share = 2 / model.dtype.itemsize  # budgets are of 16-bit numbers, whatever the model's type
    rows = []
    for budget in map(float, args.budgets.split(",")):
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
    table = [
        [
            row["budget"],
            row["plan"],
            *(f"{row[key]:.4f}" if key in row else "refused" for key in ("middle", "kl", "error", "loss")),
        ]
        for row in rows
    ]
    show_table("a hybrid", ["budget", "plan", "middle", "KL", "its error", "loss over dense"], table)
    if args.out:
        header = {"loss_smollm2": before, "loss": judge.dense(), "measured_in": seconds, "command": sys.argv}
        args.out.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
