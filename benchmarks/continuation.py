"""How long a greedy continuation stays what a dense cache would have said, on step-by-step sums.

    python -m benchmarks.continuation [--model smollm2-q4] [--device cuda] [--budgets 0.25,0.1] [--out FILE]
    python -m benchmarks.continuation --model FOLDER ...             the trained model of benchmarks/hybrid.py

A prompt is a list of sums of three to five numbers, worked out step by step, about `--context` tokens of it; the model
goes on for `--new` tokens. A row's figure is how many tokens come before the first one that differs, and of how many
lines in a row the text is the same. All rows of a method are one batch; seeded.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

import longwave
from benchmarks import hybrid
from longwave.cli.console import show_table
from longwave.frame import cache_argument

RESTORED = "dense, restored"


def worked(rng):
    """One sum, step by step."""
    numbers = [rng.randrange(10, 1000) for _ in range(rng.randrange(3, 6))]
    lines, total = [f"Question: what is {' + '.join(map(str, numbers))}?"], numbers[0]
    for step, number in enumerate(numbers[1:], 1):
        lines.append(f"Step {step}: {total} + {number} = {total + number}")
        total += number
    return "\n".join((*lines, f"Answer: {total}\n\n"))


def prompts(tokenizer, rows, context, seed):
    """int64 [rows, context]: sums until there are so many tokens, the last of them cut off."""
    made = []
    for row in range(rows):
        rng, ids = random.Random(f"{seed} {row}"), []
        while len(ids) < context:
            ids += tokenizer(worked(rng), add_special_tokens=False).input_ids
        made.append(ids[:context])
    return torch.tensor(made)


def alike(ours, theirs):
    """Tokens before the first that differs."""
    differ = (ours != theirs).nonzero()
    return int(differ[0]) if len(differ) else len(theirs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-q4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--budgets", default="0.5,0.25,0.15625,0.1,0.06,0.04")
    parser.add_argument("--sizes", default="", help="of prompts that are saved coded and restored dense")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=2500)
    parser.add_argument("--new", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = hybrid.opened(args.model, args.dtype)
    model.to(args.device).eval()
    ids = prompts(tokenizer, args.rows, args.context, args.seed).to(args.device)

    def continued(cache):
        began = time.perf_counter()
        with torch.no_grad():
            out = longwave.generate(
                model, ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=args.new,
                min_new_tokens=args.new, do_sample=False,
            )  # fmt: skip
        report = cache.report()
        return out[:, ids.shape[1] :].cpu(), report, time.perf_counter() - began

    exact, _, _ = continued(longwave.cache(model, "dense"))
    texts, found = tokenizer.batch_decode(exact), []
    shuffled, _, _ = continued(longwave.cache(model, "dense"))
    assert torch.equal(exact, shuffled), "dense does not repeat itself: nothing can be compared with it"

    def restored(size):
        """A dense cache of all but the prompt's last token, saved in so many bytes and read back."""
        cache, read = longwave.cache(model, "dense"), ids[:, :-1]
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model(read, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
            longwave.save(cache, read, Path(folder) / "prompt.lw", size=size, tokenizer=tokenizer)
            return longwave.restore(model, Path(folder) / "prompt.lw", tokenizer=tokenizer)[0]

    budgets, sizes = ([float(x) for x in text.split(",") if x] for text in (args.budgets, args.sizes))
    every = [("fourier", b) for b in budgets] + [("kivi", b) for b in budgets if b >= 0.15]
    for method, budget in every + [(RESTORED, size) for size in sizes]:
        if method == RESTORED:
            start = restored(budget)
        else:
            start = longwave.cache(model, method, budget=budget, tokenizer=tokenizer)
        ours, report, seconds = continued(start)
        same = [alike(a, b) for a, b in zip(ours, exact, strict=True)]
        lines = []
        for mine, text in zip(tokenizer.batch_decode(ours), texts, strict=True):
            pairs = list(zip(mine.split("\n"), text.split("\n"), strict=False))
            lines.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)))
        found.append(
            {
                "method": method, "budget": budget, "ratio": round(report.ratio, 4), "tokens": same, "lines": lines,
                "seconds": round(seconds, 1),
            }
        )  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    header = ["method", "budget", "whole ratio", "tokens alike, median", "least", "all alike", "lines alike, median"]
    show_table(
        "tokens before the first that differs from dense",
        header,
        [
            [
                row["method"], f"{row['budget']:g}", f"{row['ratio']:.3f}", f"{statistics.median(row['tokens']):g}",
                str(min(row["tokens"])), f"{sum(n == args.new for n in row['tokens'])} of {args.rows}",
                f"{statistics.median(row['lines']):g} of {statistics.median(t.count(chr(10)) + 1 for t in texts):g}",
            ]
            for row in found
        ],
    )  # fmt: skip
    if args.out:
        about = {
            "model": args.model, "dtype": args.dtype, "device": args.device, "rows": args.rows,
            "context": args.context, "new": args.new, "seed": args.seed, "dense_begins": texts[0][:200],
        }  # fmt: skip
        args.out.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
