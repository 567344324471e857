"""Measuring a causal model: each context is read once and forked to all methods, so every one gets the same prompts.

A context is read and compressed before the question that follows it is seen ("after"), so every answer token comes
from the compressed cache; "with" reads prompt and question in one exact pass first, as plain `generate` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from longwave.evals.contexts import Contexts, Make
from longwave.evals.fork import can_fork, needs_of, pad_left, padding, takes_gaps
from longwave.evals.generation import end_tokens, plain_generation
from longwave.evals.loss import Scored, score
from longwave.evals.rows import BIN, Clock, about, share_bytes
from longwave.evals.runner import Take
from longwave.evals.task import LossTask, Sample, Task, TextTask
from longwave.frame import Needs, cache_argument


class Causal:
    """Methods of a causal model: contexts are read once for all of them."""

    def __init__(self, model: Any, tokenizer: Any, methods: Mapping[str, Make], question: str = "after"):
        self.model, self.tokenizer, self.methods, self.question = model, tokenizer, methods, question
        self.empty = {label: make(1) for label, make in methods.items()}
        self.equal = not all(map(takes_gaps, self.empty.values()))

    def __call__(
        self, task: Task, samples: Sequence[Sample], labels: Sequence[str], take: Take
    ) -> Iterator[list[dict[str, Any]]]:
        wanted = {label: self.methods[label] for label in labels}
        needs = needs_of([self.empty[label] for label in labels if can_fork(self.empty[label])])
        if isinstance(task, TextTask):
            return run_text(self.model, self.tokenizer, task, samples, wanted, self.question, needs, take)
        assert isinstance(task, LossTask)
        return run_loss(self.model, self.tokenizer, task, samples, wanted, needs, take)


def run_text(
    model: Any,
    tokenizer: Any,
    task: TextTask,
    samples: Sequence[Sample],
    methods: Mapping[str, Make],
    question: str,
    needs: Needs | None = None,
    take: Take = lambda label: True,
) -> Iterator[list[dict[str, Any]]]:
    """Result rows of samples that share a pass, one list a method that may be taken. needs: see `Contexts`."""
    contexts = Contexts(model, samples, padding(tokenizer), question, needs or _needs(methods))
    for label, make in methods.items():
        if not take(label):
            continue
        rows = []
        for sample, output, cost in answer(model, tokenizer, samples, contexts, make):
            judged = task.judge(sample, output)
            row = {"method": label, **about(sample), "output": output, "parsed": judged.parsed}
            rows.append({**row, "score": judged.score, "metrics": dict(judged.metrics), **cost})
        yield rows


def run_loss(
    model: Any,
    tokenizer: Any,
    task: LossTask,
    samples: Sequence[Sample],
    methods: Mapping[str, Make],
    needs: Needs | None = None,
    take: Take = lambda label: True,
) -> Iterator[list[dict[str, Any]]]:
    """The same for tokens that are scored, not written. Samples of a pass have equal lengths."""
    from longwave.build import cache

    contexts = Contexts(model, samples, padding(tokenizer), needs=needs or _needs(methods))
    last = torch.tensor([list(s.ids[s.context :]) for s in samples])
    exact: Scored | None = None
    for label, make in methods.items():
        if not take(label):
            continue
        if task.compares and exact is None:
            memory, _ = contexts.give(lambda rows: cache(model, "dense"))
            exact = score(model, memory, last, task.feed)
        memory, seconds = contexts.give(make)
        shares = share_bytes(memory.report(), [s.context for s in samples])  # what the scored pass reads
        feed = 1 if task.feed is None and _steps_alone(memory) else task.feed
        clock = Clock(model.device)
        scored = score(model, memory, last, feed, keep=task.compares)
        decode = clock.look()
        if feed is not None:
            shares = share_bytes(memory.report(), [len(s.ids) - 1 for s in samples])
        values = {"loss": scored.losses}
        if task.recalls:
            values["hit"] = scored.hits.float()
        if exact is not None:
            values["kl"], values["top1"] = scored.divergence(exact)
        cost = {"prefill_seconds": seconds, "decode_seconds": decode}
        rows = []
        for number, sample in enumerate(samples):
            counted = _counted(sample)
            mine = {name: value[number, counted] for name, value in values.items()}
            metrics: dict[str, Any] = {name: float(value.mean()) for name, value in mine.items()}
            if exact is not None:
                metrics["dense_loss"] = float(exact.losses[number, counted].mean())
            curve = {name: [round(float(x.mean()), 5) for x in value.split(BIN)] for name, value in mine.items()}
            row = {"method": label, **about(sample), "scored": len(mine["loss"]), "score": metrics[task.metric]}
            rows.append({**row, "metrics": metrics, "curve": curve, **cost, **shares[number]})
        yield rows


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, samples: Sequence[Sample], contexts: Contexts, make: Make
) -> Iterator[tuple[Sample, str, dict[str, Any]]]:
    """Greedy answers of one method: (sample, output text, what it cost)."""
    memory, seconds = contexts.give(make)
    first, first_mask = contexts.tokens()
    skip = [s.context if contexts.rows else 0 for s in samples]
    rest, rest_mask = pad_left([s.ids[n:] for s, n in zip(samples, skip, strict=True)], padding(tokenizer))
    ids, mask = (torch.cat(pair, dim=1).to(model.device) for pair in ((first, rest), (first_mask, rest_mask)))
    ends = end_tokens(model, tokenizer)
    extra: dict[str, Any] = {}
    if samples[0].stop_at_newline:
        ends = [*ends, tokenizer("\n", add_special_tokens=False).input_ids[-1]]
        extra["min_new_tokens"] = 1
    clock = Clock(model.device)
    with plain_generation(model):
        out = model.generate(
            ids,
            attention_mask=mask,
            **cache_argument(model, memory),
            max_new_tokens=samples[0].max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=ends or None,
            pad_token_id=padding(tokenizer),
            **extra,
        )
    cost = {"prefill_seconds": seconds, "decode_seconds": clock.look()}
    steps = out.shape[1] - ids.shape[1] - 1  # the last new token is never fed
    shares = share_bytes(memory.report(), [len(s.ids) + steps for s in samples])
    for sample, row, share in zip(samples, out[:, ids.shape[1] :].tolist(), shares, strict=True):
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        text = str(tokenizer.decode(row[:length], skip_special_tokens=True))
        yield sample, text, {**cost, **share, "new_tokens": length}


def _needs(methods: Mapping[str, Make]) -> Needs:
    """What methods ask of a reading that they share."""
    return needs_of([memory for memory in (make(1) for make in methods.values()) if can_fork(memory)])


def _steps_alone(memory: Any) -> bool:
    """Whether one pass over all scored tokens would not show what the method does."""
    bound = getattr(memory, "method", None)
    return bool(getattr(getattr(bound, "method", None), "steps_alone", False))


def _counted(sample: Sample) -> Any:
    """Which of a sample's scored tokens count, as an index; the first is that behind the one that is fed first."""
    if sample.scored is None:
        return slice(None)
    index = torch.tensor(sample.scored) - sample.context - 1
    if not len(index) or int(index[0]) < 0 or bool((index.diff() <= 0).any()):
        raise RuntimeError(f"sample {sample.id} counts tokens that are not scored, or none")
    return index
