"""From a command or a recipe to a run: everything a user can get wrong is found before the first minute has passed."""

from __future__ import annotations

import hashlib
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from longwave.checks import nearest, read_text, whole
from longwave.evals.data import data_folder
from longwave.evals.results import FORMAT, VERSION, Results
from longwave.evals.sampling import completed, read_sampling, split
from longwave.evals.spec import as_spec, parse_spec
from longwave.evals.task import LossTask, Sample, Setting, Task
from longwave.evals.tasks import get_task

QUESTION = ("after", "inside", "with")


@dataclass(frozen=True)
class Recipe:
    """What to measure. A file of it (YAML) has these names as keys.

    methods, tasks: specs, see `longwave.evals.spec`. out: folder of results. limit: samples per set of a task.
    max_tokens: where prompts of tasks with a truncation rule are cut. question: "after" compresses the context before
    the question is seen, "inside" compresses all of the prompt but its last token, question included, "with" reads all
    of it in one exact pass; a task with an option `question` says it for itself. Masked-diffusion models read prompts
    "with" their questions. batch: prompts per pass.
    batch_tokens: rows x longest. extend_to: tokens that the model is to read beyond those it was trained on, by the
    rotary tables of extend_rule. window: tokens of a prompt and its answer at most; None: what the model says it reads.
    More than that is for methods that read beyond it, and shows where others fail.
    """

    out: Path
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    model: str = "smollm2"
    limit: int | None = None
    seed: int = 42
    max_tokens: int | None = None
    question: str = "after"
    chat: bool = True
    data: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch: int = 8
    batch_tokens: int = 16384
    profile: Path | None = None
    extend_to: int | None = None
    extend_rule: str | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("out", "data", "profile"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, Path)):
                raise ValueError(f"{name} is a path, got {value!r}")
            object.__setattr__(self, name, None if value is None else Path(value))
        for name in ("methods", "tasks"):
            value = getattr(self, name)
            items = [value] if isinstance(value, (str, Mapping)) else value or ()
            if not isinstance(items, (list, tuple)):
                raise ValueError(f"{name} is a list, got {value!r}")
            if not items:
                raise ValueError(f"there are no {name} to measure: give at least one --{name.removesuffix('s')}")
            specs = tuple(as_spec(item) for item in items)
            twice = {spec for spec in specs if specs.count(spec) > 1}
            if twice:
                raise ValueError(f"{', '.join(sorted(twice))} is given twice")
            object.__setattr__(self, name, specs)
        for name in ("model", "device", "dtype", "extend_rule"):
            if not isinstance(getattr(self, name), str | None if name == "extend_rule" else str):
                raise ValueError(f"{name} is a text, got {getattr(self, name)!r}")
        if not isinstance(self.chat, bool):
            raise ValueError(f"chat is true or false, got {self.chat!r}")
        numbers: dict[str, int | None] = dict(limit=1, seed=None, max_tokens=1, batch=1, batch_tokens=1, extend_to=1)
        for name, least in (numbers | {"window": 1}).items():
            if (value := getattr(self, name)) is not None or name in ("seed", "batch", "batch_tokens"):
                whole(name, value, least)
        if self.question not in QUESTION:
            raise ValueError(f"question is one of {', '.join(QUESTION)}; got {self.question!r}")


def read_recipe(path: Path) -> dict[str, Any]:
    """A YAML file whose keys are the fields of `Recipe`; paths in it are relative to where the command runs."""
    import yaml

    text = read_text(path)
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2025-13-45
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: it has to be a mapping with keys such as model, methods, tasks")
    known = [f.name for f in fields(Recipe)]
    for key in values:
        if key not in known:
            raise ValueError(f"{path} has no key {key!r} to set; {nearest(str(key), known)}")
    return values


def make_recipe(file: Path | None, **given: Any) -> Recipe:
    """A file's values, replaced by those that are given. None, and null in a file, is not given."""
    values = read_recipe(file) if file is not None else {}
    given = {name: value for name, value in given.items() if value is not None}
    values = {name: value for name, value in {**values, **given}.items() if value is not None}
    if "out" not in values:
        raise ValueError("name a folder for the results: --out DIR")
    return Recipe(**{"methods": (), "tasks": (), **values})


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


