"""What automatic measuring takes on CUDA: by default of random weights in the shape of Llama-3.1-8B.

    python -m benchmarks.measuring [--model smollm2-q4] [--layers 32] [--out FILE]

Seconds, and the peak of memory over the weights beside that of reading one window's tokens into a dense cache in one
pass. Random weights cost what trained ones cost; their plan means nothing. Tokens stand in for text: the tokenizer
is SmolLM2's, whose vocabulary is smaller.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import DynamicCache

import longwave
from benchmarks.endtoend import build
from longwave.models import load_tokenizer, locate
from longwave.plan.automatic import Effort, own_texts
from longwave.plan.calibrate import calibrate


def peak(work):
    """(seconds, bytes over what was held before) of `work`."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of random weights")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokenizer", help="a folder that holds SmolLM2's")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.model:
        model, tokenizer = longwave.load(args.model, device="cuda")
    else:
        model, tokenizer = build(args.layers, False, "cuda"), load_tokenizer(args.tokenizer or locate("smollm2-q4"))
    method = longwave.Fourier()
    effort = Effort.of(model, method)
    ids = torch.randint(model.config.vocab_size, (1, effort.tokens), device="cuda")

    @torch.no_grad()
    def read(logits):
        model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=logits)

    def measure(windows):
        calibrate(
            model, tokenizer, own_texts()[:windows], method, effort.tokens, windows, effort.scored, effort.probes,
            effort.batch,
        )  # fmt: skip

    read(1)  # kernels are loaded
    found = {"model": args.model or f"Llama-3.1-8B's shape, {args.layers} layers, random", "effort": vars(effort)}
    for name, work in {
        "reading": lambda: read(1),
        "reading with all logits": lambda: read(0),
        "measuring two windows": lambda: measure(2),
        "measuring": lambda: measure(effort.windows),
    }.items():
        seconds, over = peak(work)
        found[name] = {"seconds": round(seconds, 2), "gigabytes": round(over / 1e9, 2)}
        print(name, found[name], flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
