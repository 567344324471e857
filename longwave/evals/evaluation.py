"""From a recipe to a folder of results: checked, the model loaded, all prompts built, and what is missing measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from longwave.evals.asked import check_names, read_task, suited
from longwave.evals.caches import make_methods, make_ways
from longwave.evals.data import data_folder
from longwave.evals.header import make_header
from longwave.evals.recipe import Recipe
from longwave.evals.results import Results
from longwave.evals.task import LossTask, Sample, Setting, Task


def prepare(
    tasks: Mapping[str, Task], setting: Setting, inside: Collection[str] = ()
) -> dict[str, tuple[Task, Sequence[Sample]]]:
    """Every task's samples; errors name the task. inside: tasks whose question is compressed with the context."""
    prepared: dict[str, tuple[Task, Sequence[Sample]]] = {}
    for label, task in tasks.items():
        try:
            samples = task.samples(setting)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        if not samples:
            raise ValueError(f"{label} has no samples")
        ids = [sample.id for sample in samples]
        if len(set(ids)) != len(ids):
            raise RuntimeError(f"{label} names two samples alike")
        if label in inside:
            samples = [replace(sample, context=len(sample.ids) - 1) for sample in samples]
        prepared[label] = (task, samples)
    return prepared


def _counts(task: Task, samples: Sequence[Sample]) -> dict[str, int]:
    """How many samples each set has."""
    return dict(Counter(str(sample.meta.get(task.columns, "")) if task.columns else "" for sample in samples))


def evaluate(
    recipe: Recipe,
    load: Callable[[str, str, str], tuple[Any, Any]],
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Results:
    """Run a recipe: check it, load the model, build all prompts, measure what the folder does not hold yet."""
    from longwave.evals.batches import Batch
    from longwave.evals.causal import Causal
    from longwave.evals.masked import Masked, is_masked
    from longwave.evals.runner import Measure, run
    from longwave.shape import context_limit

    asked = check_names(recipe)
    losses = [label for label, (task, _) in asked.items() if isinstance(task, LossTask)]
    if recipe.question != "after" and losses:
        raise ValueError(
            f"question={recipe.question} is for tasks that ask: {', '.join(losses)} has none. Run it in another folder"
        )
    if recipe.question == "with" and (said := [label for label, (_, question) in asked.items() if question]):
        raise ValueError(f"question=with is for all tasks of a run: leave the option question out of {', '.join(said)}")
    recipe = replace(recipe, data=data_folder(recipe.data))
    model, tokenizer = load(recipe.model, recipe.device, recipe.dtype)
    recipe = suited(recipe, model)
    named = {label: read_task(label) for label in recipe.tasks}
    tasks = {label: task for label, (task, _) in named.items()}
    own = {label: question for label, (_, question) in named.items() if question is not None}
    measure: Measure
    if is_masked(model):
        ways, words, rows = make_ways(model, recipe)
        measure = Masked(model, tokenizer, ways)
    else:
        makers, words, rows = make_methods(model, recipe)
        measure = Causal(model, tokenizer, makers, recipe.question)
    window = recipe.window or context_limit(model)
    setting = Setting(tokenizer, window, recipe.seed, recipe.limit, recipe.data, recipe.max_tokens, recipe.chat)
    inside = [label for label in tasks if own.get(label, recipe.question) == "inside"]
    prepared = prepare(tasks, setting, inside)
    header = make_header(replace(recipe, batch=rows), model, tokenizer, tasks, words, command)
    for label, question in own.items():
        header["tasks"][label]["question"] = question
    header["samples"] = {label: _counts(task, samples) for label, (task, samples) in prepared.items()}
    prompts = {(label, s.id): s.prompt_sha256 for label, (_, samples) in prepared.items() for s in samples}
    results = Results.open(recipe.out, header, prompts)
    run(measure, prepared, results, Batch(rows, recipe.batch_tokens), progress)
    return results
