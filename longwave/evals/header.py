"""run.json, what a folder of results says of its runs: made, read, checked, and joined where runs can be compared."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longwave.checks import parse_json, read_text
from longwave.evals.recipe import Recipe
from longwave.evals.task import Task

FORMAT, VERSION = "longwave-eval", 1

# What a header says of the run, and a report shows.
SAID = {"model": str, "dtype": str, "seed": int, "question": str, "chat": bool}

# What must not differ between runs that share a folder: their rows could not be compared.
FIXED = ("model", "signature", "dtype", "seed", "question", "chat", "chat_template", "max_tokens", "extension")


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


def read_header(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no results: there is no run.json in it")
    try:
        header = parse_json(read_text(path), path)
    except ValueError as error:
        raise ValueError(
            f"{path} is not readable ({error}): nothing was changed; restore it or use another folder"
        ) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is not of longwave eval: nothing was changed; use another folder")
    if header.get("version") != VERSION:
        raise ValueError(f"{path} has format version {header.get('version')}; this longwave reads {VERSION}")
    for name, kind in (("methods", dict), ("tasks", dict), ("runs", list), ("samples", dict)):
        if not isinstance(header.get(name, {} if name == "samples" else None), kind):
            raise ValueError(_damaged(path, name))
    return header


def check_header(header: Mapping[str, Any], path: Path) -> None:
    """Raise where something is missing that a summary or a report reads, or stands there in another form."""
    for name, kind in SAID.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(_damaged(path, name))
    if not isinstance(header.get("extension"), str | None):
        raise ValueError(_damaged(path, "extension"))
    for name in ("window", "max_tokens"):
        if not isinstance(header.get(name), (int, type(None))):
            raise ValueError(_damaged(path, f"number of tokens as {name}"))
    for label, told in header["tasks"].items():
        form = (("name", str), ("version", int), ("options", dict))
        if not isinstance(told, dict) or not all(isinstance(told.get(name), kind) for name, kind in form):
            raise ValueError(_damaged(path, f"name, version and options of task {label!r}"))
    for label, counts in header.get("samples", {}).items():
        if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
            raise ValueError(_damaged(path, f"counts of samples of {label!r}"))
    for run in header["runs"]:
        if not isinstance(run, dict) or not isinstance(run.get("command", ""), str):
            raise ValueError(_damaged(path, "commands of its runs"))


def _damaged(path: Path, missing: str) -> str:
    return f"{path} is damaged, it has no {missing}: nothing was changed; restore it or use another folder"


def continued(folder: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a folder with a run added to it."""
    old = read_header(folder)
    if said := difference(old, new):
        raise ValueError(f"{folder} holds results of {said}: name another folder, nothing was overwritten")
    return joined(old, new)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What `old` has results of that keeps `new` from joining it, "" where nothing does."""
    for name in FIXED:
        if old.get(name) != new.get(name):
            if name == "signature":
                return f"other weights under the same name {old['model']}"
            return f"{name} {old.get(name)!r}, not {new.get(name)!r}"
    for kind in ("methods", "tasks"):
        for label, value in new[kind].items():
            if label in old[kind] and old[kind][label] != value:
                return f"{label!r} with other settings or another version ({old[kind][label]}, not {value})"
    return ""


def joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    samples = dict(old.get("samples", {}))
    for label, counts in new.get("samples", {}).items():
        known = samples.get(label, {})
        samples[label] = {**known, **{column: max(count, known.get(column, 0)) for column, count in counts.items()}}
    return {
        **old,
        "samples": samples,
        "methods": {**old["methods"], **new["methods"]},
        "tasks": {**old["tasks"], **new["tasks"]},
        "runs": [*old["runs"], *new["runs"]],
    }


def write_header(path: Path, header: Mapping[str, Any]) -> None:
    """Through a second file: a killed process leaves the old header or the new one, never half of one."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(header, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
