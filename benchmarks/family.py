"""What every method costs in time and memory: reading a prompt, a step, bytes held and the peak, beside dense.

    python -m benchmarks.family [--device cuda] [--tokens 8000] [--budget 0.25] [--methods "dense;tova:budget=0.5"]

SmolLM2's configuration with random weights, and the shipped profiles' plans: times do not depend on what it says.
Methods are those of family.yaml at one budget, and those that have another one only; "transformers" is its DynamicCache
under its sdpa. Each method is taken with a dense cache of its own beside it, their steps in turn, since a machine's
speed drifts: figures are ratios within one run. Steps are those of `longwave.generate`, captured on a GPU, where a
method can; "plain" says that it cannot. A step that settles is rare and long, so the mean stands beside the median.

Peak: what reading took at most above what was there before, activations included; on a CPU of resident memory, where
Linux tells. --out is written after every method and taken up again. Before anything is timed dense's logits are
compared with transformers'.
"""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import longwave
from benchmarks.merging import SMOLLM2
from longwave.decode import StaticDecoder, supports
from longwave.evals.recipe import make_recipe
from longwave.evals.spec import parse_spec
from longwave.frame import cache_argument
from longwave.methods import get_method
from longwave.plan import axes
from longwave.plan.profile import Profile
from longwave.shape import CacheShape

WARM = 3  # steps that are not counted
PROFILES = Path(longwave.__file__).parent / "plan" / "profiles"


def at_budget(budget):
    """The lines of family.yaml with this budget, and those of methods that have none with it, by a store excepted."""
    lines = [(line, *parse_spec(line)) for line in make_recipe(Path(__file__).with_name("family.yaml")).methods]
    having = {name for _, name, options in lines if options.get("budget") == budget}
    return [line for line, name, options in lines if options.get("budget") == budget or name not in having]


def make(model, spec, ids):
    """An empty cache, bound without measuring a model of noise."""
    if spec == "transformers":
        return DynamicCache(config=model.config)
    name, options = parse_spec(spec)
    budget = options.pop("budget", None)
    method, shape = get_method(name, **options), CacheShape.of(model.config, model.dtype)
    profile = None
    if method.uses_profile:
        profile = Profile.load(PROFILES / ("smollm2-paper.json" if name == "fourier-paper" else "smollm2.json"))
    if name == "palu":
        method = replace(method, axes=axes.fit(model, [ids[:, :512]], method.together(shape)))
    return longwave.cache(model, method.bind(shape, profile, budget))


