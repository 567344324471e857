"""What it takes to keep a prompt instead of reading it again: seconds and memory, beside reading it.

    python -m benchmarks.restoring --device cuda [--contexts 16k,64k] [--size 0.05] [--chunks 2048,16384] [--fit]
    python -m benchmarks.restoring --model smollm2-q4 --contexts 1k --chunks 512        (a real model, any device)
    python -m benchmarks.restoring --tiny --layers 2 --contexts 1k --chunks 256      (does it run at all)

Without --model: random weights in the shape of Llama-3.1-8B, as in benchmarks/measuring.py, which cost what trained
ones cost; SmolLM2's tokenizer and text of the package stand in for a prompt. All rounds go through all works, in turn;
the first one, when kernels are compiled and pinned memory is made, stands apart, and the figure is the median of the
others. Memory is the most over what was held before the work, of a GPU or else of the process; the prompt's own cache
is among what was held. Files were just written, so they are in the page cache.

--fit also times the codec's fit, as it is by default. Without it a codec of random weights is fitted on little text:
what it would lose means nothing anyway. Before anything is timed: what is restored is compared with what was read, and
on a GPU the bytes of a few segments with those that the host's encoder makes of the same numbers.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import longwave
from benchmarks.endtoend import build
from benchmarks.family import Peak
from longwave.cli.console import show_table
from longwave.codec import Effort, codec_for, fit
from longwave.codec.coder import SINKS, WINDOW
from longwave.frame import cache_argument
from longwave.models import load_tokenizer, locate
from longwave.plan.automatic import own_texts
from longwave.saved import read_coded
from longwave.saved.coded import encode, segments

COMPARED = 3  # segments
FAR = 0.9  # relative error of K and V that are restored


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device, work):
    """Seconds until the device is done, what was made is held until then."""
    wait(device)
    began = time.perf_counter()
    made = work()
    wait(device)
    seconds = time.perf_counter() - began
    del made
    return seconds


def rounds(device, works, repeats):
    """name -> first, seconds (median of the others), gigabytes; works are done in their order in each round."""
    found = {name: {"first": 0.0, "gigabytes": None, "times": []} for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            if number:
                found[name]["times"].append(timed(device, work))
                continue
            wait(device)
            with Peak(device) as peak:
                found[name]["first"] = timed(device, work)
            found[name]["gigabytes"] = None if peak.mib is None else peak.mib * 2**20 / 1e9
    for one in found.values():
        one["seconds"] = statistics.median(one["times"])
    return found


def loaded(args):
    device = torch.device(args.device)
    if args.model:
        return longwave.load(args.model, dtype=args.dtype, device=device)
    model, tokenizer = build(args.layers, args.tiny, device), load_tokenizer(locate("smollm2-q4"))
    if args.tiny:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer


def codec_of(model, tokenizer, args):
    """(codec, what its fit took, where it was asked for)."""
    if args.fit:
        made = []
        wait(model.device)
        with Peak(model.device) as peak:
            seconds = timed(model.device, lambda: made.append(fit(model, tokenizer)))
        return made[0], {"seconds": seconds, "gigabytes": None if peak.mib is None else peak.mib * 2**20 / 1e9}
    if args.model:
        return codec_for(model, tokenizer), None
    little = replace(Effort.of(model), windows=4, probed=1, probes=1, apart=2)
    return fit(model, tokenizer, effort=replace(little, channels=args.channels or little.channels)), None


def prompt_of(tokenizer, tokens, device):
    """Text of the package, as often as it takes."""
    ids = tokenizer("\n\n".join(own_texts()), return_tensors="pt", verbose=False).input_ids
    return ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens].to(device)


def error(one, other):
    """Relative, of K and V of all layers."""
    off = size = 0.0
    for x, y in zip(one.memory_layers(), other.memory_layers(), strict=True):
        for a, b in zip(x.materialize(), y.materialize(), strict=True):
            off, size = off + float((a.float() - b.float()).square().sum()), size + float(b.float().square().sum())
    return (off / size) ** 0.5


def check_bytes(codec, args, cache, ids, coder):
    """The device's bytes are the host's, of the same numbers: products are of the device in both."""
    before = os.environ.get("LONGWAVE_KERNELS")
    os.environ["LONGWAVE_KERNELS"] = "reference"
    try:
        host = codec.at(args.size, device=args.device)
    finally:
        os.environ.pop("LONGWAVE_KERNELS")
        if before is not None:
            os.environ["LONGWAVE_KERNELS"] = before
    layers = list(cache.memory_layers())
    for *_, start, stop in list(segments(layers[0].rows, coder.tokens))[:COMPARED]:
        spans = [layer.span(0, start, stop) for layer in layers]
        k, v = (torch.stack([x.transpose(0, 1) for x in side]) for side in zip(*spans, strict=True))
        given = {"ids": ids[0, start:stop].cpu(), "start": start}
        if coder.encode(k, v, **given) != host.encode(k, v, **given):
            sys.exit(f"tokens {start} to {stop - 1}: the device writes other bytes than the host; nothing is timed")


@torch.no_grad()
def measure(model, tokenizer, codec, args, tokens, folder):
    """Rows of one context."""
    device, coder = torch.device(args.device), codec.at(args.size, device=args.device)
    ids = prompt_of(tokenizer, tokens, device)

    def read():
        cache = longwave.cache(model, "dense")
        model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        return cache

    cache, coded, beside, exact = read(), folder / "coded.lw", folder / "beside.lw", folder / "exact.lw"
    sizes = {"coded": longwave.save(cache, ids, coded, size=args.size, coder=coder)}
    if coder.together > 1:
        check_bytes(codec, args, cache, ids, coder)
    away, off = error(longwave.restore(model, coded, coder=coder)[0], cache), 0.0
    if not args.coded:
        sizes["exact"] = longwave.save(cache, ids, exact, exact=True)
        off = error(longwave.restore(model, exact)[0], cache)
    if not away < FAR or off:
        sys.exit(f"what is restored is not what was read (coded: relative error {away:.3f}); nothing is timed")
    middle = max(0, tokens - SINKS - WINDOW)
    room = coder.typical(1) * middle
    works = {"reading": read}
    for chunk in args.chunks:
        works[f"reading coded, chunks of {chunk:,}"] = lambda chunk=chunk: read_coded(
            model, ids, beside, size=args.size, chunk=chunk, coder=coder
        )
    works |= {
        "saving coded": lambda: longwave.save(cache, ids, coded, size=args.size, coder=coder),
        "coding alone": lambda: encode(cache, ids.cpu(), coder, room),
        "restoring coded": lambda: longwave.restore(model, coded, coder=coder),
    }
    if not args.coded:
        works["saving exact"] = lambda: longwave.save(cache, ids, exact, exact=True)
        works["restoring exact"] = lambda: longwave.restore(model, exact)
    works |= {
        "parking": cache.park,
        "waking": cache.wake,
    }
    found = rounds(device, works, args.repeats)
    base = found["reading"]["seconds"]
    held = {"tokens": tokens, "held_bytes": cache.nbytes, "file_bytes": sizes, "error": away}
    return [{"work": name, **held, **one, "ratio": one["seconds"] / base} for name, one in found.items()]


def whole(text):
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of random weights")
    parser.add_argument("--dtype", default="bfloat16", help="of --model")
    parser.add_argument("--tiny", action="store_true", help="random weights of few channels")
    parser.add_argument("--layers", type=int, default=32, help="of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contexts", default="16k,64k")
    parser.add_argument("--chunks", default="2048", help="tokens of a pass where it is coded while it is read")
    parser.add_argument("--size", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--coded", action="store_true", help="no exact files, which take as much as the cache")
    parser.add_argument("--channels", type=int, help="the most that one basis joins, of random weights without --fit")
    parser.add_argument("--folder", help="where files are written, for a while")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.chunks = [whole(text) for text in args.chunks.split(",")]
    model, tokenizer = loaded(args)
    codec, fitted = codec_of(model, tokenizer, args)
    if fitted:
        print(f"fit: {fitted}", flush=True)
    rows = []
    for tokens in map(whole, args.contexts.split(",")):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            some = measure(model, tokenizer, codec, args, tokens, Path(folder))
        table = [
            [
                row["work"], f"{row['seconds']:.3f}", f"{row['ratio']:.3f}", f"{row['first']:.3f}",
                "" if row["gigabytes"] is None else f"{row['gigabytes']:.2f}",
            ]
            for row in some
        ]  # fmt: skip
        one = some[0]
        sizes = ", ".join(f"{name} {nbytes / 1e6:.1f} MB" for name, nbytes in one["file_bytes"].items())
        print(f"{tokens:,} tokens, {one['held_bytes'] / 1e6:.1f} MB held; files: {sizes}; error {one['error']:.3f}")
        show_table("restoring", ["", "s", "of reading", "first, s", "GB over"], table)
        rows += some
        if args.out:
            about = {key: str(value) for key, value in vars(args).items()} | {"torch": torch.__version__}
            about["device"] = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"about": about, "fit": fitted, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
