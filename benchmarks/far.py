"""What methods that read far cost at lengths beyond the trained one: reading, a token, and where the bytes lie.

    python -m benchmarks.far [--contexts 32k,128k] [--methods "transformers;longheads"] [--limit 100] [--text pg19]
    python -m benchmarks.far --kernel [--contexts 16k,64k,128k]

SmolLM2, in float16 on a GPU, and random tokens or a text's, which begins again where it is too short. They are read in
passes, then tokens are fed one at a time: by plain calls of the model, and in steps, captured on a GPU, where a method
can. Plain figures are over those of transformers' DynamicCache and sdpa in the same run ("transformers", the first of
--methods then), those of steps over `dense`'s. The first use of a method is not timed.

A row is printed as JSON once it is there, and --out is taken up again. What fails, or takes longer than --limit seconds
to read, has a row that says so: how far it came, and the ratio as far as that. Before anything is timed dense's logits
are compared with transformers'. --tiny takes a model of two narrow layers.

--kernel: longcache's choice of tokens alone, see benchmarks/choosing.py.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longwave
from benchmarks import choosing, family
from longwave.cli.console import show_table
from longwave.decode import StaticDecoder, supports
from longwave.evals import data
from longwave.frame import LongCache

LOOKS = "longcache:spans=4,window=640,chunk=256,look=256,before=32,scan=False"  # steps that read what a question found

METHODS = [
    "transformers",
    "dense",
    "streaming:tokens=2048,positions='slots'",
    "longcache",
    LOOKS,
    "infllm",
    "actqkv",
    "lm_infinite",
    "self_extend:group=32",  # 8 groups end at 58,368 of 8,192 trained positions
    "dual_chunk",
    "longcache:store=kivi,budget=0.25",
    "longcache:store=fourier,budget=0.25",
    f"{LOOKS},store='fourier',budget=0.25",
    "longcache:host=True",
    "infllm:host=True",
    "longheads",
]
TINY = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
FIRST = 3 * 4096  # tokens that warm a method: beyond the scope of each
WARM = 3  # tokens that are not counted
QUESTION = 16  # tokens behind the context, in one pass


def numbers(text):
    """ "32k,1000" -> [32768, 1000]"""
    return [int(part[:-1]) * 1024 if part.endswith("k") else int(part) for part in text.split(",")]


def load(args):
    """The model, and as many token ids [1, n] as the longest context and the tokens behind it take."""
    most = max(args.contexts) + QUESTION + 2 * (args.steps + WARM)
    draw = torch.Generator().manual_seed(0)
    if args.tiny:
        torch.manual_seed(0)
        config = LlamaConfig(**TINY, vocab_size=512, num_hidden_layers=2, max_position_embeddings=8192)
        return LlamaForCausalLM(config).eval().to(args.device), torch.randint(512, (1, most), generator=draw)
    dtype = "float16" if args.device == "cuda" else "float32"
    model, tokenizer = longwave.load("smollm2-q4", device=args.device, dtype=dtype)
    if args.text is None:
        return model, torch.randint(model.config.vocab_size, (1, most), generator=draw)
    text = "\n\n".join(data.texts(args.text, data.data_folder()).values())
    ids = tokenizer(text[: 8 * most], add_special_tokens=False, verbose=False, return_tensors="pt").input_ids
    return model, ids.repeat(1, -(-most // ids.shape[1]))[:, :most]


def read(model, memory, ids, size, limit):
    """Seconds of each pass, as many as begin within the limit."""
    passes = []
    for part in ids.split(size, 1):
        if sum(passes) > limit:
            break
        passes.append(family.timed(model, lambda part=part: family.run(model, memory, part)))
    return passes


def tokens(model, feed, ids, limit):
    """Median seconds of a token; of one at least, and of as many as begin within the limit."""
    taken = []
    for token in ids[0].split(1):
        taken.append(family.timed(model, lambda token=token: feed(token)))
        if len(taken) > WARM and sum(taken) > limit:
            break
    return statistics.median(taken[WARM:])


def where(memory):
    """Bytes by where they lie."""
    if not isinstance(memory, LongCache):
        return {"device_bytes": family.held(memory), "host_bytes": 0, "mapped_bytes": 0}
    report = memory.report()
    return {"device_bytes": report.device, "host_bytes": report.host, "mapped_bytes": report.mapped}


@torch.no_grad()
def measure(model, spec, ids, args, row):
    """Fill the row of a method with what is known of it, one after the other. ids: a context and the tokens behind."""
    steps = args.steps + WARM
    memory = family.make(model, spec, ids)
    row["words"] = str(memory.method) if isinstance(memory, LongCache) else "DynamicCache, sdpa"
    context = ids[:, : row["context"]]
    with family.Peak(model.device) as peak:
        row["passes"] = read(model, memory, context, args.chunk, args.limit)
    row["peak_mib"], row["read_s"] = peak.mib, sum(row["passes"])
    row["read_tokens"] = min(len(row["passes"]) * args.chunk, context.shape[1])
    row |= where(memory)
    if row["read_tokens"] < context.shape[1]:
        raise TimeoutError(f"{row['read_tokens']:,} tokens were read in {row['read_s']:.0f} s")
    behind = ids[:, row["context"] :]
    asked, behind = behind.split([QUESTION, behind.shape[1] - QUESTION], 1)
    row["question_s"] = family.timed(model, lambda: family.run(model, memory, asked))
    row["token_s"] = tokens(model, lambda token: family.run(model, memory, token[None]), behind[:, :steps], args.limit)
    why = supports(model, memory)
    if why is None:
        with StaticDecoder(model, memory, new_tokens=steps) as decoder:
            row["captured_s"] = tokens(model, decoder.step, behind[:, steps:], args.limit)
    else:
        row["plain"] = why


def ratios(row, rows):
    """Of a row, over those of the same context; None where one of the two is not known."""
    beside = {other["method"]: other for other in rows if other["context"] == row["context"]}
    stock, dense = (beside.get(name, {}) for name in ("transformers", "dense"))

    def over(own, other):
        return own / other if own and other else None

    some = stock.get("passes", [])[: len(row.get("passes", []))]
    return {
        "read_of_dense": over(row.get("read_s"), sum(some)) if len(some) == len(row.get("passes", [])) else None,
        "token_of_dense": over(row.get("token_s"), stock.get("token_s")),
        "captured_of_dense": over(row.get("captured_s"), dense.get("captured_s")),
        "device_of_dense": over(row.get("device_bytes"), stock.get("device_bytes")) if row.get("token_s") else None,
    }


def taken(spec, context, model, ids, args, warm):
    """A row, whatever happens."""
    row = {"method": spec, "context": context}

    def work():
        if spec not in warm:
            memory = family.make(model, spec, ids)
            with torch.no_grad():
                read(model, memory, ids[:, : min(args.first, context)], args.chunk, args.limit)
                family.run(model, memory, ids[:, -QUESTION:])
                family.run(model, memory, ids[:, -1:])
            del memory
            warm.add(spec)
        measure(model, spec, ids, args, row)

    return choosing.whatever(row, work, args.device)


def show(rows):
    def written(x, form):
        return "" if x is None else format(x, form)

    columns = [
        "method",
        "reading, s",
        "of dense's",
        "a question, ms",
        "a token, ms",
        "of dense's",
        "captured, ms",
        "of dense's",
    ]
    columns += ["device, MiB", "of dense's", "host, MiB", "peak, MiB", ""]
    for context in dict.fromkeys(row["context"] for row in rows):
        table = []
        for row in (row for row in rows if row["context"] == context):
            more = ratios(row, rows)
            mib = {name: row.get(f"{name}_bytes", 0) / 2**20 for name in ("device", "host", "mapped")}
            ms = {k: row[k] * 1e3 if k in row else None for k in ("question_s", "token_s", "captured_s")}
            table.append(
                [
                    row["method"],
                    written(row.get("read_s"), ".2f"),
                    written(more["read_of_dense"], ".2f"),
                    written(ms["question_s"], ".1f"),
                    written(ms["token_s"], ".2f"),
                    written(more["token_of_dense"], ".2f"),
                    written(ms["captured_s"], ".2f"),
                    written(more["captured_of_dense"], ".2f"),
                    f"{mib['device']:,.0f}",
                    written(more["device_of_dense"], ".3f"),
                    f"{mib['host'] + mib['mapped']:,.0f}",
                    written(row.get("peak_mib"), ",.0f"),
                    row.get("failed", ""),
                ]
            )
        show_table(f"{context:,} tokens", columns, table)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", type=numbers, help="32k,128k; with --kernel 16k,64k,128k")
    parser.add_argument("--methods", help="specs, with ; between them, instead of all")
    parser.add_argument("--pass", type=int, default=4096, dest="chunk", help="tokens that the model is given at once")
    parser.add_argument("--first", type=int, default=FIRST, help="tokens that a method is warmed with")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=float, default=100, help="seconds of reading, a pass more where it has begun")
    parser.add_argument("--text", help="what evaluations can score, instead of random tokens")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--kernel", action="store_true")
    parser.add_argument(
        "--stretch", type=int, default=choosing.STRETCH, help="queries that choose together, of --kernel"
    )
    parser.add_argument("--out", type=Path, help="out/far-DEVICE.json, or out/far-kernel-DEVICE.json, unless said")
    args = parser.parse_args(argv)
    args.contexts = args.contexts or numbers("16k,64k,128k" if args.kernel else "32k,128k")
    out = args.out or Path(f"out/far-{'kernel-' if args.kernel else ''}{args.device}.json")
    about = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "longwave": longwave.__version__,
        **{name: getattr(args, name) for name in ("chunk", "first", "steps", "limit", "text", "tiny", "kernel")},
    }
    found = {**about, "rows": []}
    if out.exists() and not args.kernel:
        found = json.loads(out.read_text())
        if any(found.get(key) != value for key, value in about.items()):
            raise SystemExit(
                f"{out} was measured with other settings, which are not these: {about}. Name another --out"
            )
    out.parent.mkdir(parents=True, exist_ok=True)

    def keep(row):
        found["rows"].append(row)
        out.write_text(json.dumps(found, indent=1) + "\n")
        said = {key: value for key, value in row.items() if key != "passes"}
        print(json.dumps(said | ({} if args.kernel else ratios(row, found["rows"]))), flush=True)

    if args.kernel:
        for row in choosing.rows(args.contexts, args.stretch, args.device):
            keep(row)
        choosing.show(found["rows"])
        return
    model, ids = load(args)
    ids = ids.to(args.device)
    family.check(model, ids[:, :1000])
    wanted, warm = args.methods.split(";") if args.methods else METHODS, set()
    there = {(row["method"], row["context"]) for row in found["rows"]}
    began = time.perf_counter()
    for context in args.contexts:
        for spec in wanted:
            if (spec, context) not in there:
                keep(taken(spec, context, model, ids[:, : context + QUESTION + 2 * (args.steps + WARM)], args, warm))
    print(f"{time.perf_counter() - began:.0f} s in all")
    show(found["rows"])


if __name__ == "__main__":
    main()