def synchronise(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def run(model, memory, ids):
    """Logits of a plain pass."""
    model.set_attn_implementation("sdpa" if isinstance(memory, DynamicCache) else "longwave")
    return model(ids, **cache_argument(model, memory), use_cache=True, logits_to_keep=1).logits[:, -1]


def timed(model, work):
    synchronise(model)
    began = time.perf_counter()
    work()
    synchronise(model)
    return time.perf_counter() - began


class Peak:
    """The most memory that was taken in here above what was there before, in MiB; None where nobody tells."""

    def __init__(self, device):
        self.cuda, self.mib = device.type == "cuda", None

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            self.before = resident("VmRSS")
        return self

    def __exit__(self, *error):
        if self.cuda:
            self.mib = (torch.cuda.max_memory_allocated() - self.before) / 2**20
        elif sys.platform == "linux":
            self.mib = (resident("VmHWM") - self.before) / 2**10


def resident(name):
    """A figure of this process, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def held(memory):
    if isinstance(memory, DynamicCache):
        return sum(x.nbytes for layer in memory.layers for x in (layer.keys, layer.values))
    return memory.report().nbytes


def stepper(model, memory, new, stack):
    """A function that feeds token ids [1], and how: "steps" or "plain"."""
    if isinstance(memory, DynamicCache) or supports(model, memory) is not None:
        return lambda token: run(model, memory, token[None]), "plain"
    decoder = stack.enter_context(StaticDecoder(model, memory, new_tokens=new))

    def step(token):
        model.set_attn_implementation("longwave")
        return decoder.step(token)

    return step, "steps"


def check(model, ids):
    """Dense must say what transformers says before it is what others are measured by."""
    ours, theirs = (run(model, make(model, spec, ids), ids).float() for spec in ("dense", "transformers"))
    gap, most = float((ours - theirs).abs().max()), 1e-3 if model.dtype == torch.float32 else 0.1
    if not gap < most * float(theirs.abs().max()):
        raise SystemExit(f"dense's logits differ from transformers' by {gap:g}: nothing is timed on wrong results")


def measure(model, spec, ids, steps):
    """A row of one method, dense in turn with it."""
    caches = {"dense": make(model, "dense", ids), "own": make(model, spec, ids)}
    read, peaks = {}, {}
    for who, memory in caches.items():
        with Peak(model.device) as peaks[who]:
            read[who] = timed(model, lambda memory=memory: run(model, memory, ids))
    own, size = caches["own"], {who: held(memory) for who, memory in caches.items()}
    times = {who: [] for who in caches}
    with torch.no_grad(), ExitStack() as stack:
        feed = {who: stepper(model, memory, steps + WARM, stack) for who, memory in caches.items()}
        for _ in range(steps + WARM):
            for who, (step, _) in feed.items():
                times[who].append(timed(model, lambda step=step: step(ids[0, :1])))
    times = {who: some[WARM:] for who, some in times.items()}
    median, mean = ({who: f(some) for who, some in times.items()} for f in (statistics.median, statistics.fmean))
    return {
        "method": spec,
        "words": str(getattr(own, "method", "DynamicCache, sdpa")),
        "decoder": feed["own"][1],
        "held_mib": round(size["own"] / 2**20, 2),
        "ratio": round(size["own"] / size["dense"], 4),
        "read_s": round(read["own"], 4),
        "read_of_dense": round(read["own"] / read["dense"], 4),
        "read_peak_mib": peaks["own"].mib,
        "dense_read_peak_mib": peaks["dense"].mib,
        "step_ms": round(median["own"] * 1e3, 4),
        "dense_step_ms": round(median["dense"] * 1e3, 4),
        "step_of_dense": round(median["own"] / median["dense"], 4),
        "mean_step_of_dense": round(mean["own"] / mean["dense"], 4),
    }


def show(rows):
    print(
        "| method | bytes ratio | held, MiB | step, of dense's | mean | step, ms | reading, of dense's "
        "| peak, MiB | dense's |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for r in sorted(rows, key=lambda r: r["step_of_dense"]):
        mark = " (plain)" if r["decoder"] == "plain" else ""
        peaks = (r["read_peak_mib"], r["dense_read_peak_mib"])
        print(
            f"| `{r['method']}`{mark} | {r['ratio']:.3f} | {r['held_mib']:.1f} | {r['step_of_dense']:.2f} | "
            f"{r['mean_step_of_dense']:.2f} | {r['step_ms']:.2f} | {r['read_of_dense']:.2f} | "
            + " | ".join("–" if peak is None else f"{peak:,.0f}" for peak in peaks)
            + " |"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--budget", type=float, default=0.25, help="of family.yaml's lines; of numbers as wide as here")
    parser.add_argument("--methods", help="specs, with ; between them, instead of family.yaml's")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--out", type=Path, help="out/family-DEVICE-TOKENS.json unless said")
    args = parser.parse_args(argv)
    out = args.out or Path(f"out/family-{args.device}-{args.tokens}.json")
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    about = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": args.tokens,
        "steps": args.steps,
        "torch": torch.__version__,
    }
    found = json.loads(out.read_text()) if out.exists() else {**about, "rows": []}
    if any(found[key] != value for key, value in about.items()):
        raise SystemExit(f"{out} was measured with other settings, which are not these: {about}. Name another --out")
    wanted = args.methods.split(";") if args.methods else ["transformers", *at_budget(args.budget)]
    wanted = [spec for spec in wanted if spec not in [row["method"] for row in found["rows"]]]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(args.device, dtype).eval()
    ids = torch.randint(49152, (1, args.tokens), generator=torch.Generator().manual_seed(0)).to(args.device)
    check(model, ids[:, :1000])
    out.parent.mkdir(parents=True, exist_ok=True)
    for spec in wanted:
        measure(model, spec, ids[:, :1000], WARM)  # first use of everything
        found["rows"].append(measure(model, spec, ids, args.steps))
        out.write_text(json.dumps(found, indent=1) + "\n")
        row = found["rows"][-1]
        print(f"{spec}: a step {row['step_of_dense']:.2f} of dense's", file=sys.stderr, flush=True)
    show(found["rows"])


if __name__ == "__main__":
    main()
