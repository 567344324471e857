"""Decode and prefill time on this machine, against transformers' own DynamicCache.

    python -m benchmarks.speed [--contexts 4096,8000] [--steps 40] [--prefills 3] [--out out/speed.json] [METHOD ...]

Steps of all methods are taken in turn in one run, and the figure is the ratio of medians: the machine's own speed
drifts. Before timing, the dense method's logits are compared with transformers'.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache

import longwave
from longwave.evals.data import pydoc_haystack
from longwave.evals.spec import parse_spec
from longwave.frame import cache_argument

DEFAULT = ["dense", "fourier:budget=0.125", "fourier:budget=0.078", "fourier:budget=0.03", "fourier-paper"]


def maker(text):
    name, options = parse_spec(text)
    return lambda model: longwave.cache(model, name, **options)


def stock_cache(model):
    return DynamicCache(config=model.config)


@torch.no_grad()
def step(model, memory, ids):
    # transformers' own cache runs under transformers' own attention
    model.set_attn_implementation("sdpa" if isinstance(memory, DynamicCache) else "longwave")
    began = time.perf_counter()
    logits = model(ids, **cache_argument(model, memory), use_cache=True, logits_to_keep=1).logits
    return time.perf_counter() - began, logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=DEFAULT)
    parser.add_argument("--contexts", default="4096,8000")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = longwave.load("smollm2", dtype=torch.float32)
    text = tokenizer(pydoc_haystack(), return_tensors="pt", verbose=False).input_ids
    makers = {"transformers": stock_cache} | {text: maker(text) for text in args.methods}
    for make in makers.values():  # first use of everything, not timed
        step(model, make(model), text[:, :600])
    rows = []
    for context in map(int, args.contexts.split(",")):
        prefill, decode, logits = ({name: [] for name in makers} for _ in range(3))
        for turn in range(args.prefills):
            names = list(makers)[turn % len(makers) :] + list(makers)[: turn % len(makers)]  # nobody is always first
            caches = {name: makers[name](model) for name in names}
            for name, memory in caches.items():
                prefill[name].append(step(model, memory, text[:, :context])[0])
            print(
                f"{context}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in prefill.items()),
                file=sys.stderr,
                flush=True,
            )
        for i in range(args.steps + 3):
            for name, memory in caches.items():
                seconds, out = step(model, memory, text[:, context + i : context + i + 1])
                logits[name].append(out)
                if i >= 3:
                    decode[name].append(seconds)
        gap = (
            max((a - b).abs().max().item() for a, b in zip(logits["dense"], logits["transformers"], strict=True))
            if "dense" in logits
            else 0.0
        )
        if gap > 1e-2:
            raise SystemExit(f"dense logits differ from transformers' by {gap}: nothing is timed on wrong results")
        base = {
            "prefill": statistics.median(prefill["transformers"]),
            "decode": statistics.median(decode["transformers"]),
        }
        for name in makers:
            memory = caches[name]
            ratio = memory.report().ratio if isinstance(memory, longwave.LongCache) else 1.0
            rows.append(
                {
                    "context": context,
                    "method": name,
                    "bytes_ratio": ratio,
                    "decode_ms": statistics.median(decode[name]) * 1e3,
                    "decode_ratio": statistics.median(decode[name]) / base["decode"],
                    "prefill_s": statistics.median(prefill[name]),
                    "prefill_ratio": statistics.median(prefill[name]) / base["prefill"],
                }
            )
    print("| context | method | bytes ratio | decode ms | of transformers' | prefill s | of transformers' |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['context']} | {r['method']} | {r['bytes_ratio']:.3f} | {r['decode_ms']:.1f} | "
            f"{r['decode_ratio']:.2f} | {r['prefill_s']:.1f} | {r['prefill_ratio']:.2f} |"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
