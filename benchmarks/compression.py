"""Compression of one layer on a GPU, segments to pages and pages to dense K and V, in Triton against plain torch.

    python -m benchmarks.compression [--cases 1x1,16x1,1x256] [--out out/compression.json]

A case is BATCHxSEGMENTS: an open segment that is full, the same in a batch, and a prompt of 32768 tokens. Shapes and
layouts are those of benchmarks/kernels.py; the figure of "b" is the mean of its 30 layers. Pages, and what they expand
to, are compared with the reference's before anything is timed. Times are medians of whole calls, read by CUDA events:
both ways of compressing wait for the device to learn of scales that overflow, so launches count. Expanding in Triton is
timed by a graph, into more outputs than the second-level cache holds, and so is filling these with a number.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks import kernels
from benchmarks.kernels import DIM, DTYPE, HEADS, SEGMENT, layouts
from longwave.ops.spectral import reference
from longwave.ops.spectral.basis import table

CASES = "1x1,16x1,1x256"


def drawn(batch, segments, seed):
    """K and V [batch, HEADS, segments * SEGMENT, DIM]."""
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(2, batch, HEADS, segments * SEGMENT, DIM, generator=g, device="cuda", dtype=DTYPE).unbind()


def difference(kernel, unpack, layout, tables, dense, basis, seed):
    """(share of the bytes that differ from the reference's, how much larger the error of what they stand for, relative
    error of what they expand to)."""
    k, v = drawn(2, 8, seed)
    got, want = kernel.encode(tables, k, v, basis), reference.encode(layout, k, v, basis)
    worse, off, outs = 0.0, 0.0, [torch.full_like(x, float("nan")) for x in (k, v)]
    unpack.expand(dense, want, basis, *outs)
    sides = (reference.decode(layout, pages, basis) for pages in (got, want))
    for x, out, a, b in zip((k, v), outs, *sides, strict=True):
        worse = max(worse, ((a - x).norm() / (b - x).norm()).item() - 1)
        off = max(off, ((out - b).norm() / b.norm()).nan_to_num(1.0).item())
    return (got != want).float().mean().item(), worse, off


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


def expansion(kernel, unpack, found, k, v, basis, repeats):
    """Microseconds of pages to dense K and V, mean of the layers: in Triton, in plain torch; and to fill as much."""
    outs = [torch.empty(2, *k.shape, dtype=DTYPE, device="cuda") for _ in range(kernels.copies(2 * k.nbytes))]
    fill = kernels.timed([lambda out=out: out.fill_(1.0) for out in outs])
    fused, plain = [], []
    for layout, tables, dense in found:
        args = kernel.encode(tables, k, v, basis), basis
        fused.append(kernels.timed([lambda a=(dense, *args, *out): unpack.expand(*a) for out in outs]))
        plain.append(timed(lambda a=(layout, *args, *outs[0]): reference.expand(*a), repeats))
    return {
        "expand_us": statistics.mean(fused), "expand_reference_us": statistics.mean(plain), "fill_us": fill,
    }  # fmt: skip


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
    from longwave.ops.spectral import triton_expand as unpack

    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(about["device"])
    basis = table("dct", 4, SEGMENT, torch.float32, torch.device("cuda"))
    layers = {}
    for name in args.layouts.split(","):
        layers[name], share, worse, off = [], 0.0, 0.0, 0.0
        for i, layout in enumerate(layout.on(torch.device("cuda")) for layout in layouts(name)):
            if problem := kernel.fits(layout) or unpack.fits(layout):
                raise SystemExit(f"layout {name}: {problem}")
            both = kernel.tables_of(layout), unpack.tables_of(layout)
            layers[name].append((layout, *both))
            found = difference(kernel, unpack, layout, *both, basis, i)
            share, worse, off = (max(pair) for pair in zip((share, worse, off), found, strict=True))
        print(
            f"layout {name}: {share:.6f} of the bytes differ at most, errors larger by {worse:.6f}; expanded, relative "
            f"error {off:.6f}"
        )
        if not (share < 1e-3 and worse < 2e-3 and off < kernels.NEAR):
            raise SystemExit("the kernels differ from the reference: nothing is timed on wrong results")
    rows = []
    for case in args.cases.split(","):
        batch, segments = map(int, case.split("x"))
        k, v = drawn(batch, segments, 0)
        for name, found in layers.items():
            ways = {
                "us": lambda layout, tables, dense, k=k, v=v: kernel.encode(tables, k, v, basis),
                "reference_us": lambda layout, tables, dense, k=k, v=v: reference.encode(layout, k, v, basis),
            }
            row = {"batch": batch, "segments": segments, "layout": name}
            for way, call in ways.items():
                times = [timed(lambda one=one, call=call: call(*one), args.repeats) for one in found]
                row[way] = statistics.mean(times)
            row["ratio"] = row["reference_us"] / row["us"]
            row["bytes_per_s"] = (k.nbytes + v.nbytes) / (row["us"] * 1e-6)
            row |= expansion(kernel, unpack, found, k, v, basis, args.repeats)
            rows.append(row)
            print(
                f"{case} {name}: {row['us']:.0f} us, reference {row['reference_us']:.0f} us, {row['ratio']:.1f} x as "
                f"fast, {row['bytes_per_s'] / 1e9:.1f} GB/s of K and V; expanded in {row['expand_us']:.1f} us, "
                f"reference {row['expand_reference_us']:.0f} us, filling as much {row['fill_us']:.1f} us",
                flush=True,
            )
        del k, v
        torch.cuda.empty_cache()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
