"""Layers that lie coded: what is held, what a pass expands, and how long a step takes.

    python -m benchmarks.offload [--context 3000] [--sizes 0.1,0.05] [--steps 5] [--chunk TOKENS] [--out FILE]

SmolLM2, float32, one window of task divergence: bytes at rest and the most that a pass takes beside them, over the
dense K and V of the same tokens; seconds to read the prompt, to take a step (the median), with the next group of layers
expanded ahead and without; KL from the dense model of the 256 tokens after the prompt. Before anything is timed a step
is held against that of a dense cache of the K and V that were decoded.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import longwave
from benchmarks.sensitivity import Judge
from longwave.cli.console import show_table
from longwave.codec import codec_for
from longwave.evals.loss import score
from longwave.frame import cache_argument


def read(model, cache, ids):
    """The logits of the last token, and seconds."""
    began = time.perf_counter()
    logits = model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
    return logits, time.perf_counter() - began


def check(model, cache, token):
    """A step over what lies coded is a step over the same K and V, dense."""
    dense = longwave.cache(model, "dense")
    for ours, theirs in zip(cache.memory_layers(), dense.memory_layers(), strict=True):
        theirs.take(*ours.materialize(), ours.rows, ours.scaling, {}, None)
        theirs.columns, theirs._run = ours.columns, list(ours._run)
    torch.testing.assert_close(read(model, cache, token)[0], read(model, dense, token)[0], rtol=1e-4, atol=1e-3)
    cache.crop(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=3000)
    parser.add_argument("--sizes", default="0.1,0.05")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--chunk", type=int, help="tokens of a pass of the prompt; all of them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = longwave.load("smollm2-q4", dtype="float32", device=args.device)
    began = time.perf_counter()
    codec = codec_for(model, tokenizer)
    print(f"codec: {time.perf_counter() - began:.0f} s", flush=True)
    judge = Judge(model, tokenizer, 1, args.context, 256)
    (_, scored, _), ids = judge.read[0], torch.tensor(judge.ids[0])[None].to(args.device)
    prompt = ids[:, : args.context]
    rows = []
    for size in [None, *map(float, args.sizes.split(","))]:
        options = (
            {} if size is None else {"offload": "coded", "coder": codec.at(size, device=args.device), "size": size}
        )
        with torch.no_grad():
            cache = longwave.cache(model, "dense", **options)
            reading = sum(read(model, cache, part)[1] for part in prompt.split(args.chunk or args.context, 1))
            report = cache.report()
            if size is not None:
                check(model, cache, ids[:, args.context : args.context + 1])
            seconds, scratch = {}, {}
            for ahead in (False, True) if size is not None else (None,):
                if size is not None:
                    next(cache.memory_layers()).middle.ahead = ahead
                steps = [ids[:, args.context + i : args.context + i + 1] for i in range(args.steps)]
                seconds[ahead] = statistics.median(read(model, cache, step)[1] for step in steps)
                scratch[ahead] = cache.report().scratch
                cache.crop(-args.steps)
            kl = judge.divergence(0, score(model, cache, scored))
        rows.append(
            {
                "size": size,
                "nbytes": report.nbytes,
                "parts": report.parts,
                "scratch": scratch.get(False, 0),
                "scratch_ahead": scratch.get(True, 0),
                "dense_nbytes": report.dense_nbytes,
                "read": reading,
                "step": seconds.get(False, seconds.get(None)),
                "step_ahead": seconds.get(True),
                "kl": kl,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    columns = ["", "held", "of it coded", "a pass takes", "s to read", "s a step", "ahead", "KL"]
    table = []
    for row in rows:
        whole, ahead = row["dense_nbytes"], row["step_ahead"]
        table.append(
            [
                "dense" if row["size"] is None else f"coded {row['size']:g}",
                f"{row['nbytes'] / whole:.3f}",
                f"{row['parts'].get('coded', 0) / whole:.4f}",
                f"{row['scratch'] / whole:.3f}",
                f"{row['read']:.1f}",
                f"{row['step']:.2f}",
                "" if ahead is None else f"{ahead:.2f} ({row['scratch_ahead'] / whole:.3f})",
                f"{row['kl']:.5f}",
            ]
        )
    show_table(f"{args.context:,} tokens; bytes over those of dense K and V in 32 bits", columns, table)
    if args.out:
        args.out.write_text(json.dumps({"about": {k: str(v) for k, v in vars(args).items()}, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
