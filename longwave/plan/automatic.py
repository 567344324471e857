"""A profile for a model that was given none: one that ships with the package, one that was measured before, or one that
is measured now, on text that ships too, and kept."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from longwave.fetch import cache_folder
from longwave.models import load_tokenizer
from longwave.plan.calibrate import calibrate
from longwave.plan.fingerprint import digest, fingerprint
from longwave.plan.once import made_once, name_of
from longwave.plan.probe import NoGradients
from longwave.plan.profile import Profile
from longwave.shape import CacheShape, context_limit

KINDS = (
    ("prose", "novels"),
    ("code",),
    ("report",),
    ("reference", "manual"),
    ("dialogue", "data"),
    ("languages",),
)
SMALL = 4 * 2**30  # bytes of weights
_lock = threading.Lock()  # two threads that ask for one model measure it once


@dataclass(frozen=True)
class Effort:
    """How much is measured: windows of so many tokens, the last of them scored by so many probes, `batch` at once."""

    tokens: int
    windows: int
    scored: int
    probes: int
    batch: int = 1

    @classmethod
    def of(cls, model: PreTrainedModel, method: Any) -> Effort | None:
        """Seconds of work on the model's device; None where its context is too short for a segment to be measured."""
        cuda = model.device.type == "cuda"
        small = sum(weight.nbytes for weight in model.parameters()) < SMALL  # its kernels leave a GPU idle
        made = cls(3072, 9, 256, 8, 3 if small else 1) if cuda else cls(1280, 4, 128, 4)
        sinks, window, segment = method.dense_tokens
        tokens = min(made.tokens, context_limit(model) or made.tokens)
        if tokens < sinks + window + segment + made.scored + 1:
            return None
        return replace(made, tokens=tokens)


def own_texts() -> list[str]:
    """The text that ships with the package by kind, those first that a few windows should see: some 30 kB a kind or
    more, so that any tokenizer makes a window of it."""
    package = resources.files("longwave")

    def kind(names: tuple[str, ...]) -> str:
        files = [package / "plan" / "text" / f"{name}.txt" for name in names]
        if "code" in names:  # long modules of one program
            files += sorted((x for x in (package / "frame").iterdir() if x.name.endswith(".py")), key=lambda x: x.name)
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)

    return [kind(names) for names in KINDS]


def shipped(model: PreTrainedModel, shape: CacheShape, paper: bool = False) -> Profile | None:
    """The profile in this package that was measured on `model`, if there is one."""
    folder = resources.files("longwave.plan") / "profiles"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".json") and entry.name.endswith("-paper.json") == paper:
            with resources.as_file(entry) as path:
                found = _fitting(path, model, shape)
            if found is not None:
                return found
    return None


def profile_for(
    model: PreTrainedModel, shape: CacheShape, method: Any, measure: bool = True, tokenizer: Any = None
) -> tuple[Profile | None, str]:
    """A profile of what `method`'s pages cost on this model; None, and why, where there is none.

    measure: whether a model without a profile is measured, in seconds on a GPU and a minute or so on a CPU. tokenizer:
    of the model; None looks for it where the model came from.
    """
    found = shipped(model, shape)
    if found is not None and _same_pages(found, method):
        return found, ""
    with _lock:
        kept = _kept(model, shape, method)
        if kept is not None:
            return kept, ""
        if not measure:
            return None, "measure=False"
        effort = Effort.of(model, method)
        if effort is None:
            return None, f"its context of {context_limit(model)} tokens is too short to measure {method}"
        tokenizer = tokenizer or _tokenizer(model)
        if tokenizer is None:
            return None, "its tokenizer was not found where the model came from: pass tokenizer="
        try:
            return _measured(model, shape, method, tokenizer, effort), ""
        except NoGradients as error:
            return None, str(error)


def _measured(model: PreTrainedModel, shape: CacheShape, method: Any, tokenizer: Any, effort: Effort) -> Profile:
    path = _folder() / f"{_stem(shape, method)}-{digest(fingerprint(model, shape.memory_layers))}.json"
    return made_once(
        lambda advance: calibrate(
            model,
            tokenizer,
            own_texts()[: effort.windows],
            method,
            tokens=effort.tokens,
            windows=effort.windows,
            scored=effort.scored,
            probes=effort.probes,
            batch=effort.batch,
            progress=advance,
        ),
        path,
        f"measuring {name_of(model)}, once (measure=False plans without)",
        ("measuring", "measured", "measures"),
        "layer",
    )


def _folder() -> Path:
    return cache_folder() / "profiles"


def _stem(shape: CacheShape, method: Any) -> str:
    layers = len(shape.memory_layers)
    return f"{layers}x{shape.kv_heads}x{shape.head_dim}-{method.name}-{method.page(shape).segment}"


def _kept(model: PreTrainedModel, shape: CacheShape, method: Any) -> Profile | None:
    """What was measured before on this model, or on another form of it."""
    for path in sorted(_folder().glob(f"{_stem(shape, method)}-*.json")):
        found = _fitting(path, model, shape)
        if found is not None and _same_pages(found, method):
            return found
    return None


def _fitting(path: Path, model: PreTrainedModel, shape: CacheShape) -> Profile | None:
    """A profile, if it is of this model. One that is damaged or of an earlier version is measured again."""
    try:
        found = Profile.load(path)
        found.check(model, shape)
    except (OSError, ValueError):
        return None
    return found if found.model.get("fingerprint") else None  # what cannot be told apart fits nobody


def _same_pages(profile: Profile, method: Any) -> bool:
    return profile.method.get("segment") == method.segment


def _tokenizer(model: PreTrainedModel) -> Any:
    """The tokenizer that lies where the model came from, or None."""
    place = getattr(model.config, "_name_or_path", "")
    if not place:
        return None
    try:
        return load_tokenizer(place)
    except Exception:  # whatever keeps it from loading: the model is not measured, and the report says so
        return None
