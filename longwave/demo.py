"""`longwave demo`: dense and fourier side by side on the small model, on whatever machine this is.

Both methods answer the same prompts through `model.generate(past_key_values=...)`; each text is read once and forked.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache

import longwave
from longwave.cache import LongCache
from longwave.console import progress, show_table, stderr, waiting
from longwave.evals import needle
from longwave.evals.fork import fork, prefill
from longwave.evals.loss import score

LENGTHS, DEPTHS = (1000, 2000, 4000), (0.1, 0.5, 0.9)
CONTEXT, SCORED = 3072, 256
SUMMARY_TOKENS, SPEED_STEPS = 48, 16


def run(out: Path, document: str | None, budgets: list[str], seed: int) -> None:
    """Print one table and write needle.png, needle.jsonl and demo.json to `out`."""
    from longwave.cli import load_model

    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    text = document or needle.pydoc_haystack()
    model, tokenizer = load_model("smollm2", "cpu", "float32")
    makers: dict[str, Callable[[], LongCache]] = {"dense": lambda: longwave.cache(model, "dense")}
    for budget in dict.fromkeys(budgets):
        makers[f"fourier {budget}"] = partial(longwave.cache, model, "fourier", budget=budget)
        makers[f"fourier {budget}"]()  # a wrong budget speaks up now
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    need = max(CONTEXT + SCORED + 1, max(LENGTHS))
    if ids.shape[1] < need:
        raise ValueError(f"the document has {ids.shape[1]} tokens, the demo needs {need}")

    prompts = needle.build_prompts(tokenizer, text, LENGTHS, DEPTHS, seed=seed)
    with progress("needles at 1k, 2k and 4k tokens") as advance:
        answers = list(needle.run(model, tokenizer, prompts, makers, progress=advance))
    needle.heat_map(answers, out / "needle.png", "SmolLM2-135M: needles found, by method and budget")

    results: dict[str, dict[str, Any]] = {name: {} for name in makers}
    with waiting(f"loss of {SCORED} tokens after {CONTEXT:,}"):
        dense = prefill(model, ids[:, :CONTEXT])
        for name, make in makers.items():
            memory = fork(dense, make())
            scored = score(model, memory, ids[:, CONTEXT : CONTEXT + SCORED + 1])
            report = memory.report()
            results[name] = {"loss": scored.loss, "bytes": report.nbytes, "ratio": report.ratio}
            results[name]["needles"] = statistics.mean(a.score for a in answers if a.method == name)
    with waiting("speed"):
        for name, median in decode_speed(model, dense, makers, ids[:, CONTEXT : CONTEXT + SPEED_STEPS + 2]).items():
            results.setdefault(name, {})["tokens_per_second"] = 1 / median
    with waiting("summaries"):
        summaries = {name: summarise(model, tokenizer, ids[:, :1400], make) for name, make in makers.items()}

    transformers_speed = results.pop("transformers")["tokens_per_second"]
    (out / "needle.jsonl").write_text("".join(json.dumps(a.as_dict()) + "\n" for a in answers))
    record = {
        "budgets": budgets,
        "seed": seed,
        "context": CONTEXT,
        "results": results,
        "transformers_tokens_per_second": transformers_speed,
        "summaries": summaries,
    }
    (out / "demo.json").write_text(json.dumps(record, indent=1))

    for name, summary in summaries.items():
        print(f"\nsummary by {name}: {' '.join(summary.split())}")
    print()
    rows = [
        [
            name,
            f"{values['bytes'] / 2**20:.1f} MiB",
            f"{values['ratio']:.3f}",
            f"{values['needles']:.2f}",
            f"{values['loss']:.3f}",
            f"{torch.tensor(values['loss']).exp():.2f}",
            f"{values['tokens_per_second']:.1f}",
        ]
        for name, values in results.items()
    ]
    show_table(
        f"SmolLM2-135M after {CONTEXT:,} tokens",
        ["method", "bytes held", "ratio", f"needles of {len(prompts)}", "loss (nats)", "perplexity", "tokens/s"],
        rows,
    )
    print(f"transformers' own DynamicCache decodes {transformers_speed:.1f} tokens/s on the same machine")
    print(f"needle heat map: {out / 'needle.png'}")
    if stderr.is_terminal:
        Console(stderr=True).print(f"{time.perf_counter() - began:.0f} s", style="dim")


@torch.no_grad()
def decode_speed(model: Any, dense: LongCache, makers: dict[str, Any], ids: torch.Tensor) -> dict[str, float]:
    """Median seconds of a decode step for each method and for transformers' DynamicCache, steps taken in turn."""
    stock = DynamicCache(config=model.config)
    for layer, source in enumerate(dense.layers):
        stock.update(*source.materialize(), layer)
    caches: dict[str, Any] = {name: fork(dense, make()) for name, make in makers.items()} | {"transformers": stock}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(ids.shape[1] - 1):
        for name, memory in caches.items():
            began = time.perf_counter()
            model(ids[:, step : step + 1], past_key_values=memory, use_cache=True)
            if step:  # the first step warms up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def summarise(model: Any, tokenizer: Any, ids: torch.Tensor, make: Any) -> str:
    """The first words of a summary, by plain `generate` over the chat template, nothing forked."""
    text = tokenizer.decode(ids[0])
    message = [{"role": "user", "content": f"Summarize this text in three sentences.\n\n{text}"}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(
        **encoded,
        past_key_values=make(),
        max_new_tokens=SUMMARY_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
