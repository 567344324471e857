"""A long text is read once, in chunks, and asked for what stands at ten depths of it: answers, bytes and times.

    python -m benchmarks.million --host DIR [--tokens 1000000] [--model smollm2-q4] [--depths 10] [--out FILE]
    python -m benchmarks.million --host DIR --tokens 20000 --model tiny --text pydoc     (does it run at all)

longcache, whose far tokens are read at positions that the model knows; `--method infllm --option blocks=16` or another
one that takes host=. The text is of books, and again from its beginning where it is too short. Its numbers differ, and
each has a city's name; a question is asked after all was read, and taken back. "tiny" has two narrow layers of random
weights, which find nothing; the tokenizer is SmolLM2's either way.

DIR takes two numbers of 16 bits a channel, head and layer and token: 23 kB of SmolLM2, 23 GB for a million tokens.
"memory" is host memory, for a model on a GPU (--device cuda); without --host keys and values lie on the device. Before
anything is timed three scopes of text have to give the same logits from there as from the device.
"""

import argparse
import json
import random
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longwave
from longwave.cli.common import parse_options
from longwave.cli.console import show_table
from longwave.evals import data
from longwave.evals.tasks.needle import sentence_ends
from longwave.frame import cache_argument
from longwave.methods import get_method
from longwave.models import load_tokenizer, locate

CITIES = ["Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Havana", "Warsaw", "Sydney", "Toronto", "Nairobi"]
CITIES += ["Vienna", "Boston", "Delhi", "Geneva", "Prague", "Quito", "Riga", "Seoul", "Tunis"]
NEEDLE = " The secret number of {city} is {key}. Remember it. {key} is the secret number of {city}."
QUESTION = "\n\nWhat is the secret number of {city}? The secret number of {city} is"
NEW = 8  # tokens of an answer
OPTIONS = {
    "longcache": {"window": 640, "spans": 4, "chunk": 256, "look": 64, "before": 32, "scan": False}
}  # time grows with the text


def load(name, device):
    if name != "tiny":
        return longwave.load(name, device=device)
    tokenizer = load_tokenizer(locate("smollm2-q4"))
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=8192)
    return LlamaForCausalLM(config).eval().to(device, torch.bfloat16), tokenizer


def written(tokenizer, text, tokens, depths, seed):
    """So many tokens with a number at each depth, and (city, number) of each."""
    draw = random.Random(seed)
    hidden = [(city, f"{draw.randrange(10000, 100000)}") for city in CITIES[:depths]]
    needles = [tokenizer(NEEDLE.format(city=c, key=k), add_special_tokens=False).input_ids for c, k in hidden]
    room = tokens - sum(map(len, needles))
    hay = tokenizer(text[: 8 * room], add_special_tokens=False, verbose=False).input_ids
    whole = (hay * -(-room // len(hay)))[:room]
    ends, out, last = sentence_ends(tokenizer, hay), [], 0
    for number, needle in enumerate(needles):
        cut = room * number // max(1, depths - 1)
        while last < cut < room and whole[cut - 1] not in ends:
            cut -= 1
        out += [*whole[last:cut], *needle]
        last = cut
    return torch.tensor([out + whole[last:]]), hidden, room / len(hay)


def own_memory():
    """Bytes of this process that no file stands behind: what a machine has to have; 0 where nobody says."""
    try:
        said = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(re.search(r"RssAnon:\s+(\d+) kB", said)[1]) * 1024


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def step(model, cache, ids):
    logits = model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits[:, -1]
    wait(model.device)
    return logits


def check(model, method, ids, chunk):
    """What lies elsewhere is read as what lies on the device."""
    parts = ids[:, : 3 * method.plain].to(model.device).split(chunk, 1)
    caches = [longwave.cache(model, replace(method, host=host)) for host in (False, method.host)]
    for part in parts:
        one, other = (step(model, cache, part) for cache in caches)
        torch.testing.assert_close(one, other)


def ask(model, tokenizer, cache, city):
    """What the model answers, and seconds of each step; the cache is as it was."""
    asked = tokenizer(QUESTION.format(city=city), add_special_tokens=False, return_tensors="pt").input_ids
    token, said, seconds = asked.to(model.device), [], []
    for _ in range(NEW):
        began = time.perf_counter()
        token = step(model, cache, token).argmax(-1, keepdim=True)
        seconds.append(time.perf_counter() - began)
        said.append(int(token))
    cache.crop(-(asked.shape[1] + NEW - 1))
    return tokenizer.decode(said), seconds[1:]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--model", default="smollm2-q4", help="tiny, or what longwave.load takes")
    parser.add_argument("--depths", type=int, default=10, help=f"numbers that are hidden, 1 to {len(CITIES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", help='a directory, or "memory"')
    parser.add_argument("--method", default="longcache")
    parser.add_argument("--option", action="append", help="name=value, of the method")
    parser.add_argument("--text", default="pg19", help="what evaluations can score: pg19, pydoc, a file or a folder")
    parser.add_argument("--pass", type=int, default=4096, dest="chunk", help="tokens that the model is given at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not 1 <= args.depths <= len(CITIES):
        parser.error(f"--depths is a number from 1 to {len(CITIES)}, got {args.depths}")
    model, tokenizer = load(args.model, args.device)
    host = {None: False, "memory": True}.get(args.host, args.host)
    method = get_method(args.method, host=host, **OPTIONS.get(args.method, {}) | parse_options(args.option))
    text = "\n\n".join(data.texts(args.text, data.data_folder()).values())
    ids, hidden, times = written(tokenizer, text, args.tokens, args.depths, args.seed)
    if host:
        check(model, method, ids, args.chunk)
    cache = longwave.cache(model, method)
    print(f"{cache.method}; {args.tokens:,} tokens, the text {times:.2f} times", flush=True)

    began, most, said = time.perf_counter(), 0, 0.0
    for start in range(0, args.tokens, args.chunk):
        step(model, cache, ids[:, start : start + args.chunk].to(model.device))
        most = max(most, own_memory())
        if time.perf_counter() - said > 60:
            said = time.perf_counter()
            print(f"{min(start + args.chunk, args.tokens):,} tokens in {said - began:.0f} s", flush=True)
    reading, report = time.perf_counter() - began, cache.report()
    rows, steps = [], []
    for number, (city, key) in enumerate(hidden):
        answer, seconds = ask(model, tokenizer, cache, city)
        found = re.search(r"\d+", answer)
        right = found is not None and found[0] == key
        rows.append({"depth": number / max(1, args.depths - 1), "key": key, "answer": answer, "right": right})
        steps += seconds
    result = {
        "about": {name: str(value) for name, value in vars(args).items()} | {"method": str(cache.method)},
        "longwave": longwave.__version__,
        "device_bytes": report.device,
        "host_bytes": report.host,
        "mapped_bytes": report.mapped,
        "parts": report.parts,
        "own_memory": most,
        "gpu_peak": torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0,
        "read": reading,
        "token": statistics.median(steps),
        "needles": rows,
    }
    table = [[f"{row['depth']:.2f}", row["key"], row["answer"].strip(), "yes" if row["right"] else ""] for row in rows]
    found = sum(row["right"] for row in rows)
    show_table(f"{found} of {len(rows)} found", ["depth", "number", "answer", "found"], table)
    print(
        f"bytes of the cache: {report.device:,} on the device, {report.host:,} in host memory, {report.mapped:,} in "
        f"files; the process's own memory at most {most:,}, a GPU's {result['gpu_peak']:,}"
    )
    print(f"{reading:.1f} s to read ({args.tokens / reading:,.0f} a second), then {result['token']:.3f} s a token")
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
