"""Measuring a masked-diffusion model: prompts and masks are read together, by every method for itself.

What a method holds of a text is compressed behind the first pass of every block, question included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longwave.diffusion import blocks, loss_bound
from longwave.diffusion.generate import mask_of
from longwave.evals.fork import pad_left, padding
from longwave.evals.generation import end_tokens
from longwave.evals.rows import Clock, about, share_bytes
from longwave.evals.runner import Take
from longwave.evals.sampling import Sampling
from longwave.evals.task import Sample, Task, TextTask
from longwave.evals.tasks.perplexity_bound import PerplexityBound
from longwave.frame import LongCache
from longwave.shape import CacheShape


def is_masked(model: Any) -> bool:
    """Whether a model looks in both directions, with or without weights. ValueError where it does, and no mask is
    known."""
    if getattr(model.config.get_text_config(decoder=True), "is_causal", True):
        return False
    mask_of(model)
    return True


@dataclass(frozen=True, eq=False)
class Way:
    """How a model is asked: its sampling, and what makes an empty cache; None where nothing is held."""

    sampling: Sampling
    make: Callable[[int], LongCache] | None = None


def why_not(task: Task) -> str:
    """Why a task cannot be asked of a masked-diffusion model, "" where it can."""
    if isinstance(task, TextTask | PerplexityBound):
        return ""
    return (
        "its tokens are fed one behind the other, each predicted from those before it, and a masked-diffusion model "
        "looks in both directions"
    )


class Masked:
    """Ways to ask a masked-diffusion model."""

    equal = False

    def __init__(self, model: Any, tokenizer: Any, ways: Mapping[str, Way]):
        self.model, self.tokenizer, self.methods = model, tokenizer, ways

    def __call__(
        self, task: Task, samples: Sequence[Sample], labels: Sequence[str], take: Take
    ) -> Iterator[list[dict[str, Any]]]:
        for label in labels:
            if not take(label):
                continue
            if isinstance(task, TextTask):
                found = answer(self.model, self.tokenizer, samples, self.methods[label])
                yield [
                    {"method": label, **about(one), "output": output, **_judged(task, one, output), **cost}
                    for one, output, cost in found
                ]
            else:
                assert isinstance(task, PerplexityBound)
                yield [{"method": label, **about(one), **bound(self.model, task, one)} for one in samples]


def _judged(task: TextTask, sample: Sample, output: str) -> dict[str, Any]:
    judged = task.judge(sample, output)
    return {"parsed": judged.parsed, "score": judged.score, "metrics": dict(judged.metrics)}


def answer(
    model: Any, tokenizer: Any, samples: Sequence[Sample], way: Way
) -> Iterator[tuple[Sample, str, dict[str, Any]]]:
    """Greedy answers: (sample, output text, what it cost). Samples have as many new tokens, and end alike."""
    wanted, sampling = samples[0].max_new_tokens, way.sampling
    new, length, steps = sampling.lengths(wanted)
    ids, mask = (x.to(model.device) for x in pad_left([sample.ids for sample in samples], padding(tokenizer)))
    memory = None if way.make is None else way.make(len(samples))
    clock = Clock(model.device)
    made = list(
        blocks(
            model,
            ids,
            mask,
            max_new_tokens=new,
            block_length=length,
            steps=steps,
            threshold=sampling.threshold,
            cache=memory,
            keep=sampling.keep,
            refresh=sampling.refresh,
            delay=sampling.delay,
            seed=0,  # of greedy answers, which draw nothing
            stop_ids=end_tokens(model, tokenizer),
            stopping_criteria=_at_newline(tokenizer, ids.shape[1]) if samples[0].stop_at_newline else (),
            pad_token_id=padding(tokenizer),
        )
    )
    cost = {
        "prefill_seconds": 0.0,
        "decode_seconds": clock.look(),
        "steps": steps,
        "passes": sum(x.passes for x in made),
    }
    written = (made[-1].ends - ids.shape[1]).clamp(max=wanted).tolist()
    if memory is None:
        shares = [{**nothing_held(model, len(sample.ids) + new), "rows": len(samples)} for sample in samples]
    else:
        report = memory.report()
        padded = (mask == 0).sum(-1).tolist()
        shares = share_bytes(report, [report.tokens - count for count in padded])
    rows = torch.cat([block.tokens for block in made], 1).tolist()
    for sample, row, count, share in zip(samples, rows, written, shares, strict=True):
        text = str(tokenizer.decode(row[:count], skip_special_tokens=True))
        yield sample, text, {**cost, **share, "new_tokens": count}


def _at_newline(tokenizer: Any, prompt: int) -> list[Callable[[torch.Tensor, Any], torch.Tensor]]:
    """A criterion that ends a row at a newline, but not at its first token."""
    newline = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    return [lambda ids, _: (ids[:, -1] == newline) & (ids.shape[1] > prompt + 1)]


def bound(model: Any, task: PerplexityBound, sample: Sample) -> dict[str, Any]:
    """What is found of a window, by itself, so that its masks do not depend on what it shares a pass with."""
    clock = Clock(model.device)
    scored = len(sample.ids) - sample.context - 1
    ids = torch.tensor([list(sample.ids)])
    value = float(loss_bound(model, ids, scored=scored, samples=task.masks, seed=sample.meta["seed"]))
    row = {"scored": scored, "score": value, "metrics": {task.metric: value}, "passes": task.masks}
    row |= {"prefill_seconds": 0.0, "decode_seconds": clock.look(), "rows": 1}
    return row | nothing_held(model, len(sample.ids))


def nothing_held(model: Any, tokens: int) -> dict[str, int]:
    """The bytes of a reading without a cache, and those of a dense one of as many tokens."""
    shape = CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)
    dense = tokens * shape.token_bytes * len(shape.memory_layers) + shape.sliding_bytes(tokens)
    return {"bytes": 0, "dense_bytes": dense}
