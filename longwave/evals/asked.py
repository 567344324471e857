"""The methods and tasks that a recipe names. What cannot be asked of a model is refused before a minute has passed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from longwave.evals.recipe import QUESTION, Recipe
from longwave.evals.sampling import completed, read_sampling, split
from longwave.evals.spec import parse_spec
from longwave.evals.task import LossTask, Task
from longwave.evals.tasks import get_task


def read_method(spec: str) -> tuple[Any, Any]:
    """A method and the budget that is given with it; transformers' quantized cache has none. How a masked-diffusion
    model samples stands in a spec, too, and is left out here."""
    from longwave.evals.stock import Quantized
    from longwave.methods import get_method

    name, options, _ = split(spec)
    if name == Quantized.name:
        return Quantized.of(options), None
    budget = options.pop("budget", None)
    return get_method(name, **options), budget


def read_task(spec: str) -> tuple[Task, str | None]:
    """A task, and when its question is seen where its spec says so: "needle:kind=classic,question=inside"."""
    name, options = parse_spec(spec)
    question = options.pop("question", None)
    task = get_task(name, **options)
    if question is None:
        return task, None
    if isinstance(task, LossTask):
        raise ValueError(f"{spec}: {name} asks no question, so it takes no option question")
    if question not in QUESTION[:2]:
        raise ValueError(f"{spec}: the question of a task is one of {', '.join(QUESTION[:2])}; got {question!r}")
    return task, question


def check_names(recipe: Recipe) -> dict[str, tuple[Task, str | None]]:
    """The tasks with their own word on the question, unknown names and options refused before a model is loaded.
    Methods are checked as far as that is possible without one."""
    from longwave.budget import parse_budget
    from longwave.evals.stock import Quantized
    from longwave.plan.profile import Profile

    for spec in recipe.methods:
        read_sampling(spec)
        method, budget = read_method(spec)
        if isinstance(method, Quantized):
            method.check_backend()
        elif what := method.beforehand():
            raise ValueError(f"one reading of a prompt serves all methods, and {what}")
        elif budget is not None:
            parse_budget(budget)
    if recipe.profile is not None:
        Profile.load(recipe.profile)
    return {spec: read_task(spec) for spec in recipe.tasks}


def suited(recipe: Recipe, model: Any) -> Recipe:
    """The recipe as it is for this model, which needs no weights: of a masked-diffusion model labels say how it
    samples, `perplexity` is `perplexity-bound`, and prompts are read with their questions.

    Raises ValueError for what the model cannot be asked, or what decides nothing for it.
    """
    from longwave.evals.masked import is_masked, why_not
    from longwave.evals.stock import Quantized
    from longwave.evals.tasks.perplexity_bound import PerplexityBound

    bound = PerplexityBound.name
    if not is_masked(model):
        for spec in recipe.methods:
            if sampled := split(spec)[2]:
                raise ValueError(
                    f"{spec}: {next(iter(sampled))} says how a masked-diffusion model samples, and {recipe.model} is "
                    "causal: leave it out"
                )
        for label in recipe.tasks:
            if isinstance(read_task(label)[0], PerplexityBound):
                raise ValueError(f"{label} is of masked-diffusion models, and {recipe.model} is causal: perplexity")
        return recipe
    labels = tuple(re.sub(r"^perplexity(?=:|$)", bound, label) for label in recipe.tasks)
    for label in labels:
        task, question = read_task(label)
        if why := why_not(task):
            raise ValueError(f"{label} cannot be asked of {recipe.model}: {why}")
        if question is not None or recipe.question == "inside":
            raise ValueError(
                f"{label}: question={question or recipe.question} decides nothing for {recipe.model}, which is a "
                "masked-diffusion model and reads all of a prompt before anything is compressed: leave it out"
            )
        if isinstance(task, PerplexityBound):
            for spec in recipe.methods:
                if read_sampling(spec).keep is not None:
                    raise ValueError(
                        f"{label} reads texts whole and holds nothing of them, so it says nothing of {spec}: measure "
                        "it with dense alone, which may be a run of its own into the same folder"
                    )
    for spec in recipe.methods:
        if isinstance(read_method(spec)[0], Quantized):
            raise ValueError(f"{spec} cannot take back what it has read, and a block of masks is read many times")
    return replace(recipe, methods=tuple(map(completed, recipe.methods)), tasks=labels, question="with")
