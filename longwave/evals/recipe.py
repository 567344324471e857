"""What to measure, as a file of YAML or a command says it; every value is checked when it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from longwave.checks import nearest, read_text, whole
from longwave.evals.spec import as_spec

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
