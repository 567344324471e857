"""Llama-3.1-8B from prompt to token on a GPU: dense memory against longwave's.

    python -m benchmarks.endtoend [--parts decode,prefill,capacity] [--contexts 16k,32k,64k,128k] [--batches 1,8]
        [--methods dense,a,b] [--out out/endtoend.json]
    python -m benchmarks.endtoend --compile --parts decode          (layers through torch.compile, dense and ours)
    python -m benchmarks.endtoend --device cpu --tiny --layers 1 --contexts 1k --batches 1     (does it run at all)

The model has the published configuration and random weights, bfloat16: times and bytes do not depend on what it says.
Methods: "dense", and layouts "a" and "b" of benchmarks/kernels.py (b's 30 layers are repeated to fill 32).

decode    time of an output token from CUDA graphs. Dense: K and V preallocated for exactly this context, the fastest
          form of PyTorch's SDPA. Longwave: `StaticDecoder`, over the second segment, so that one compression is among
          the steps: the median is a plain step, the mean has its share of that. What the memory holds is synthetic,
          since time does not depend on values either: random dense tokens, and 16 pages of random K and V, compressed
          once a layer and drawn from at random.
prefill   time, peak memory and what the cache then holds, of a random prompt given at once, logits of the last token:
          transformers' DynamicCache ("dense"), our dense method ("dense, ours") and a, b, compressed layer by layer.
capacity  the largest batch that has room for one such decode step, by trying: doubled, then bisected.

Before anything is timed, graph decoding of a 2-layer model is compared with transformers' and longwave's ordinary path.
A cell that fails, for want of memory or else, is recorded with its error.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin

import longwave
from benchmarks.kernels import SEGMENT, codes, described, folded, grouped, tidy
from longwave.decode import StaticDecoder
from longwave.decode.compiled import Compiled, OpaqueCache
from longwave.frame import cache_argument
from longwave.methods.segmented import Segmented, SegmentedBound
from longwave.ops.spectral import reference
from longwave.ops.spectral.basis import table
from longwave.plan.plan import LayerCodes
from longwave.shape import CacheShape

DTYPE = torch.bfloat16
SINKS, WINDOW = 4, 256  # as `longwave.Fourier` has them
GATE_STEPS = 150  # a segment is compressed on the way
NEAR = 3e-2  # relative error of logits, two roundings of a bfloat16 model apart
LLAMA = dict(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    vocab_size=128256, max_position_embeddings=131072 + 4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)  # fmt: skip
TINY = dict(hidden_size=128, intermediate_size=256, num_attention_heads=16, vocab_size=1000)


@dataclass(frozen=True)
class Given(Segmented):
    """A layout of the kernel benchmark as a method."""

    name: ClassVar[str] = "given"

    title: str

    @property
    def dense_tokens(self):
        return SINKS, WINDOW, SEGMENT

    def fits_budget(self):
        return False

    def bind(self, shape, profile, budget):
        found = codes(self.title)
        order = torch.arange(128).expand(8, 128)
        made = [LayerCodes(tuple(k), tuple(v), order, order) for k, v in found]
        plan = tuple(made[i % len(made)] for i in range(len(shape.memory_layers)))
        return SegmentedBound(self, shape, budget, plan=plan, words=f"layout {self.title}")


@torch.no_grad()
def random_llama(config, device, seed=0):
    """Weights of 16 bits that are drawn where they lie."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
    return model


def build(layers, tiny, device, seed=0):
    return random_llama(LlamaConfig(**(LLAMA | (TINY if tiny else {})), num_hidden_layers=layers), device, seed)


# dense memory of a fixed size


class FixedLayer(CacheLayerMixin):
    """K and V of exactly the context and one more token, which every step writes anew."""

    def __init__(self, k, v):
        super().__init__()
        self.keys, self.values, self.is_initialized = k, v, True

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self):
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length):
        return self.keys.shape[2], 0

    def get_max_length(self):
        return self.keys.shape[2]


def forms(device):
    """Names of the attention functions to choose from; made known to transformers. One query sees all: no mask."""
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if device == "cuda" else (SDPBackend.MATH,)
    names = []
    for form in (folded, grouped):
        for backend in backends:

            @torch.compiler.disable  # as ours is
            def attention(module, q, k, v, mask, form=form, backend=backend, **kwargs):
                with sdpa_kernel(backend):
                    return form(q, k, v).transpose(1, 2).contiguous(), None

            # transformers takes a name with "flash" in it for a kernel of the hub
            name = f"{form.__name__}-{backend.name}".lower().replace("flash_attention", "fa2")
            AttentionInterface.register(name, attention)
            AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
            names.append(name)
    return names


