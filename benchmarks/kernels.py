"""Decode attention of one layer on a GPU: over pages, against full attention and against rebuilding K and V.

    python -m benchmarks.kernels [--cases 1x8192,1x32768,...] [--rebuild] [--out out/kernels.json]

Llama-3.1-8B shapes (8 KV heads, 4 query heads each, 128 channels), bfloat16, random data. Layout "a": 32 of 128
channels kept at 16 bits, the rest 4 states a segment of 128 (the paper's rate). Layout "b": the plan that ships for
SmolLM2 at 0.156 of the bytes, its channels doubled and its heads repeated, all 30 layers; the figure is their mean.
Every case is compared with the float32 reference before it is timed. Times are medians of replays of a CUDA graph, read
by events; a graph goes through enough copies of its inputs to exceed the second-level cache three times.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import longwave
from longwave.methods import get_method
from longwave.methods.base import CacheShape
from longwave.ops.spectral import reference
from longwave.ops.spectral import triton as kernel
from longwave.ops.spectral.basis import table
from longwave.profile import Profile
from longwave.store.layout import Code, Layout

HEADS, GROUP, DIM, SEGMENT, DTYPE = 8, 4, 128, 128, torch.bfloat16
CASES = "1x8192,1x32768,1x131072,8x32768,16x32768"
COPIES = 3 * 60 * 2**20  # bytes a graph goes through before it comes back: three times an H200's second-level cache


def layouts(name):
    """The layers of a layout."""
    order = torch.arange(DIM).expand(HEADS, DIM)
    if name == "a":
        code = Code(((16, DIM // 4),), 4, state_bits=16)
        return [Layout([code] * HEADS, [code] * HEADS, order, order, SEGMENT, DTYPE)]
    small = CacheShape(tuple(range(30)), (), 3, 64, torch.float16)
    profile = Profile.load(Path(longwave.__file__).parent / "profiles" / "smollm2.json")
    method = get_method("fourier").bind(small, profile, 0.15625)
    layers = []
    for position in range(30):
        codes = method.codes(position)
        sides = [[wider(side[i % 3]) for i in range(HEADS)] for side in (codes.k, codes.v)]
        layers.append(Layout(*sides, order, order, SEGMENT, DTYPE))
    return layers


def wider(code):
    """The same code for a head of twice the channels."""
    return Code(
        tuple((bits, 2 * n) for bits, n in code.runs),
        code.states, code.axis, code.residual, code.state_bits, code.zero, code.fit, code.group,
    )  # fmt: skip


class Input:
    """What one decode step of one layer reads."""

    def __init__(self, layout, batch, context, seed):
        g = torch.Generator("cuda").manual_seed(seed)
        self.layout = layout
        pages = (context - 260) // SEGMENT
        rest = context - pages * SEGMENT
        for group in (*layout.k, *layout.v):
            group.heads, group.order = group.heads.cuda(), group.order.cuda()
        self.basis = table("dct", 4, SEGMENT, torch.float32, torch.device("cuda"))
        sample = torch.randn(2, 1, HEADS, 16 * SEGMENT, DIM, generator=g, device="cuda").to(DTYPE)
        some = reference.encode(layout, sample[0], sample[1], self.basis)[0]
        which = torch.randint(16, (batch, pages), generator=g, device="cuda")
        self.pages = some[which]
        self.counts = torch.full((batch,), pages, dtype=torch.int32, device="cuda")
        self.q = torch.randn(batch, HEADS * GROUP, 1, DIM, generator=g, device="cuda").to(DTYPE)
        self.k, self.v = torch.randn(2, batch, HEADS, rest, DIM, generator=g, device="cuda").to(DTYPE)
        self.seen = torch.full((batch, 1), rest, dtype=torch.int32, device="cuda")
        self.plan = kernel.plan(layout)

    @property
    def nbytes(self):
        return self.pages.nbytes + self.k.nbytes + self.v.nbytes

    def attend(self):
        args = (self.pages, self.counts, self.basis, self.q, DIM**-0.5, self.k, self.v, self.seen)
        return kernel.attend(self.plan, *args)

    def rebuild(self):
        """K and V of all pages made again, then full attention: what decoding on coefficients spares."""
        k, v = reference.decode(self.layout, self.pages, self.basis)
        k, v = torch.cat([k.to(DTYPE), self.k], 2), torch.cat([v.to(DTYPE), self.v], 2)
        return folded(self.q, k, v)

    def expected(self):
        q = self.q.float().reshape(len(self.q), HEADS, GROUP, DIM) * DIM**-0.5
        s = torch.cat([reference.scores(self.layout, self.pages, q, self.basis), q @ self.k.float().mT], -1)
        p, middle = torch.softmax(s, -1), self.pages.shape[1] * SEGMENT
        out = reference.mix(self.layout, self.pages, p[..., :middle], self.basis) + p[..., middle:] @ self.v.float()
        return out.reshape(self.q.shape)


def folded(q, k, v):
    """Full attention with the query heads of a group as queries: the same numbers, one reading of K and V."""
    b, _, _, d = q.shape
    return sdpa(q.reshape(b, HEADS, GROUP, d), k, v).reshape(q.shape)


def grouped(q, k, v):
    return sdpa(q, k, v, enable_gqa=True)


def timed(steps, replays=20):
    """Median microseconds of one step; each step has inputs of its own."""
    for step in steps[:2]:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times = []
    for _ in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(steps))
    return statistics.median(times[3:])


def full_attention(batch, context):
    """The best of PyTorch's forms: (microseconds, its name)."""
    size = 2 * batch * HEADS * context * DIM * 2
    copies = max(1, -(-COPIES // size))
    g = torch.Generator("cuda").manual_seed(1)
    sets = []
    for _ in range(copies):
        q = torch.randn(batch, HEADS * GROUP, 1, DIM, generator=g, device="cuda").to(DTYPE)
        sets.append((q, *torch.randn(2, batch, HEADS, context, DIM, generator=g, device="cuda", dtype=DTYPE)))
    found = {}
    for form in (folded, grouped):
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    found[f"{form.__name__}, {backend.name}"] = timed([lambda s=s, f=form: f(*s) for s in sets])
            except RuntimeError as problem:
                print(f"  {form.__name__}, {backend.name}: {str(problem).splitlines()[0]}")
    best = min(found, key=found.get)
    return found[best], best


def copy_bandwidth():
    """Bytes a second of a large copy, read and written."""
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / (timed([lambda: y.copy_(x)]) * 1e-6)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="BATCHxCONTEXT, commas between")
    parser.add_argument("--layouts", default="a,b")
    parser.add_argument("--rebuild", action="store_true", help="time rebuilding K and V in plain torch too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernels times kernels on an NVIDIA GPU, and there is none here")
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_s": bandwidth}
    print(f"{about['device']}, copy {bandwidth / 1e12:.2f} TB/s")
    names = args.layouts.split(",")
    layers = {name: layouts(name) for name in names}
    for name, found in layers.items():
        worst = 0.0
        for i, layout in enumerate(found):
            given = Input(layout, 2, 2048, i)
            want = given.expected()
            worst = max(worst, ((given.attend().float() - want).norm() / want.norm()).item())
        print(f"layout {name}: relative error {worst:.4f}")
        if not worst < 4e-3:  # NaN fails too
            raise SystemExit("the kernel differs from the reference: nothing is timed on wrong results")
    rows = []
    for case in args.cases.split(","):
        batch, context = map(int, case.split("x"))
        dense, form = full_attention(batch, context)
        torch.cuda.empty_cache()
        print(f"{case}: full attention {dense:.1f} us ({form})", flush=True)
        for name in names:
            inputs = [Input(layout, batch, context, i) for i, layout in enumerate(layers[name])]
            size = sum(x.nbytes for x in inputs) / len(inputs)
            more = max(0, -(-COPIES // int(size)) - len(inputs))
            inputs += [Input(layers[name][0], batch, context, 100 + i) for i in range(more if name == "a" else 0)]
            took = timed([x.attend for x in inputs])
            row = {
                "batch": batch, "context": context, "layout": name, "full_us": dense, "full_form": form, "us": took,
                "ratio": dense / took, "bytes": size, "of_copy": size / (took * 1e-6) / bandwidth,
                "bytes_ratio": 2 * batch * HEADS * context * DIM * 2 / size,
            }  # fmt: skip
            if args.rebuild:
                row["rebuild_us"] = timed([x.rebuild for x in inputs[:1]], replays=5)
            rows.append(row)
            print(
                f"  {name}: {took:.1f} us, {row['ratio']:.2f} x as fast, {row['bytes_ratio']:.2f} x fewer bytes, "
                f"{row['of_copy']:.2f} of copy" + (f", rebuilt {row['rebuild_us']:.0f} us" if args.rebuild else ""),
                flush=True,
            )
            del inputs
            torch.cuda.empty_cache()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
