"""What a cache saves a masked-diffusion model: tokens a second and bytes held, by what is kept around a block.

    python -m benchmarks.diffusion_speed --device cuda --load FOLDER --out FILE      # what diffusion_pair --save wrote
    python -m benchmarks.diffusion_speed --device cuda --shape 8b [--layers 32] --out FILE           # random weights
    python -m benchmarks.diffusion_speed --shape 8b --tiny --prompts 400 --out FILE          # does it run at all

--shape 8b is LLaDA-8B's configuration in bfloat16, asked with random tokens. The pair's model reads text of the
package, its rotary base multiplied by what the law of distances of both signs says for the prompt's length. fourier's
plan is the one that needs no measurement: its bytes are the budget's, its quality is not a measured plan's.

For each prompt length every case first reads a block twice, whole and again from what it keeps; `error` is how far the
logits of the second reading are from those of a pass over everything, relative. A cache that keeps all and is far off
is not timed. Then a warm-up of four steps a block, and rounds that go through all cases in turn, until there are
--repeats or the length has had its --seconds; the figure is the median. Bytes held are those after the last block;
memory is the most over what was held before, which is the weights.

FILE gets a line of JSON for every answer as it is there, and one a case when its length is done. A case that fails, for
want of memory or else, is recorded with its error, and the others go on. Random weights are hardly sure of any token,
so a threshold keeps one a pass there: passes are counted, and those rows say so.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import longwave
from benchmarks import diffusion_pair
from benchmarks.endtoend import random_llama
from benchmarks.family import Peak
from benchmarks.restoring import prompt_of, wait, whole
from longwave import diffusion
from longwave.cli.console import show_table
from longwave.diffusion.reading import Reader
from longwave.models import load_tokenizer, locate
from longwave.rotary import ntk_factor

DTYPE = torch.bfloat16
LLADA = dict(
    hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=32, head_dim=128,
    vocab_size=126464, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
MASK = 126336
TINY = dict(hidden_size=256, intermediate_size=512, num_attention_heads=2, num_key_value_heads=2, vocab_size=1024)
WARM = 4  # steps of a block, so that all kinds of passes are among them
FAR = 0.2  # relative error of logits that are read exactly in 16 bits, 32 layers
UNSURE = "random weights are hardly sure of any token: a threshold keeps one a pass"


@dataclass
class Case:
    """A way to answer. make: an empty cache, or None. exact: whether a block read again right away is what it was."""

    make: Callable[[], Any]
    how: dict[str, Any] = field(default_factory=dict)
    exact: bool = False


def cases(model, new, block):
    def cached(method, budget=None):
        return lambda: longwave.cache(model, method, budget)

    shifted = bool(getattr(model and model.config, "logit_shift", False))
    sparse = longwave.SparseDLLM(window=block + shifted)  # the token before a block is read again with it
    # entropy, the default there, gives no probability to hold a threshold against
    sure = {"sampler": diffusion.Dream(algorithm="maskgit_plus")} if shifted else {}
    fourier = longwave.Fourier(plan="safe", window=max(256, new))  # all that is read again lies in the window
    return {
        "no cache": Case(lambda: None),
        "prefix": Case(cached("dense"), {"keep": "prefix"}, True),
        "dual": Case(cached("dense"), {"keep": "dual"}, True),
        "dual, threshold 0.9": Case(cached("dense"), {"keep": "dual", "threshold": 0.9, **sure}, True),
        "sparse_dllm 0.5": Case(cached(sparse, 0.5), {"keep": "dual", "delay": 1}),
        "fourier 0.25, prefix": Case(cached(fourier, 0.25), {"keep": "prefix"}),
    }


NAMES = tuple(cases(None, 1, 1))


# models and prompts


def random_model(layers, tiny, device, seed):
    given = LLADA | (TINY if tiny else {})
    mask = min(MASK, given["vocab_size"] - 1)
    config = LlamaConfig(**given, num_hidden_layers=layers, is_causal=False, mask_token_id=mask, logit_shift=False)
    return random_llama(config, device, seed)


class Random:
    """Random weights, asked with random tokens."""

    note = UNSURE

    def __init__(self, args):
        self.model = random_model(args.layers, args.tiny, args.device, args.seed)
        self.words = f"LLaDA-8B's shape{', few channels' if args.tiny else ''}, {args.layers} layers, random weights"
        self.seed = args.seed

    def at(self, tokens, new):
        """(model, prompt int64 [1, tokens], what the rotary base is multiplied by)."""
        generator = torch.Generator().manual_seed(self.seed + tokens)
        ids = torch.randint(self.model.config.mask_token_id, (1, tokens), generator=generator)
        return self.model, ids.to(self.model.device), 1


class Pair:
    """The masked-diffusion model of the pair, asked with text."""

    note = None

    def __init__(self, args):
        self.size = diffusion_pair.TINY if args.tiny else diffusion_pair.Size()
        self.tokenizer = load_tokenizer(locate("smollm2-q4"))
        model = diffusion_pair.untrained("diffusion", self.tokenizer, self.size).to(args.device)
        diffusion_pair.load(model, "diffusion", args.load)
        self.model = diffusion_pair.weights_in(model, DTYPE)
        self.words = f"the pair's masked-diffusion model of {args.load}"

    def at(self, tokens, new):
        size, factor = self.size, 1
        if tokens + new > size.context:
            factor = ntk_factor(diffusion_pair.BASE, size.channels, size.context, tokens + new, both_signs=True)
        ids = prompt_of(self.tokenizer, tokens, self.model.device)
        return diffusion_pair.with_base(self.model, factor), ids, factor


# measuring


@torch.no_grad()
def error_of(model, prompt, new, block, case):
    """Relative, of the logits of the first block read from what was kept, over a pass over everything."""
    cache = case.make()
    if cache is None:
        return 0.0
    config = model.config
    text = torch.cat([prompt, prompt.new_full((1, new), config.mask_token_id)], 1)
    real = torch.ones_like(text, dtype=torch.bool)
    start = prompt.shape[1]
    reader = Reader(model, real, bool(config.logit_shift), cache, case.how["keep"])
    expected = reader.plain(text, start, start + block).float()
    reader.whole(text, start, start + block)
    got = reader.again(text, start, start + block).float()
    error = float((got - expected).norm() / expected.norm())
    if case.exact and not error < FAR:
        raise RuntimeError(f"a cache that keeps all is off by {error:.3f} of the logits: it is not timed")
    return error


def answer(model, prompt, args, case, warm=False):
    """(seconds, passes of each block, cache) of one answer, and what memory it took."""
    cache = case.make()
    how = dict(case.how)
    if warm:
        how.pop("threshold", None)
    steps = min(WARM, args.block) * (args.new // args.block) if warm else args.steps
    if "threshold" not in how:
        how["steps"] = steps
    wait(model.device)
    with Peak(model.device) as peak:
        began = time.perf_counter()
        made = diffusion.blocks(
            model, prompt, max_new_tokens=args.new, block_length=args.block, cache=cache, seed=args.seed, stop_ids=(),
            **how,
        )  # fmt: skip
        passes = [block.passes for block in made]
        wait(model.device)
        seconds = time.perf_counter() - began
    return seconds, passes, cache, None if peak.mib is None else round(peak.mib * 2**20)


def tidy(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(of, args, tokens, write):
    """Rows of the cases at one length."""
    model, prompt, factor = of.at(tokens, args.new)
    wanted = {name: case for name, case in cases(model, args.new, args.block).items() if name in (args.only or NAMES)}
    found: dict[str, dict[str, Any]] = {name: {"times": []} for name in wanted}

    def attempt(name, work):
        """Whether work on a case went well; a case that failed is not asked again."""
        if "failed" in found[name]:
            return False
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            found[name]["failed"] = f"{type(error).__name__}: {error}"[:300]
            write(part="failed", prompt=tokens, case=name, error=found[name]["failed"])
        tidy(model.device)
        return "failed" not in found[name]

    def prepare(name):
        found[name]["error"] = error_of(model, prompt, args.new, args.block, wanted[name])
        answer(model, prompt, args, wanted[name], warm=True)

    def once(name):
        seconds, passes, cache, peak = answer(model, prompt, args, wanted[name])
        one = found[name]
        report = None if cache is None else cache.report()
        one["times"].append(seconds)
        one["passes"], one["peak_bytes"] = passes, peak
        one["held_bytes"] = 0 if report is None else report.nbytes
        one["method"] = None if report is None else report.method
        one["answers"] = None if report is None else list(report.answers)
        about = {"prompt": tokens, "case": name, "round": len(one["times"])}
        about |= {"seconds": seconds, "passes": sum(passes), "held_bytes": one["held_bytes"], "peak_bytes": peak}
        write(part="answer", **about)
        print(f"{tokens:,}, {name}: {args.new / seconds:.2f} tokens/s, {sum(passes)} passes", flush=True)

    for name in wanted:
        attempt(name, lambda name=name: prepare(name))
    began = time.perf_counter()
    for number in range(args.repeats):
        if number and time.perf_counter() - began > args.seconds:
            break
        for name in wanted:
            attempt(name, lambda name=name: once(name))
    return [summary(of, args, tokens, factor, name, wanted[name], one) for name, one in found.items()]


def summary(of, args, tokens, factor, name, case, one):
    row = {"prompt": tokens, "case": name, "new": args.new, "block_length": args.block, "factor": factor}
    row["steps"] = None if "threshold" in case.how else args.steps or args.new
    row |= {name: value if isinstance(value, int | float | str) else str(value) for name, value in case.how.items()}
    if "failed" in one:
        return row | {"failed": one["failed"]}
    seconds = statistics.median(one["times"])
    row |= {"tokens_a_second": args.new / seconds, "seconds": seconds, "times": one["times"]}
    row |= {"passes": sum(one["passes"]), "seconds_a_pass": seconds / sum(one["passes"])}
    row |= {key: one[key] for key in ("held_bytes", "peak_bytes", "error", "method", "answers")}
    return row | ({"note": of.note} if of.note and "threshold" in case.how else {})


def table(rows):
    base = next((row["tokens_a_second"] for row in rows if row["case"] == NAMES[0] and "failed" not in row), None)
    for row in rows:
        if "failed" in row:
            yield [row["case"], row["failed"][:60], *[""] * 6]
            continue
        times = "" if base is None else f"{row['tokens_a_second'] / base:.2f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        yield [
            row["case"], f"{row['tokens_a_second']:.2f}", times, row["passes"], f"{row['seconds_a_pass'] * 1e3:.1f}",
            f"{row['held_bytes'] / 1e6:,.1f}", peak, f"{row['error']:.3f}",
        ]  # fmt: skip


COLUMNS = ["", "tokens/s", "of no cache", "passes", "ms a pass", "MB held", "peak MB", "error"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--load", type=Path, metavar="FOLDER", help="what benchmarks.diffusion_pair --save wrote")
    which.add_argument("--shape", choices=("8b",), help="random weights")
    parser.add_argument("--layers", type=int, default=32, help="of random weights")
    parser.add_argument("--tiny", action="store_true", help="few channels, to see that all of it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", default="4k,16k", help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--block", type=int, default=32, help="tokens of a block")
    parser.add_argument("--steps", type=int, help="of an answer; as many as tokens")
    parser.add_argument("--only", choices=NAMES, action="append", metavar="CASE", help=f"of {NAMES}; repeats")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=150, help="of a length, after which no round of it begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.new % args.block or (args.steps or args.new) % (args.new // args.block):
        parser.error("--new is a whole number of blocks, and --steps one of steps a block")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("")

    def write(**row):
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    of = Pair(args) if args.load else Random(args)
    model = of.model
    about = {"command": sys.argv, "model": of.words, "parameters": model.num_parameters(), "dtype": str(model.dtype)}
    about |= {"seed": args.seed, "torch": torch.__version__, "longwave": longwave.__version__}
    about["device"] = torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type
    write(part="about", **about)
    print(json.dumps(about), flush=True)
    for tokens in map(whole, args.prompts.split(",")):
        rows = measure(of, args, tokens, write)
        for row in rows:
            write(part="speed", **row)
        title = f"{tokens:,} tokens, {args.new} new in blocks of {args.block}; {of.words}"
        print(title)
        show_table(title, COLUMNS, list(table(rows)))
        for note in {row["note"] for row in rows if "note" in row}:
            print(note)


if __name__ == "__main__":
    main()