class DenseDecoder:
    """One step at a fixed context, over and over."""

    def __init__(self, model, layers, form, compile=False):
        self.model, self.form = model, form
        self.compiled = Compiled(model) if compile else None
        self.cache = OpaqueCache(layers=layers)
        batch, length = layers[0].keys.shape[0], layers[0].keys.shape[2]
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.position = torch.full((batch, 1), length - 1, device=model.device)
        self.graph = None
        model.set_attn_implementation(form)
        self.logits = self._forward()
        if model.device.type == "cuda":
            self._forward()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._forward()

    def _forward(self):
        given = dict(position_ids=self.position, **cache_argument(self.model, self.cache), use_cache=True)
        with nullcontext() if self.compiled is None else self.compiled.within():
            return self.model(self.ids, **given).logits[:, -1]

    def step(self, ids):
        self.ids.copy_(ids)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.logits = self._forward()
        return self.logits

    def finish(self):
        self.graph = self.cache = None


def random_layers(model, batch, context, seed):
    g = torch.Generator(model.device).manual_seed(seed)
    shape = (2, batch, model.config.num_key_value_heads, context + 1, model.config.head_dim)
    made = range(model.config.num_hidden_layers)
    return [FixedLayer(*torch.randn(shape, generator=g, device=model.device, dtype=DTYPE)) for _ in made]


# longwave's memory


def sample(model, bound, position):
    """16 pages of a layer, from random K and V; kept for the next cell."""
    held = SAMPLES.setdefault((id(model), bound.method.title), {})
    if position not in held:
        device = model.device
        layout, states = bound.layout(position).on(device), bound.plan[position].states
        g = torch.Generator(device).manual_seed(position)
        k, v = torch.randn(2, 1, layout.heads, 16 * SEGMENT, layout.dim, generator=g, device=device).to(DTYPE)
        some = reference.encode(layout, k, v, table("dct", states, SEGMENT, torch.float32, device))[0]
        held[position] = some.view(torch.int64)  # drawing eight bytes at a time is faster
    return held[position]


SAMPLES = {}


def filled(model, method, batch, context, seed):
    """A cache that stands for `context` tokens a row, without a prompt."""
    cache = longwave.cache(model, method)
    bound = cache.method
    g = torch.Generator(model.device).manual_seed(seed)
    middle = bound.absorbed(context)
    shape = (2, batch, model.config.num_key_value_heads, context - middle, model.config.head_dim)
    for position, layer in enumerate(cache.memory_layers()):
        layer.write(*torch.randn(shape, generator=g, device=model.device, dtype=DTYPE))
        layer.dense.fit()
        if middle:
            some, pages = sample(model, bound, position), middle // SEGMENT
            layer.store = bound.new_store(position, batch, model.device)
            which = torch.randint(16, (batch, pages), generator=g, device=model.device)
            layer.store.pages = some[which].view(torch.uint8)
            layer.store.counts = [pages] * batch
        layer.columns += middle
        layer.rows = [row + middle for row in layer.rows]
        layer._run = list(layer.rows)
    return cache


