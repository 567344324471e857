"""longwave demo: dense and fourier side by side on the small model, on whatever machine this is.

Needles and loss are measured as `longwave eval run` does it and end in its report; speed and a summary come on top.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from longwave.budget import parse_budget
from longwave.checks import jsonable, read_text
from longwave.cli.common import load_model
from longwave.cli.console import progress, show_table, stderr, user_errors, waiting

if TYPE_CHECKING:
    import torch

    from longwave.frame import LongCache

CONTEXT = 3072
NEEDLES = "needle:lengths=1000,2000,4000,depths=0.1,0.5,0.9,haystack={}"
LOSS = f"divergence:contexts={CONTEXT},windows=1,text={{}}"
SUMMARY_TOKENS, SPEED_STEPS = 48, 16


def command(
    out: Annotated[Path, typer.Option(help="Folder for the report and the numbers.")] = Path("out/demo"),
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Document to measure on; Python's help topics otherwise.")
    ] = None,
    budget: Annotated[list[str], typer.Option(help="Budget of fourier; repeats.")] = ["0.125", "0.04"],  # noqa: B006
    seed: int = 42,
) -> None:
    """Dense and fourier side by side on SmolLM2 in float32: needles, loss, bytes, speed, a summary. Takes minutes."""
    with user_errors("what was measured is kept: run the command again, and it goes on"):
        run(out, file, budget, seed)


def run(out: Path, document: Path | None, budgets: list[str], seed: int) -> None:
    """Print one table and write report.html, samples.jsonl and demo.json to `out`."""
    for given in budgets:
        parse_budget(given)
    from longwave.evals.caches import make_methods
    from longwave.evals.data import pydoc_haystack
    from longwave.evals.evaluation import evaluate
    from longwave.evals.fork import needs_of, prefill
    from longwave.evals.recipe import Recipe
    from longwave.evals.report import write_report
    from longwave.evals.results import load

    began = time.perf_counter()
    text = read_text(document, blank=False) if document else pydoc_haystack()
    source = repr(str(document)) if document else "pydoc"  # a path may hold a comma
    tasks = NEEDLES.format(source), LOSS.format(source)
    methods = ("dense", *(f"fourier:budget={budget}" for budget in dict.fromkeys(budgets)))
    recipe = Recipe(out, methods, tasks, seed=seed)
    model, tokenizer = load_model("smollm2", "cpu", "float32")
    makers, _, _ = make_methods(model, recipe)

    with progress("needles at 1k, 2k and 4k tokens, loss at 3k") as advance:
        evaluate(recipe, lambda *_: (model, tokenizer), "longwave demo", advance)
    report = write_report([out], out)
    rows = [row for row in load(out).rows if row["method"] in methods]
    results: dict[str, dict[str, Any]] = {}
    for name in methods:
        (scored,) = (row for row in rows if row["method"] == name and row["task"] == tasks[1])
        found = [row["score"] for row in rows if row["method"] == name and row["task"] == tasks[0]]
        results[name] = {"loss": scored["metrics"]["loss"], "bytes": scored["bytes"], "needles": statistics.mean(found)}
        results[name]["ratio"] = scored["bytes"] / scored["dense_bytes"]
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    with waiting("speed"):
        dense = prefill(model, ids[:, :CONTEXT], needs=needs_of(make(1) for make in makers.values()))
        speed = decode_speed(model, dense, makers, ids[:, CONTEXT : CONTEXT + SPEED_STEPS + 2])
    with waiting("summaries"):
        summaries = {name: summarise(model, tokenizer, ids[:, :1400], make(1)) for name, make in makers.items()}

    stock = 1 / speed.pop("transformers")
    for name, median in speed.items():
        results[name]["tokens_per_second"] = 1 / median
    record = {"budgets": budgets, "seed": seed, "context": CONTEXT, "results": results, "summaries": summaries}
    record["transformers_tokens_per_second"] = stock
    (out / "demo.json").write_text(json.dumps(jsonable(record), indent=1, allow_nan=False))

    for name, summary in summaries.items():
        print(f"\nsummary by {name}: {' '.join(summary.split())}")
    print()
    show_table(
        f"SmolLM2-135M after {CONTEXT:,} tokens",
        ["method", "bytes held", "ratio", "needles found", "loss (nats)", "perplexity", "tokens/s"],
        [
            [
                name,
                f"{values['bytes'] / 2**20:.1f} MiB",
                f"{values['ratio']:.3f}",
                f"{values['needles']:.2f}",
                f"{values['loss']:.3f}",
                f"{math.exp(values['loss']):.2f}",
                f"{values['tokens_per_second']:.1f}",
            ]
            for name, values in results.items()
        ],
    )
    print(f"transformers' own DynamicCache decodes {stock:.1f} tokens/s on the same machine")
    if document is None:
        print("measured on Python's help topics, which calibrated nothing: --file reads another text")
    print(f"report with needle heat maps: {report[0]}")
    if stderr.is_terminal:
        Console(stderr=True).print(f"{time.perf_counter() - began:.0f} s", style="dim")


def decode_speed(
    model: Any, dense: LongCache, makers: dict[str, Callable[[int], LongCache]], ids: torch.Tensor
) -> dict[str, float]:
    """Median seconds of a decode step for each method and for transformers' DynamicCache, steps taken in turn."""
    import torch
    from transformers import DynamicCache

    from longwave.evals.fork import fork
    from longwave.frame import cache_argument

    stock = DynamicCache(config=model.config)
    for layer, source in enumerate(dense.layers):
        stock.update(*source.materialize(), layer)
    caches: dict[str, Any] = {name: fork(dense, make(1)) for name, make in makers.items()} | {"transformers": stock}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(ids.shape[1] - 1):
        for name, memory in caches.items():
            began = time.perf_counter()
            with torch.no_grad():
                model(ids[:, step : step + 1], **cache_argument(model, memory), use_cache=True)
            if step:  # the first step warms up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def summarise(model: Any, tokenizer: Any, ids: torch.Tensor, memory: LongCache) -> str:
    """The first words of a summary, by plain `generate` over the chat template, nothing forked."""
    from longwave.frame import cache_argument

    text = tokenizer.decode(ids[0])
    given: dict[str, Any] = cache_argument(model, memory)
    message = [{"role": "user", "content": f"Summarize this text in three sentences.\n\n{text}"}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(
        **encoded,
        **given,
        max_new_tokens=SUMMARY_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