def make_ways(model: Any, recipe: Recipe) -> tuple[dict[str, Any], dict[str, str], int]:
    """`make_methods` for a masked-diffusion model: label -> how it is asked."""
    from longwave.diffusion import Dream, LLaDA
    from longwave.evals.masked import Way

    sampler = Dream() if getattr(model.config.get_text_config(decoder=True), "logit_shift", False) else LLaDA()
    held = tuple(spec for spec in recipe.methods if read_sampling(spec).keep is not None)
    if recipe.profile is not None and not held:
        raise ValueError(f"profile={recipe.profile} decides nothing for {', '.join(recipe.methods)}: leave it out")
    makers, words, rows = make_methods(model, replace(recipe, methods=held)) if held else ({}, {}, recipe.batch)
    sampled = {spec: read_sampling(spec) for spec in recipe.methods}
    ways = {spec: Way(sampling, makers.get(spec)) for spec, sampling in sampled.items()}
    said = {spec: f"{words.get(spec, 'no cache')}; {sampling}; {sampler}" for spec, sampling in sampled.items()}
    return ways, said, rows


def make_methods(model: Any, recipe: Recipe) -> tuple[dict[str, Callable[[int], Any]], dict[str, str], int]:
    """label -> function from rows to an empty cache, label -> its settings in words, and the rows a batch may have.

    A budget given as a size bounds a whole cache, so what one prompt gets would depend on its batch: such methods are
    measured one prompt at a time, and so is transformers' quantized cache.
    """
    import longwave
    from longwave.build import sized
    from longwave.evals.stock import Quantized

    makers: dict[str, Callable[[int], Any]] = {}
    words: dict[str, str] = {}
    rows, bounds = recipe.batch, []
    for spec in recipe.methods:
        method, budget = read_method(spec)
        if isinstance(method, Quantized):
            makers[spec], rows = partial(method.cache, model), 1
            words[spec] = makers[spec](1).method
            continue
        profile = recipe.profile if method.uses_profile else None
        bound = longwave.cache(model, method, budget, profile).method
        bounds.append(bound)
        words[spec] = in_words(bound)
        if not sized(budget):
            makers[spec] = partial(_empty, model, (bound,))  # not bound again for every prompt
        else:  # its caches refuse more tokens than the size was worked out for
            makers[spec], rows = partial(_empty, model, (method, budget, profile)), 1
    if recipe.profile is not None and not any(bound.profile for bound in bounds):
        raise ValueError(f"profile={recipe.profile} decides nothing for {', '.join(recipe.methods)}: leave it out")
    return makers, words, rows


def _empty(model: Any, settings: tuple[Any, ...], rows: int) -> Any:
    """A new cache of `settings`; how many rows will read does not matter to it."""
    import longwave

    return longwave.cache(model, *settings)


def in_words(bound: Any) -> str:
    """A method's settings. Where a profile decides what is kept, only the digest tells two of them apart."""
    return f"{bound}, {bound.digest[:16]}" if bound.method.uses_profile else str(bound)


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


def weights_of(model: Any) -> dict[str, float]:
    """A few numbers that tell models apart and survive a change of dtype: mean |w| of some keys' and norms' weights."""
    found: dict[int, dict[str, float]] = {}
    for name, p in model.named_parameters():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        plain = p.is_floating_point() and not p.is_meta and name.endswith("weight")
        if layer >= 0 and plain and ("k_proj" in name or "norm" in name):
            found.setdefault(layer, {})[name] = float(p.detach().float().abs().mean())
    layers = sorted(found)
    picked = {layers[0], layers[len(layers) // 2], layers[-1]} if layers else set()
    return {name: value for layer in sorted(picked) for name, value in found[layer].items()}


def make_header(
    recipe: Recipe, model: Any, tokenizer: Any, tasks: Mapping[str, Task], words: Mapping[str, str], command: str
) -> dict[str, Any]:
    """What run.json says about a run."""
    import torch
    import transformers

    import longwave
    from longwave.rotary.extension import MARK
    from longwave.shape import context_limit

    template = getattr(tokenizer, "chat_template", None)
    extended = getattr(model.config.get_text_config(decoder=True), MARK, None)
    weights = {name: float(f"{value:.4g}") for name, value in weights_of(model).items()}
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine()
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": recipe.model,
        "signature": hashlib.sha256(repr(sorted(weights.items())).encode()).hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
        "window": recipe.window or context_limit(model),
        **({} if extended is None else {"extension": f"{extended['rule']} from {extended['trained']:,} tokens"}),
        "seed": recipe.seed,
        "question": recipe.question,
        "chat": recipe.chat,
        "chat_template": hashlib.sha256(str(template).encode()).hexdigest()[:16] if template else None,
        "max_tokens": recipe.max_tokens,
        "methods": dict(words),
        "tasks": {
            label: {"name": task.name, "version": task.version, "options": task.options()}
            for label, task in tasks.items()
        },
        "runs": [
            {
                "command": command,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "device": device,
                "threads": torch.get_num_threads(),
                "batch": recipe.batch,
                "batch_tokens": recipe.batch_tokens,
                "limit": recipe.limit,
                "longwave": longwave.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            }
        ],
    }


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
    from longwave.evals.masked import Masked, is_masked
    from longwave.evals.runner import Batch, Causal, Measure, run
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