class OrdinaryDecoder:
    """A step as `generate` makes it, without a graph."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache

    def step(self, ids):
        return self.model(ids, **cache_argument(self.model, self.cache), use_cache=True).logits[:, -1]

    def finish(self):
        self.cache = None


# measuring


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock(step, count, device):
    """Milliseconds of each of `count` steps, one after the other without waiting for the device in between."""
    step()
    step()
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(count):
            step()
            times.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def step_ids(model, batch, seed=0):
    g = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (batch, 1), generator=g).to(model.device)


def decode_dense(model, batch, context, seed, compile):
    ids, layers, found = step_ids(model, batch), random_layers(model, batch, context, seed), {}
    count = 20 if model.device.type == "cuda" else 2
    for form in forms(model.device.type):
        decoder = None
        try:
            decoder = DenseDecoder(model, layers, form, compile)
            found[form] = clock(lambda d=decoder: d.step(ids), count, model.device)
        except RuntimeError as problem:
            if out_of_memory(problem):
                raise
            print(f"  {form}: {described(problem)}")
        finally:
            if decoder is not None:
                decoder.finish()
    best = min(found, key=lambda form: statistics.median(found[form]))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return found[best], {"form": best, "cache_bytes": held}


def decode_longwave(model, method, batch, context, seed, compile):
    ids, steps = step_ids(model, batch), SEGMENT if model.device.type == "cuda" else 2
    cache = filled(model, method, batch, context, seed)
    held = cache.nbytes
    decoder = StaticDecoder(model, cache, new_tokens=2 * steps + 2, compile=compile)
    for _ in range(steps):  # the first compression makes tables that a prompt would have made
        decoder.step(ids)
    times = clock(lambda: decoder.step(ids), steps, model.device)
    return times, {"cache_bytes": held}  # no finish: handing the cache back may need memory that is not there


def decode(model, methods, batch, context, seed, compile):
    for name, method in methods.items():

        def cell(method=method):
            if method is None:
                times, more = decode_dense(model, batch, context, seed, compile)
            else:
                times, more = decode_longwave(model, method, batch, context, seed, compile)
            median = statistics.median(times)
            mean = statistics.mean(times)
            return {"ms": median, "mean_ms": mean, "steps": len(times), "tokens_per_s": batch * 1e3 / mean, **more}

        yield {"part": "decode", "method": name, "batch": batch, "context": context}, cell


def prefill_once(model, make, batch, context, seed):
    device = model.device
    ids = torch.randint(
        1, model.config.vocab_size, (batch, context), generator=torch.Generator("cpu").manual_seed(seed)
    ).to(device)
    cache = make()
    wait(device)
    weights = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    began = time.perf_counter()
    model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    wait(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    if isinstance(cache, longwave.LongCache):
        held = cache.nbytes
    else:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"s": seconds, "peak_bytes": peak, "peak_over_weights": max(0, peak - weights), "cache_bytes": held}


def prefill(model, methods, batch, context, seed):
    def stock():
        model.set_attn_implementation("sdpa")
        return DynamicCache(config=model.config)

    makers = {}
    for name, method in methods.items():
        if method is None:
            makers |= {"dense": stock, "dense, ours": lambda: longwave.cache(model, longwave.Dense())}
        else:
            makers[name] = lambda method=method: longwave.cache(model, method)
    for name, make in makers.items():

        def cell(make=make):
            prefill_once(model, make, batch, min(context, 2048), seed)  # libraries and kernels wake up
            tidy()
            return prefill_once(model, make, batch, context, seed)

        yield {"part": "prefill", "method": name, "batch": batch, "context": context}, cell


def largest(fits, start=1, most=4096):
    """The largest n that fits, or 0: doubled from `start`, then bisected to within 1 in 32."""
    low, high = 0, most + 1
    n = min(start, most)
    while high - low > max(1, low // 32):
        if fits(n):
            low = n
            n = min(2 * n, most) if high > most else (low + high) // 2
        else:
            high = n
            n = (low + high) // 2
        if n in (low, high):
            break
    return low


def capacity(model, methods, context, seed, most):
    for name, method in methods.items():

        def fits(batch, method=method):
            held = decoder = None
            try:
                if method is None:
                    held = random_layers(model, batch, context, seed)
                    decoder = DenseDecoder(model, held, forms(model.device.type)[0])
                else:
                    held = filled(model, method, batch, context, seed)
                    decoder = StaticDecoder(model, held, new_tokens=1)
                decoder.step(step_ids(model, batch))
                wait(model.device)
                return True
            except Exception as problem:
                if out_of_memory(problem):
                    return False
                raise
            finally:
                if decoder is not None and method is None:
                    decoder.finish()
                held = decoder = None
                tidy()

        def cell(fits=fits, method=method):
            start = 1
            if model.device.type == "cuda":  # a first guess spares the doubling from 1
                layers = model.config.num_hidden_layers
                row = 4096 * context * layers if method is None else filled_bytes(model, method, context)
                start = max(1, int(0.5 * torch.cuda.mem_get_info()[0] / row))
            return {"batch": largest(fits, start, most)}

        yield {"part": "capacity", "method": name, "context": context}, cell


def filled_bytes(model, method, context):
    bound = method.bind(CacheShape.of(model.config, DTYPE), None, None)
    pages = bound.absorbed(context) // SEGMENT
    return sum(pages * bound.layout(i).page_bytes for i in range(len(bound.plan))) or 1


def gate(model, method, seed, compile):
    """The largest relative error of graph decoding's logits against the ordinary path, of a 2-layer model."""
    g = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (2, 1000), generator=g).to(model.device)
    pairs = []
    if method is None:
        model.set_attn_implementation("sdpa")
        stock = DynamicCache(config=model.config)
        model(ids, **cache_argument(model, stock), use_cache=True, logits_to_keep=1)
        room = [torch.nn.functional.pad(x, (0, 0, 0, 1)) for y in stock.layers for x in (y.keys, y.values)]
        want = OrdinaryDecoder(model, stock).step(ids[:, :1])
        for form in forms(model.device.type):
            layers = [FixedLayer(k, v) for k, v in zip(room[::2], room[1::2], strict=True)]
            try:
                pairs.append((DenseDecoder(model, layers, form, compile).step(ids[:, :1]), want))
            except RuntimeError as problem:  # `decode` leaves such a form out too
                print(f"  {form}: {described(problem)}")
    else:
        caches = [longwave.cache(model, method) for _ in range(2)]
        for cache in caches:
            model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        ordinary = OrdinaryDecoder(model, caches[0])
        quick = StaticDecoder(model, caches[1], new_tokens=GATE_STEPS, compile=compile)
        for i in range(GATE_STEPS):
            token = ids[:, i : i + 1]
            pairs.append((quick.step(token).clone(), ordinary.step(token)))
        quick.finish()
    assert all(a.shape == b.shape for a, b in pairs)
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]
    return max(errors, key=lambda x: math.inf if math.isnan(x) else x)


