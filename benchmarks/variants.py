"""Constants of the attention kernels against each other, layer by layer: for tuning, and to see where time goes.

    python -m benchmarks.variants b:4,18 16x32768,1x131072 '{}' '{"MIX_STEP": 64}' '{"REGISTERS": 96}'

LAYOUT[:LAYERS] and cases as in benchmarks/kernels.py, then sets of constants of ops/spectral/triton.py, "{}" as they
are. Prints microseconds of one step, its error, and those of each kernel by the profiler, launches one after the
other: where a launch begins while the one before ends, its time has waiting in it. Differences below 3 % were noise.
"""

import argparse
import json
import statistics

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import kernels
from longwave.ops.spectral import triton as kernel


def shares(step, repeats=3):
    """Microseconds of each kernel of ours in a step."""
    step()
    if kernels.DEVICE != "cuda":
        return {}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    found = {}
    for event in trace.events():
        if event.device_type.name == "CUDA" and event.name.startswith("_"):
            name = event.name.strip("_").removesuffix("_kernel")
            found[name] = found.get(name, 0) + event.device_time / repeats
    return {name: round(us, 1) for name, us in found.items()}


def compare(layout, layers, case, variants, seed=0):
    """A row for each layer and variant; a variant that fails is a row with its error."""
    batch, context = case
    for layer in layers:
        source = kernels.Source(kernels.layouts(layout)[layer], layer)
        inputs = [
            kernels.Input(source, batch, context, seed + 1000 * layer + j)
            for j in range(kernels.copies(source.nbytes(batch, context)))
        ]
        want = inputs[0].expected(first=batch - 1)
        for constants in variants:
            usual = {name: getattr(kernel, name) for name in constants}
            row = {"layout": layout, "layer": layer, "batch": batch, "context": context, "constants": constants}
            try:
                for name, value in constants.items():
                    setattr(kernel, name, value)
                error = kernels.check(inputs[0].attend()[-1:], want)
                us = kernels.timed([given.attend for given in inputs])
                yield row | {"us": us, "error": error, "shares": shares(inputs[0].attend)}
            except Exception as problem:
                yield row | {"problem": f"{type(problem).__name__}: {problem}"}
            finally:
                for name, value in usual.items():
                    setattr(kernel, name, value)
        del inputs
        kernels.tidy()


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", metavar="LAYOUT[:LAYERS]")
    parser.add_argument("cases", help="BATCHxCONTEXT, commas between")
    parser.add_argument("constants", nargs="+", type=json.loads)
    args = parser.parse_args(argv)
    layout, _, layers = args.layout.partition(":")
    chosen = [int(i) for i in layers.split(",")] if layers else range(len(kernels.layouts(layout)))
    unknown = {name for constants in args.constants for name in constants if not hasattr(kernel, name)}
    if unknown:
        parser.error(f"ops/spectral/triton.py has no {', '.join(sorted(unknown))}")
    for case in args.cases.split(","):
        batch, context = map(int, case.split("x"))
        times = {}
        for row in compare(layout, chosen, (batch, context), args.constants):
            about = f"{layout}{row['layer']} {case} {json.dumps(row['constants'])}"
            if "problem" in row:
                print(f"{about}: {row['problem']}", flush=True)
                continue
            times.setdefault(json.dumps(row["constants"]), []).append(row["us"])
            print(f"{about}: {row['us']:.1f} us, error {row['error']:.4f}, {row['shares']}", flush=True)
        for constants, us in times.items():
            print(f"mean {case} {constants}: {statistics.mean(us):.1f} us of {len(us)} layers", flush=True)


if __name__ == "__main__":
    main()
