"""What share of a needle grid's time is the model's, and what batching and shared prefills save.

    python -m benchmarks.throughput --device cuda [--lengths 1000,2000,4000,8000] [--batch 44] [--out FILE]

Runs the same grid twice, in batches and one prompt at a time, and counts the seconds inside the model's forward
passes (the device is waited for after each). The rest, tokenising, forking, judging, writing, is the harness.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from longwave.cli.common import load_model
from longwave.evals.evaluation import evaluate
from longwave.evals.recipe import Recipe
from longwave.evals.results import load

METHODS = ("dense", "fourier:budget=0.25")


def timed(model):
    """Count the seconds of every forward pass in `spent[0]`."""
    spent, forward = [0.0], model.forward

    def wait():
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def call(*args, **kwargs):
        began = wait()
        out = forward(*args, **kwargs)
        spent[0] += wait() - began
        return out

    model.forward = call
    return spent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", default="1000,2000,4000,8000")
    parser.add_argument("--depths", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1")
    parser.add_argument("--batch", type=int, default=44)
    parser.add_argument("--batch-tokens", type=int, default=210_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_model("smollm2-q4", args.device, "float32")
    spent = timed(model)
    task = f"needle:lengths={args.lengths},depths={args.depths}"
    measured = []
    for batch in (2, args.batch, 1):  # the first is not counted: it warms up
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe(Path(folder) / "run", METHODS, (task,), batch=batch, batch_tokens=args.batch_tokens)
            spent[0], began = 0.0, time.perf_counter()
            evaluate(recipe, lambda *_: (model, tokenizer))
            seconds = time.perf_counter() - began
            rows = load(recipe.out).rows
        measured.append(
            {"batch": batch, "samples": len(rows), "seconds": seconds, "model_share": spent[0] / seconds}
            | {"scores": {name: sum(r["score"] for r in rows if r["method"] == name) for name in METHODS}}
        )
    print("| prompts a pass | samples x methods | seconds | a second | share in the model |")
    print("|---|---|---|---|---|")
    for m in measured[1:]:
        rate = m["samples"] / m["seconds"]
        print(f"| {m['batch']} | {m['samples']} | {m['seconds']:.1f} | {rate:.1f} | {m['model_share']:.2f} |")
    if args.out:
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
        args.out.write_text(json.dumps({"device": device, "task": task, "runs": measured[1:]}, indent=1))


if __name__ == "__main__":
    main()