def out_of_memory(problem):
    """Also where the end of a graph's capture failed because of it."""
    while problem is not None:
        if isinstance(problem, torch.OutOfMemoryError) or "out of memory" in str(problem):
            return True
        problem = problem.__context__
    return False


def number(text):
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def listed(text):
    return [number(part) for part in text.split(",")]


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="decode,prefill,capacity")
    parser.add_argument("--contexts", default="16k,32k,64k,128k")
    parser.add_argument("--batches", default="1,8", help="for decode; a prompt is read at batch 1")
    parser.add_argument("--capacity", help="contexts of the capacity part (default: those of --contexts)")
    parser.add_argument("--most", type=int, default=1024, help="largest batch that capacity tries")
    parser.add_argument("--methods", default="dense,a,b")
    parser.add_argument("--compile", action="store_true", help="layers through torch.compile where tokens are decoded")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="narrow layers, for a test")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU here; --device cpu --tiny --layers 1 shows that everything runs")
    names = args.methods.split(",")
    methods = {name: None if name == "dense" else Given(name) for name in names}
    about = {
        "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
        "longwave": longwave.__version__, "seed": args.seed, "layers": args.layers, "tiny": args.tiny,
        "command": " ".join(["python -m benchmarks.endtoend", *(sys.argv[1:] if argv is None else argv)]),
    }  # fmt: skip
    print(about["device"])
    small = build(2, args.tiny, args.device, args.seed)
    rows, right = [], {}
    for name in names:
        try:
            error = gate(small, None if name == "dense" else Given(name), args.seed, args.compile)
        except Exception as problem:
            rows.append({"part": "gate", "method": name, "error": described(problem)})
        else:
            rows.append({"part": "gate", "method": name, "relative_error": error})
            if error < NEAR:  # NaN fails
                right[name] = methods[name]
        print(rows[-1], flush=True)
    del small
    tidy()
    model = build(args.layers, args.tiny, args.device, args.seed)
    about["weight_bytes"] = sum(p.nbytes for p in model.parameters())
    cells = []
    for context in listed(args.contexts):
        if "decode" in args.parts:
            cells += [
                c
                for batch in listed(args.batches)
                for c in decode(model, right, batch, context, args.seed, args.compile)
            ]
        if "prefill" in args.parts:
            cells += prefill(model, right, 1, context, args.seed)
    if "capacity" in args.parts:
        for context in listed(args.capacity or args.contexts):
            cells += capacity(model, right, context, args.seed, args.most)
    for where, cell in cells:
        began = time.perf_counter()
        try:
            row = where | cell()
        except Exception as problem:
            row = where | {"error": described(problem)}
        tidy()  # after the exception, whose frames hold tensors
        row["took_s"] = time.perf_counter() - began
        rows.append(row)
        print(", ".join(f"{key} {round(x, 4) if isinstance(x, float) else x}" for key, x in row.items()), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(about | {"rows": rows}, indent=1))
    if len(right) < len(names):
        raise SystemExit("graph decoding failed, or differs from the ordinary path: such methods were not timed")


if __name__ == "__main__":
    main()
