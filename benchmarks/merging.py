"""What merged segments cost in time: reading a prompt and decoding, beside the same budget without them.

    python -m benchmarks.merging [--device cuda] [--tokens 8000] [--budget 0.1] [--repeats 3] [--steps 40] [--out FILE]

SmolLM2's configuration with random weights, and plans of its shipped profile: times do not depend on what it says. The
two are taken in turn, and the figure is the ratio of medians of one run.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longwave
from longwave.frame import cache_argument
from longwave.plan.profile import Profile
from longwave.shape import CacheShape

SMOLLM2 = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, max_position_embeddings=65536, tie_word_embeddings=True,
)  # fmt: skip


def bounds(shape, budget):
    """The plan with merged segments, and the one that the same measurement gives without them."""
    profile = Profile.load(Path(longwave.__file__).parent / "plan" / "profiles" / "smollm2.json")
    measured = profile.sensitivity
    plain = dataclasses.replace(measured, both=torch.full_like(measured.both, 1e3))
    made = {
        "merged": longwave.Fourier().bind(shape, profile, budget),
        "plain": longwave.Fourier().bind(shape, dataclasses.replace(profile, sensitivity=plain), budget),
    }
    assert made["merged"].merges, f"no head is merged at {budget:g}: give a smaller budget"
    assert not made["plain"].merges
    return made


def timed(model, memory, ids):
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.no_grad():
        model(ids, **cache_argument(model, memory), use_cache=True, logits_to_keep=1)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--budget", type=float, default=0.1, help="of 16-bit numbers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(args.device, dtype).eval()
    made = bounds(CacheShape.of(model.config, dtype), args.budget * 2 / dtype.itemsize)
    ids = torch.randint(49152, (1, args.tokens), generator=torch.Generator().manual_seed(0)).to(args.device)
    read, steps, peak = ({name: [] for name in made} for _ in range(3))
    for name in made:  # first use of everything
        timed(model, longwave.cache(model, made[name]), ids[:, :1000])
    for _ in range(args.repeats):
        held = {}
        for name, bound in made.items():
            held[name] = longwave.cache(model, bound)
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if args.device == "cuda" else 0
            read[name].append(timed(model, held[name], ids))
            if args.device == "cuda":
                peak[name].append((torch.cuda.max_memory_allocated() - before) / 2**20)
        for _ in range(args.steps):
            for name, memory in held.items():
                steps[name].append(timed(model, memory, ids[:, :1]))
    found = {"device": args.device, "tokens": args.tokens, "budget": args.budget, "dtype": str(dtype)}
    for what, times in (("read", read), ("step", steps)):
        median = {name: statistics.median(some) for name, some in times.items()}
        found |= {f"{what}_{name}_s": round(value, 5) for name, value in median.items()}
        found[f"{what}_ratio"] = round(median["merged"] / median["plain"], 4)
    if args.device == "cuda":
        found |= {f"peak_{name}_mib": round(max(some)) for name, some in peak.items()}
    print(json.dumps(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
