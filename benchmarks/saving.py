"""A prompt that is read, saved coded and restored: what it says then, in which bytes, and how fast.

    python -m benchmarks.saving [--windows 4] [--context 3000] [--sizes 0.1,0.05,0.03] [--budget 0.156] [--out FILE]

SmolLM2, float32, on windows of task divergence: KL from the dense model of the tokens after the prompt, over the
restored prompt as it is, with the last 128 tokens exact instead of in 8 bits, coded while it was read in chunks, and
settled into fourier, beside fourier that read the prompt itself. Files are whole: ids, checksums, and the 132 tokens a
row that are not coded. Times are of this machine, reading against restoring, medians of one run.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import longwave
from benchmarks.sensitivity import Judge
from longwave.cli.console import show_table
from longwave.codec import codec_for
from longwave.evals.loss import score
from longwave.frame import cache_argument
from longwave.saved import read_coded


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=3000)
    parser.add_argument("--sizes", default="0.15,0.1,0.07,0.05,0.03")
    parser.add_argument("--budget", type=float, default=0.15625, help="of 16-bit numbers")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a pass where it is coded while it is read")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = longwave.load("smollm2-q4", dtype="float32", device=args.device)
    began = time.perf_counter()
    codec = codec_for(model, tokenizer)
    print(f"codec: {time.perf_counter() - began:.0f} s", flush=True)
    judge = Judge(model, tokenizer, args.windows, args.context, 256)
    print(f"dense loss {judge.dense():.4f}", flush=True)
    rows = {}

    def add(name, **figures):
        for key, value in figures.items():
            rows.setdefault(name, {}).setdefault(key, []).append(value)

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path, beside = Path(folder) / "kept.lw", Path(folder) / "exact.lw"
        for number, (ids, (_, scored, _)) in enumerate(zip(judge.ids, judge.read, strict=True)):
            prompt = torch.tensor(ids)[None, : args.context].to(args.device)

            def kl(cache, number=number, scored=scored):
                return judge.divergence(number, score(model, cache, scored))

            def read(method, prompt=prompt, **options):
                began = time.perf_counter()
                cache = longwave.cache(model, method, **options)
                model(prompt, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
                return cache, time.perf_counter() - began

            own, seconds = read("fourier", budget=args.budget / 2)
            add(f"fourier {args.budget:g}, read", kl=kl(own), seconds=seconds)
            dense, seconds = read("dense")
            bytes16 = dense.nbytes / 2
            add("dense, read", kl=0.0, ratio=1.0, seconds=seconds)
            for size in map(float, args.sizes.split(",")):
                began = time.perf_counter()
                written = longwave.save(dense, prompt, path, size=size)
                saving = time.perf_counter() - began
                began = time.perf_counter()
                back, _ = longwave.restore(model, path)
                restoring = time.perf_counter() - began
                add(f"coded {size:g}", kl=kl(back), ratio=written / bytes16, saving=saving, seconds=restoring)
                coder = codec.at(size, device=model.device)
                coder.lossless = True  # so that nothing beside it loses anything
                larger = longwave.save(dense, prompt, beside, size=size, coder=coder)
                began = time.perf_counter()
                same, _ = longwave.restore(model, beside)
                restoring = time.perf_counter() - began
                add(f"coded {size:g}, ends exact", kl=kl(same), ratio=larger / bytes16, seconds=restoring)
                began = time.perf_counter()
                written = read_coded(model, prompt, beside, size=size, chunk=args.chunk)
                reading = time.perf_counter() - began
                same, _ = longwave.restore(model, beside)
                add(f"coded {size:g}, while it was read", kl=kl(same), ratio=written / bytes16, seconds=reading)
                began = time.perf_counter()
                settled, _ = longwave.restore(model, path, "fourier", args.budget / 2)
                restoring = time.perf_counter() - began
                add(f"coded {size:g}, into fourier", kl=kl(settled), seconds=restoring)
    table = []
    for name, columns in rows.items():
        kls = columns["kl"]
        error = statistics.stdev(kls) / len(kls) ** 0.5 if len(kls) > 1 else float("nan")
        ratio = f"{statistics.mean(columns['ratio']):.4f}" if "ratio" in columns else ""
        saving = f"{statistics.median(columns['saving']):.1f}" if "saving" in columns else ""
        seconds = f"{statistics.median(columns['seconds']):.1f}"
        table.append([name, ratio, f"{statistics.mean(kls):.5f} ± {error:.5f}", saving, seconds])
    show_table("saved and restored", ["", "file, of 16 bits", "KL", "s to save", "s to read or restore"], table)
    if args.out:
        args.out.write_text(json.dumps({"about": {k: str(v) for k, v in vars(args).items()}, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
