"""Decode attention of one layer on a GPU: over pages, against full attention and against rebuilding K and V.

    python -m benchmarks.kernels [--cases 1x8192,1x32768,... | --grid] [--rivals] [--out out/kernels.json]

Llama-3.1-8B shapes (8 KV heads, 4 query heads each, 128 channels), bfloat16, random data. Layout "a": 32 of 128
channels kept at 16 bits, the rest 4 states a segment of 128 (the paper's rate). Layout "b": the plan that ships for
SmolLM2 at 0.156 of the bytes, its channels doubled and its heads repeated, all 30 layers; the figure is their mean.
Rivals (benchmarks/rivals.py), at batch 1 up to 128k: K and V rebuilt in a kernel, in two structures, and cuFFT.
Everything is compared with a float32 reference before it is timed: every layer at a small shape, then in each case the
last row of the first layer. Times are medians of replays of a CUDA graph, read by events; a graph goes through enough
copies of its inputs to exceed the second-level cache three times. `--grid` is 4k to 256k tokens by batches of 1 to 32,
as far as memory reaches. A case that fails is recorded with its error, and the next one begins.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import sys
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import longwave
from benchmarks import rivals
from longwave.methods import get_method
from longwave.methods.base import CacheShape
from longwave.ops.spectral import reference
from longwave.ops.spectral import triton as kernel
from longwave.ops.spectral.basis import table
from longwave.ops.spectral.layout import Code, Layout
from longwave.plan.profile import Profile

HEADS, GROUP, DIM, SEGMENT, DTYPE = 8, 4, 128, 128, torch.bfloat16
CASES = "1x8192,1x32768,1x131072,8x32768,16x32768"
GRID = [(batch, 1024 * k) for k in (4, 8, 16, 32, 64, 128, 256) for batch in (1, 2, 4, 8, 16, 32)]
RIVAL_TOKENS = 131072  # rivals are slow: no longer contexts, and batch 1 only
COPIES = 3 * 60 * 2**20  # bytes a graph goes through before it comes back: three times an H200's second-level cache
NEAR = 4e-3  # relative error in bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU has no times to give, but its tests run the rest


def codes(name):
    """A layout's layers: a code for each head of K, and of V."""
    if name == "a":
        return [([Code(((16, DIM // 4),), 4, state_bits=16)] * HEADS,) * 2]
    if name != "b":
        raise ValueError(f"layouts are a and b, got {name!r}")
    small = CacheShape(tuple(range(30)), (), 3, 64, torch.float16)
    profile = Profile.load(Path(longwave.__file__).parent / "plan" / "profiles" / "smollm2.json")
    planned = get_method("fourier").bind(small, profile, 0.15625).plan
    return [tuple([wider(side[i % 3]) for i in range(HEADS)] for side in (layer.k, layer.v)) for layer in planned]


def layouts(name):
    order = torch.arange(DIM).expand(HEADS, DIM)
    return [Layout(k, v, order, order, SEGMENT, DTYPE) for k, v in codes(name)]


def wider(code):
    """The same code for a head of twice the channels."""
    return dataclasses.replace(code, runs=tuple((bits, 2 * n) for bits, n in code.runs))


class Source:
    """What all inputs of a layer have in common, made once: its layout, the kernel's tables, 16 pages to draw from."""

    def __init__(self, layout, seed):
        g = torch.Generator(DEVICE).manual_seed(seed)
        self.layout = layout = layout.on(torch.device(DEVICE))
        self.basis = table("dct", 4, SEGMENT, torch.float32, torch.device(DEVICE))
        sample = torch.randn(2, 1, HEADS, 16 * SEGMENT, DIM, generator=g, device=DEVICE).to(DTYPE)
        some = reference.encode(layout, sample[0], sample[1], self.basis)
        reference.write_bias(layout, some, torch.randn(1, HEADS, 16, generator=g, device=DEVICE))  # of merged heads
        self.some = some[0].view(torch.int64)  # drawing eight bytes at a time is faster
        self.tables = kernel.tables_of(layout)

    def nbytes(self, batch, context):
        """Of one input."""
        pages = (context - 260) // SEGMENT
        dense = 2 * HEADS * (context - pages * SEGMENT) * DIM * DTYPE.itemsize
        return batch * (pages * self.layout.page_bytes + dense)


class Input:
    """What one decode step of one layer reads."""

    def __init__(self, source, batch, context, seed):
        g = torch.Generator(DEVICE).manual_seed(seed)
        self.source = source
        pages = (context - 260) // SEGMENT
        rest = context - pages * SEGMENT
        which = torch.randint(16, (batch, pages), generator=g, device=DEVICE)
        self.pages = source.some[which].view(torch.uint8)
        self.counts = torch.full((batch,), pages, dtype=torch.int32, device=DEVICE)
        self.q = torch.randn(batch, HEADS * GROUP, 1, DIM, generator=g, device=DEVICE).to(DTYPE)
        self.k, self.v = torch.randn(2, batch, HEADS, rest, DIM, generator=g, device=DEVICE).to(DTYPE)
        self.seen = torch.full((batch, 1), rest, dtype=torch.int32, device=DEVICE)

    def attend(self):
        args = (self.pages, self.counts, self.source.basis, self.q, DIM**-0.5, self.k, self.v, self.seen)
        return kernel.attend(self.source.tables, *args)

    def rebuild(self):
        """K and V of all pages made again in plain torch, then full attention."""
        k, v = reference.decode(self.source.layout, self.pages, self.source.basis)
        k, v = torch.cat([k.to(DTYPE), self.k], 2), torch.cat([v.to(DTYPE), self.v], 2)
        return folded(self.q, k, v)

    def expected(self, first=0):
        """Of the rows from `first` on, in float32."""
        layout, basis, pages = self.source.layout, self.source.basis, self.pages[first:]
        q = self.q[first:].float().reshape(-1, HEADS, GROUP, DIM) * DIM**-0.5
        s = torch.cat([reference.scores(layout, pages, q, basis), q @ self.k[first:].float().mT], -1)
        p, middle = torch.softmax(s, -1), pages.shape[1] * SEGMENT
        out = reference.mix(layout, pages, p[..., :middle], basis) + p[..., middle:] @ self.v[first:].float()
        return out.reshape(self.q[first:].shape)


def check(answer, want):
    """The relative error; a large one is an exception, so that no wrong answer is timed."""
    error = ((answer.float() - want).norm() / want.norm()).item()
    if not error < NEAR:  # NaN fails too
        raise ArithmeticError(f"relative error {error:.4f}, at most {NEAR} is allowed: not timed")
    return error


def folded(q, k, v):
    """Full attention with the query heads of a group as queries: the same numbers, one reading of K and V."""
    b, _, _, d = q.shape
    return sdpa(q.reshape(b, k.shape[1], -1, d), k, v).reshape(q.shape)


def grouped(q, k, v):
    return sdpa(q, k, v, enable_gqa=True)


def timed(steps, capture=True, seconds=0.03):
    """Median microseconds of one step; each step has inputs of its own. 5 to 20 replays, as fit into `seconds`."""
    for step in steps[:2]:
        step()
    torch.cuda.synchronize()

    def once():
        for step in steps:
            step()

    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()

    def run():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay() if capture else once()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3

    run()
    replays = max(5, min(20, int(seconds * 1e6 / run())))
    return statistics.median(run() for _ in range(replays)) / len(steps)


def copies(size):
    return max(1, -(-COPIES // int(size)))


def full_bytes(batch, context):
    return 2 * batch * HEADS * context * DIM * DTYPE.itemsize


def full_attention(batch, context, seed):
    """Microseconds of each of PyTorch's forms that ran."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    sets = []
    for _ in range(copies(full_bytes(batch, context))):
        q = torch.randn(batch, HEADS * GROUP, 1, DIM, generator=g, device=DEVICE).to(DTYPE)
        sets.append((q, *torch.randn(2, batch, HEADS, context, DIM, generator=g, device=DEVICE, dtype=DTYPE)))
    found = {}
    for form in (folded, grouped):
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    found[f"{form.__name__}, {backend.name}"] = timed([lambda s=s, f=form: f(*s) for s in sets])
            except RuntimeError as problem:
                print(f"  {form.__name__}, {backend.name}: {str(problem).splitlines()[0]}")
    return found


def paged(sources, batch, context, seed):
    """Layer by layer, so that only one layer's inputs are held: (relative error, microseconds of each layer)."""
    error, took = None, []
    for i, source in enumerate(sources):
        count = copies(source.nbytes(batch, context))
        inputs = [Input(source, batch, context, seed + 1000 * i + j) for j in range(count)]
        if error is None:
            error = check(inputs[0].attend()[-1:], inputs[0].expected(first=batch - 1))
        took.append(timed([x.attend for x in inputs]))
        del inputs
    return error, took


def rival_times(context, seed):
    """A row for each rival at batch 1; one that fails has its error instead of a time."""
    for structure in rivals.LAUNCHES:
        yield f"rebuild, {structure}", lambda s=structure: rebuild_time(s, context, seed)
    yield "cuFFT", lambda: fft_time(context, seed)


def rebuild_time(structure, context, seed):
    first = rivals.Rebuild(structure, 1, context, seed, DEVICE)
    more = range(1, copies(first.nbytes))
    sets = [first, *(rivals.Rebuild(structure, 1, context, seed + j, DEVICE, first.table) for j in more)]
    want, found = first.expected(), []
    for launch in rivals.LAUNCHES[structure]:
        for x in sets:
            x.launch = launch
        error = check(first.attend(), want)
        found.append((timed([x.attend for x in sets]), list(launch), error))
    took, launch, error = min(found)
    return {"us": took, "launch": launch, "error": error, "bytes": first.nbytes}


def fft_time(context, seed):
    first = rivals.FFT(1, context, seed, DEVICE)
    sets = [first, *(rivals.FFT(1, context, seed + j, DEVICE) for j in range(1, copies(first.nbytes)))]
    error = check(first.attend(), first.expected())  # and the transforms' plans are made
    steps, how = [x.attend for x in sets], "graph"
    try:
        took = timed(steps)
    except RuntimeError as problem:
        how = f"eager ({str(problem).splitlines()[0]})"
        torch.cuda.synchronize()
        took = timed(steps, capture=False)
    return {"us": took, "how": how, "error": error, "bytes": first.nbytes}


def copy_bandwidth():
    """Bytes a second of a large copy by a kernel (in a graph `copy_` is slower), read and written."""
    x = torch.randn(2**29, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (timed([lambda: torch.add(x, 1.0, out=y)]) * 1e-6)


def tidy():
    gc.collect()
    torch.cuda.empty_cache()


def described(problem):
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"


def gate(sources, seed):
    """The largest relative error of a layout's layers at a small shape."""
    inputs = (Input(source, 2, 2048, seed + i) for i, source in enumerate(sources))
    return max(check(x.attend(), x.expected()) for x in inputs)


class Table:
    """The measurements so far; written after every case, so that an interrupted run leaves what it has."""

    def __init__(self, about, out):
        self.about, self.out = about, out
        self.rows, self.rivals, self.skipped = [], [], []

    def failed(self, where, problem):
        reason = described(problem)
        print(f"  {' '.join(map(str, where.values()))}: {reason}", flush=True)
        self.skipped.append(where | {"reason": reason})

    def write(self):
        if self.out:
            found = {"rows": self.rows, "rivals": self.rivals, "skipped": self.skipped}
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.about | found, indent=1))


def add(results, sources, row, forms, args):
    """A layout's row, with what follows from its times."""
    batch, context, took = row["batch"], row["context"], statistics.mean(row["layers_us"])
    form = min(forms, key=forms.get)
    full, size = full_bytes(batch, context), statistics.mean(source.nbytes(batch, context) for source in sources)
    row |= {
        "full_us": forms[form], "full_form": form, "full_forms": forms, "us": took, "ratio": forms[form] / took,
        "bytes": size, "bytes_ratio": full / size,
        "of_copy": size / (took * 1e-6) / results.about["copy_bytes_per_s"],
    }  # fmt: skip
    if args.rebuild:
        row["rebuild_us"] = timed([Input(sources[0], batch, context, args.seed).rebuild])
    results.rows.append(row)
    print(
        f"  {row['layout']}: {took:.1f} us, {row['ratio']:.2f} x as fast, {row['bytes_ratio']:.2f} x fewer bytes, "
        f"{row['of_copy']:.2f} of copy" + (f", rebuilt {row['rebuild_us']:.0f} us" if args.rebuild else ""),
        flush=True,
    )


def measure(case, layers, results, args):
    """One batch and context: full attention, every layout, the rivals if asked for."""
    batch, context = case
    where = {"batch": batch, "context": context}
    free = torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else 2**30
    if full_bytes(batch, context) > 0.9 * free:
        raise MemoryError(f"full K and V take {full_bytes(batch, context):,} bytes, {free:,} are free")
    forms = full_attention(batch, context, args.seed)
    tidy()
    form = min(forms, key=forms.get)
    print(f"{batch}x{context}: full attention {forms[form]:.1f} us ({form})", flush=True)
    for name, sources in layers.items():
        try:
            error, took = paged(sources, batch, context, args.seed)
        except Exception as problem:
            results.failed(where | {"layout": name}, problem)
        else:
            add(results, sources, where | {"layout": name, "error": error, "layers_us": took}, forms, args)
        tidy()  # after the exception, whose frames hold tensors
    if args.rivals and batch == 1 and context <= RIVAL_TOKENS:
        for name, rival in rival_times(context, args.seed):
            try:
                row = where | {"name": name} | rival()
            except Exception as problem:
                results.failed(where | {"rival": name}, problem)
            else:
                row["of_copy"] = row["bytes"] / (row["us"] * 1e-6) / results.about["copy_bytes_per_s"]
                results.rivals.append(row)
                print(f"  {name}: {row['us']:.1f} us", flush=True)
            tidy()


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="BATCHxCONTEXT, commas between")
    parser.add_argument("--grid", action="store_true", help="4k to 256k tokens by batches of 1 to 32 instead")
    parser.add_argument("--layouts", default="a,b")
    parser.add_argument("--rivals", action="store_true", help="time rebuilding in a kernel and cuFFT too")
    parser.add_argument("--rebuild", action="store_true", help="time rebuilding K and V in plain torch too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernels times kernels on an NVIDIA GPU, and there is none here")
    cases = GRID if args.grid else [tuple(map(int, case.split("x"))) for case in args.cases.split(",")]
    bandwidth = copy_bandwidth()
    tidy()
    about = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "command": " ".join(["python -m benchmarks.kernels", *(sys.argv[1:] if argv is None else argv)]),
        "seed": args.seed, "copy_bytes_per_s": bandwidth,
    }  # fmt: skip
    print(f"{about['device']}, copy {bandwidth / 1e12:.2f} TB/s")
    results, layers = Table(about, args.out), {}
    for name in args.layouts.split(","):
        try:
            sources = [Source(layout, args.seed + i) for i, layout in enumerate(layouts(name))]
            print(f"layout {name}: relative error {gate(sources, args.seed):.4f}", flush=True)
            layers[name] = sources
        except Exception as problem:
            results.failed({"layout": name}, problem)
    for case in cases:
        try:
            measure(case, layers, results, args)
        except Exception as problem:
            results.failed({"batch": case[0], "context": case[1]}, problem)
        tidy()
        results.write()
    if any("ArithmeticError" in row["reason"] for row in results.skipped):
        raise SystemExit("some answers differ from the reference: they were not timed")


if __name__ == "__main__":
    main()
