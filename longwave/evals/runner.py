"""Runs tasks: every method gets the same prompts, each context is read once and forked to all of them.

A context is read and compressed before the question that follows it is seen ("after"), so every answer token comes
from the compressed cache; "with" reads prompt and question in one exact pass first, as plain `generate` does.
Samples that share a context share its pass, and samples of one setting are batched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from longwave.evals.fork import can_fork, fork, needs_of, pad_left, padding, prefill, read, takes_gaps
from longwave.evals.loss import Scored, score
from longwave.evals.results import Results
from longwave.evals.task import LossTask, Sample, Task, TextTask
from longwave.frame import LongCache, Needs, Report, cache_argument

Make = Callable[[int], LongCache]  # rows -> an empty cache
Take = Callable[[str], bool]  # a method's label -> whether it is to be measured here
EVEN = 0.9  # rows of a pass are at least this share of the longest: little padding, and bytes can be shared out
BIN = 64  # scored positions averaged to one point of a curve


@dataclass(frozen=True)
class Batch:
    """How many prompts share a pass: at most `rows`, and at most `tokens` of rows x the longest prompt."""

    rows: int = 8
    tokens: int = 16384

    def __post_init__(self) -> None:
        if self.rows < 1 or self.tokens < 1:
            raise ValueError(f"a batch has at least one row and one token, got {self.rows} and {self.tokens}")


def batches(samples: Sequence[Sample], batch: Batch, equal: bool = False) -> Iterator[list[Sample]]:
    """Samples that can share a pass, short answers and long prompts first; those with the same context lie together.

    equal: only samples of the same lengths share one. Loss tasks need it, and caches that take no gaps.
    """
    alike: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        lengths = (len(sample.ids), sample.context) if equal else ()
        alike.setdefault((sample.max_new_tokens, sample.stop_at_newline, lengths), []).append(sample)
    for same in sorted(alike.values(), key=lambda same: same[0].max_new_tokens):
        families: dict[bytes, list[Sample]] = {}
        for sample in same:
            families.setdefault(_context(sample), []).append(sample)
        ordered = sorted(families.values(), key=lambda family: -max(len(s.ids) for s in family))
        group: list[Sample] = []
        for sample in (sample for family in ordered for sample in family):
            longest = max(len(s.ids) for s in [*group, sample])
            deepest = max(s.context for s in [*group, sample])  # what is stored before the questions come
            uneven = len(sample.ids) < EVEN * longest or sample.context < EVEN * deepest
            if group and (uneven or len(group) == batch.rows or longest * (len(group) + 1) > batch.tokens):
                yield group
                group = []
            group.append(sample)
        if group:
            yield group


def _context(sample: Sample) -> bytes:
    return sample.ids[: sample.context].tobytes()


class Clock:
    """Seconds since the last look, work on the device included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.look()

    def look(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        passed = now - getattr(self, "_last", now)
        self._last = now
        return passed


class Contexts:
    """The contexts of some samples, read once and handed to each method. needs: what methods ask of that reading."""

    def __init__(
        self, model: Any, samples: Sequence[Sample], pad: int, question: str = "after", needs: Needs | None = None
    ):
        self.model, self.needs = model, needs
        self.rows: list[int] = []  # which context each sample has
        self.ids, self.mask = torch.zeros(len(samples), 0, dtype=torch.long), None
        self.seconds = 0.0
        self._dense: LongCache | None = None
        if question == "with":
            return
        unique: dict[bytes, int] = {}
        contexts = []
        for sample in samples:
            if _context(sample) not in unique:
                unique[_context(sample)] = len(unique)
                contexts.append(sample.ids[: sample.context])
            self.rows.append(unique[_context(sample)])
        self.count = len(unique)
        self.ids, self.mask = pad_left(contexts, pad)

    def give(self, make: Make) -> tuple[LongCache, float]:
        """A method's cache that has read them, a row a sample, and the seconds that reading takes."""
        if not self.rows:  # the whole prompt is read by `generate`
            return make(len(self.ids)), 0.0
        clock = Clock(self.model.device)
        memory = make(max(len(self.rows), self.count))
        if can_fork(memory):
            shared = self._read_once(clock)
            fork(self._dense, memory)  # type: ignore[arg-type]
        else:
            shared = 0.0
            read(self.model, memory, self.ids, self.mask)
        if self.rows != list(range(self.count)):
            memory.batch_select_indices(torch.tensor(self.rows))
        return memory, shared + clock.look()

    def _read_once(self, clock: Clock) -> float:
        if self._dense is None:
            self._dense = prefill(self.model, self.ids, self.mask, self.needs)
            self.seconds = clock.look()
        return self.seconds

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Their ids and mask as the first columns of a batch, a row a sample."""
        if not self.rows:
            return self.ids, torch.zeros_like(self.ids)
        assert self.mask is not None
        index = torch.tensor(self.rows)
        return self.ids[index], self.mask[index]


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


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Leave the model's own generation settings out: a repetition penalty, say, forbids copying from the prompt, which
    `do_sample=False` does not switch off."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The token ids that end an answer: the model's own, and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def share_bytes(report: Report, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Each row's share, by its tokens, of the bytes that its pass holds, and of those of a dense cache."""
    each = report.dense_nbytes / (report.batch * report.tokens)  # a token of a dense cache
    whole = report.nbytes / sum(tokens)
    return [
        {"bytes": round(whole * count), "dense_bytes": round(each * count), "rows": report.batch} for count in tokens
    ]


def _needs(methods: Mapping[str, Make]) -> Needs:
    """What methods ask of a reading that they share."""
    return needs_of([memory for memory in (make(1) for make in methods.values()) if can_fork(memory)])


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


def about(sample: Sample) -> dict[str, Any]:
    """What a result row says of its sample."""
    told = {
        "id": sample.id,
        "prompt": sample.prompt_sha256,
        "tokens": len(sample.ids),
        "context": sample.context,
        "meta": dict(sample.meta),
    }
    if sample.answers:
        told["answers"] = list(sample.answers)
    if sample.cut_from is not None:
        told["cut_from"] = sample.cut_from
    return told


class Measure(Protocol):
    """Methods of a model. Called: result rows of samples that share a pass, a list for each method that is named and
    may be taken, which is asked before it is begun.

    equal: whether samples of a pass have to have equal lengths, as those of tasks that score tokens always have.
    """

    model: Any
    methods: Mapping[str, Any]
    equal: bool

    def __call__(
        self, task: Task, samples: Sequence[Sample], labels: Sequence[str], take: Take
    ) -> Iterator[list[dict[str, Any]]]: ...


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


def run(
    measure: Measure,
    tasks: Mapping[str, tuple[Task, Sequence[Sample]]],
    results: Results,
    batch: Batch = Batch(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure what `results` does not hold yet. Samples and methods are done in a fixed order, written pass by pass.

    What another process measures meanwhile is left to it, and waited for at the end: that is taken over where it dies.
    """
    methods = list(measure.methods)
    keys = [(name, m, s.id) for name, (_, samples) in tasks.items() for s in samples for m in methods]

    def tell() -> None:
        progress(sum(key in results.done for key in keys), len(keys))

    tell()
    for name, (_, samples) in tasks.items():
        for sample in samples:
            results.check_prompt((name, methods[0], sample.id), sample.prompt_sha256)
    for wait in (False, True):
        for name, (task, samples) in tasks.items():
            missing = [s for s in samples if any((name, m, s.id) not in results.done for m in methods)]
            if not missing:
                continue
            for group in batches(missing, batch, measure.equal or isinstance(task, LossTask)):
                results.refresh()
                ids = [s.id for s in group]
                left = [m for m in methods if any((name, m, i) not in results.done for i in ids)]
                try:
                    for rows in measure(task, group, left, partial(results.take, name, ids, wait)):
                        results.append([{"task": name, **row} for row in rows])
                        tell()
                except torch.OutOfMemoryError as error:
                    longest = max(len(s.ids) for s in group)
                    raise ValueError(
                        f"{measure.model.device} has too little memory for {len(group)} prompts of up to {longest} "
                        f"tokens: lower --batch or --batch-tokens and run again, what was measured is kept ({error})"
                    ) from None
                finally:
                    results.let_go()
