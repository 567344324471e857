"""Compression of one layer on a GPU: segments to pages, in Triton against plain torch.

    python -m benchmarks.compression [--cases 1x1,16x1,1x256] [--out out/compression.json]

A case is BATCHxSEGMENTS: an open segment that is full, the same in a batch, and a prompt of 32768 tokens. Shapes and
layouts are those of benchmarks/kernels.py; the figure of "b" is the mean of its 30 layers. Pages are compared with the
reference's before anything is timed. Times are medians of whole calls, read by CUDA events: both ways wait for the
device to learn of scales that overflow, so launches count.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks.kernels import DIM, DTYPE, HEADS, SEGMENT, layouts
from longwave.ops.spectral import reference
from longwave.ops.spectral.basis import table

CASES = "1x1,16x1,1x256"


def drawn(batch, segments, seed):
    """K and V [batch, HEADS, segments * SEGMENT, DIM]."""
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(2, batch, HEADS, segments * SEGMENT, DIM, generator=g, device="cuda", dtype=DTYPE).unbind()


def difference(kernel, layout, plan, basis, seed):
    """(share of the bytes that differ from the reference's, how much larger the error of what they stand for)."""
    k, v = drawn(2, 8, seed)
    got, want = kernel.encode(plan, k, v, basis), reference.encode(layout, k, v, basis)
    worse = 0.0
    sides = (reference.decode(layout, pages, basis) for pages in (got, want))
    for x, a, b in zip((k, v), *sides, strict=True):
        worse = max(worse, ((a - x).norm() / (b - x).norm()).item() - 1)
    return (got != want).float().mean().item(), worse


def timed(call, repeats):
    """Median microseconds of a call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="BATCHxSEGMENTS, commas between")
    parser.add_argument("--layouts", default="a,b")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.compression times kernels on an NVIDIA GPU, and there is none here")
    from longwave.ops.spectral import triton_encode as kernel

    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(about["device"])
    basis = table("dct", 4, SEGMENT, torch.float32, torch.device("cuda"))
    layers = {}
    for name in args.layouts.split(","):
        layers[name], share, worse = [], 0.0, 0.0
        for i, layout in enumerate(layouts(name)):
            for group in (*layout.k, *layout.v):
                group.heads, group.order = group.heads.cuda(), group.order.cuda()
            if problem := kernel.fits(layout):
                raise SystemExit(f"layout {name}: {problem}")
            plan = kernel.plan(layout)
            layers[name].append((layout, plan))
            found = difference(kernel, layout, plan, basis, i)
            share, worse = max(share, found[0]), max(worse, found[1])
        print(f"layout {name}: {share:.6f} of the bytes differ at most, errors larger by {worse:.6f}")
        if not (share < 1e-3 and worse < 2e-3):
            raise SystemExit("the kernels differ from the reference: nothing is timed on wrong results")
    rows = []
    for case in args.cases.split(","):
        batch, segments = map(int, case.split("x"))
        k, v = drawn(batch, segments, 0)
        for name, found in layers.items():
            ways = {
                "us": lambda layout, plan, k=k, v=v: kernel.encode(plan, k, v, basis),
                "reference_us": lambda layout, plan, k=k, v=v: reference.encode(layout, k, v, basis),
            }
            row = {"batch": batch, "segments": segments, "layout": name}
            for way, call in ways.items():
                times = [timed(lambda pair=pair, call=call: call(*pair), args.repeats) for pair in found]
                row[way] = statistics.mean(times)
            row["ratio"] = row["reference_us"] / row["us"]
            row["bytes_per_s"] = (k.nbytes + v.nbytes) / (row["us"] * 1e-6)
            rows.append(row)
            print(
                f"{case} {name}: {row['us']:.0f} us, reference {row['reference_us']:.0f} us, {row['ratio']:.1f} x as "
                f"fast, {row['bytes_per_s'] / 1e9:.1f} GB/s of K and V",
                flush=True,
            )
        del k, v
        torch.cuda.empty_cache()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
