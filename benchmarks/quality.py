"""Quality against bytes: next-token loss after a compressed context, and needles, for any methods.

    python -m benchmarks.quality --out out/quality.json [--contexts 3000,7000] [--windows 20] [--device cuda] METHOD...

A METHOD is NAME=SPEC, SPEC a method and its options: "f25=fourier:budget=0.25,segment=512". Every window is read once
and forked to all methods, so they score the same tokens after the same exact prefill.
"""

import argparse
import ast
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

import longwave
from benchmarks.texts import calibration_texts, test_texts
from longwave.evals import needle
from longwave.evals.fork import fork, prefill
from longwave.evals.loss import score

DEFAULT = [
    "dense=dense",
    "fourier .75=fourier:budget=0.75",
    "fourier .50=fourier:budget=0.5",
    "fourier .25=fourier:budget=0.25",
    "paper=fourier-paper",
]


def parse_method(text):
    """'NAME=fourier:keep=0.2,segment=512' -> (name, function from model to an empty cache)."""
    name, _, spec = text.partition("=")
    method, _, rest = spec.partition(":")
    options = {}
    for item in filter(None, rest.split(";") if ";" in rest else rest.split(",")):
        key, _, value = item.partition("=")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return name, lambda model: longwave.cache(model, method, **options)


def middle_ratio(memory):
    """Bytes of the compressed middle over the bytes of the same tokens dense."""
    held = dense = 0
    for layer in memory.memory_layers():
        store = getattr(layer, "store", None)
        if store is None:
            continue
        parts = store.parts()
        held += sum(x.numel() * x.element_size() for tensors in parts.values() for x in tensors)
        dense += sum(store.tokens) * 2 * layer.dense.k.shape[1] * layer.dense.k.shape[3] * layer.dense.k.element_size()
    return held / dense if dense else float("nan")


def loss_rows(model, tokenizer, methods, context, windows, score_tokens, seed):
    texts = {name: tokenizer(text, return_tensors="pt", verbose=False).input_ids for name, text in test_texts().items()}
    texts = {name: ids for name, ids in texts.items() if ids.shape[1] > context + score_tokens + 1}
    draw = random.Random(seed)
    for number in range(windows):
        name = list(texts)[number % len(texts)]
        start = draw.randrange(texts[name].shape[1] - context - score_tokens)
        ids = texts[name][:, start : start + context + score_tokens + 1]
        dense = prefill(model, ids[:, :context])
        exact = score(model, fork(dense, longwave.cache(model, "dense")), ids[:, context:])
        for label, make in methods.items():
            memory = fork(dense, make(model))
            scored = score(model, memory, ids[:, context:])
            kl, top1 = scored.divergence(exact)
            yield {
                "context": context,
                "window": number,
                "text": name,
                "start": start,
                "method": label,
                "loss": scored.loss,
                "dense_loss": exact.loss,
                "kl": kl,
                "top1": top1,
                "ratio": memory.report().ratio,
                "middle_ratio": middle_ratio(memory),
            }
        print(f"context {context} window {number + 1}/{windows}", file=sys.stderr, flush=True)


def summary(rows, needles):
    """A Markdown table: one line a method and context."""
    lines = [
        "| method | context | bytes ratio, whole | middle | loss | over dense | KL | top-1 | needles found |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for context in dict.fromkeys(row["context"] for row in rows):
        for label in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["context"] == context and row["method"] == label]
            over = [row["loss"] - row["dense_loss"] for row in mine]
            error = statistics.stdev(over) / len(over) ** 0.5 if len(over) > 1 else float("nan")
            mean = lambda key: statistics.mean(row[key] for row in mine)  # noqa: B023, E731
            near = [a for a in needles if a["method"] == label]
            found = " ".join(
                f"{n // 1000}k {statistics.mean(a['score'] for a in near if a['length'] == n):.2f}"
                for n in sorted({a["length"] for a in near})
            )
            lines.append(
                f"| {label} | {context} | {mean('ratio'):.3f} | {mean('middle_ratio'):.3f} | {mean('loss'):.3f} | "
                f"{statistics.mean(over):+.3f} ± {error:.3f} | {mean('kl'):.3f} | {mean('top1'):.3f} | {found} |"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=DEFAULT)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contexts", default="3000,7000")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--score-tokens", type=int, default=256)
    parser.add_argument("--needle-lengths", default="1000,2000,4000,8000")
    parser.add_argument("--needle-depths", default="0,0.2,0.4,0.6,0.8,1")
    parser.add_argument("--needle-repeats", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    began = time.time()
    model, tokenizer = longwave.load(args.model, dtype=torch.float32)
    model.to(args.device)
    methods = dict(map(parse_method, args.methods))
    rows, answers = [], []
    for context in [int(n) for n in args.contexts.split(",") if n]:
        rows += loss_rows(model, tokenizer, methods, context, args.windows, args.score_tokens, args.seed)
    lengths = [int(n) for n in args.needle_lengths.split(",") if n]
    if lengths:
        haystack = "\n\n".join(calibration_texts().values())
        depths = [float(x) for x in args.needle_depths.split(",")]
        prompts = needle.build_prompts(tokenizer, haystack, lengths, depths, args.needle_repeats, args.seed)
        makers = {label: (lambda make=make: make(model)) for label, make in methods.items()}
        answers = [
            answer.as_dict()
            for answer in needle.run(
                model,
                tokenizer,
                prompts,
                makers,
                args.batch,
                lambda d, t: print(f"needle {d}/{t}", file=sys.stderr, flush=True),
            )
        ]
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu"
    header = {
        "command": "python -m benchmarks.quality " + " ".join(sys.argv[1:]),
        "model": args.model,
        "dtype": "float32",
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "longwave": longwave.__version__,
        "seed": args.seed,
        "seconds": round(time.time() - began),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"header": header, "loss": rows, "needle": answers}, indent=0))
    print(json.dumps(header))
    print(summary(rows, answers))


if __name__ == "__main__":
    main()
