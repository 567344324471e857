"""A turn: many new tokens over a compressed context, against the same turn over a dense cache.

    python -m benchmarks.turn [--context 8000] [--tokens 512] [--budgets 0.25,0.156] [--repeats 5] [--out out/turn.json]
    python -m benchmarks.turn --device cuda [--context 65536] [--tokens 512]

On a CPU: SmolLM2 in float32, whole passes of the model, its cache forked from one exact reading; the aim is 1.5 times a
dense cache's turn. On a GPU: attention of single layers in Llama-3.1-8B's shapes (layout b of benchmarks/kernels.py),
bfloat16, random data; the aim is twice the time of dense attention over the same tokens plus one unpacking. Before
anything is timed the answer is compared with attention over what the pages stand for. Turns are taken in turn, and the
figure is the ratio of medians of one run.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import longwave
from longwave.frame import Pass, cache_argument
from longwave.ops.attention.reference import last_attention


def relative(got, expected):
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def on_cpu(context, tokens, budgets, repeats):
    from longwave.evals.data import pydoc_haystack
    from longwave.evals.fork import fork, prefill

    model, tokenizer = longwave.load("smollm2-q4", dtype=torch.float32)
    ids = tokenizer(pydoc_haystack(), return_tensors="pt", verbose=False).input_ids
    exact = prefill(model, ids[:, :context], needs=longwave.cache(model, "fourier").method.needs)
    new = ids[:, context : context + tokens]
    caches = {"dense": fork(exact, longwave.cache(model, "dense"))}
    caches |= {
        f"fourier {budget:g}": fork(exact, longwave.cache(model, "fourier", budget=budget)) for budget in budgets
    }
    times = {name: [] for name in caches}
    for turn in range(repeats + 1):
        for name, memory in caches.items():
            own = copy.deepcopy(memory)
            began = time.perf_counter()
            model(new, **cache_argument(model, own), use_cache=True, logits_to_keep=1)
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - began)
            scratch = own.report().scratch
            if name != "dense" and not scratch:
                sys.exit("the turn did not unpack its pages: nothing is timed")
    base = statistics.median(times["dense"])
    return [
        {"method": name, "ms": statistics.median(found) * 1e3, "ratio": statistics.median(found) / base}
        for name, found in times.items()
    ]


def clock(work, repeats):
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    work()
    for start, end in zip(events[::2], events[1::2], strict=True):
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True))


@torch.no_grad()
def on_gpu(context, tokens, repeats):
    from benchmarks.kernels import DIM, DTYPE, GROUP, HEADS, SEGMENT, codes
    from longwave.methods.segmented import SegmentedBound, SegmentedLayer
    from longwave.ops.spectral import reference
    from longwave.ops.spectral.basis import table
    from longwave.plan.plan import LayerCodes
    from longwave.shape import CacheShape

    device = torch.device("cuda")
    order = torch.arange(DIM).expand(HEADS, DIM)
    shape = CacheShape((0,), (), HEADS, DIM, DTYPE, HEADS * GROUP)
    method = longwave.Fourier()
    rows = []
    for number, (k_codes, v_codes) in enumerate(codes("b")[::6]):
        plan = (LayerCodes(tuple(k_codes), tuple(v_codes), order, order),)
        layer: SegmentedLayer = SegmentedBound(method, shape, plan=plan).layer(0)
        g = torch.Generator(device).manual_seed(number)

        def draw(n, generator=g):
            return torch.randn(1, HEADS, n, DIM, generator=generator, device=device).to(DTYPE)

        layer.update(draw(context), draw(context))
        layer._flush()
        layer.settle()
        layer._unsettled = False
        q = torch.randn(1, HEADS * GROUP, tokens, DIM, generator=g, device=device).to(DTYPE)
        new = draw(tokens), draw(tokens)
        layer.write(*new)
        p = Pass(q, *new, DIM**-0.5)
        k, v = layer.materialize()
        expected = last_attention(q, k, v, DIM**-0.5)
        error = relative(layer.attend(p), expected)
        layout, states = layer.store.layout, plan[0].states
        rebuilt = reference.decode(layout, layer.store.pages, table("dct", states, SEGMENT, torch.float32, device))
        middle = slice(4, 4 + layer.store.tokens[0])
        unpacked = max(relative(k[:, :, middle], rebuilt[0]), relative(v[:, :, middle], rebuilt[1]))
        if not (error < 1e-2 and unpacked < 1e-2):
            sys.exit(f"layer {number}: relative errors {error:.2g}, {unpacked:.2g}: nothing is timed on wrong results")
        del rebuilt
        out_k, out_v = (x[:, :, middle].clone() for x in (k, v))
        turn = clock(lambda layer=layer, p=p: layer.attend(p), repeats)
        dense = clock(lambda q=q, k=k, v=v: last_attention(q, k, v, DIM**-0.5), repeats)
        unpack = clock(lambda layer=layer, a=out_k, b=out_v: layer.store.expand(0, a, b), repeats)
        rows.append({"layer": 6 * number, "turn_ms": turn, "dense_ms": dense, "unpack_ms": unpack,
                     "ratio": turn / (dense + unpack), "error": error})  # fmt: skip
        layer.progress.scratch.clear()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--context", type=int)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--budgets", default="0.25,0.156")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda":
        rows = on_gpu(args.context or 65536, args.tokens, args.repeats or 20)
    else:
        budgets = [float(budget) for budget in args.budgets.split(",")]
        rows = on_cpu(args.context or 7600, args.tokens, budgets, args.repeats or 5)
    names = list(rows[0])
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(f'{x:.4g}' if isinstance(x, float) else str(x) for x in row.values())} |")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        record = {**about, "tokens": args.tokens, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
