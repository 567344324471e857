"""What a model's channels and heads tolerate, measured on real text: how much of each channel its smooth approximation
misses, and what every way to store a head's K or V costs in quality.

A profile is a JSON file with a version. It names the model it was measured on and is refused on another one.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.plan.options import KEY_OPTIONS, VALUE_OPTIONS
from longwave.shape import CacheShape

FORMAT, VERSION = "longwave-profile", 2
RECALL = 0.25  # what a nat on recall prompts counts beside a nat on prose
TOLERANCE = 1e-3  # of a signature value; rounding weights to bfloat16 moves one by less than 1e-4


def signature(model: PreTrainedModel) -> dict[str, float]:
    """A few numbers that tell models apart and survive a change of dtype: mean |w| of some weights.

    Taken from the first, middle and last layer's normalisation and key projection. Quantised weights are left out.
    """
    wanted = [
        (name, p)
        for name, p in model.named_parameters()
        if ("k_proj" in name or "norm" in name) and p.is_floating_point() and not p.is_meta
    ]
    layers = sorted({_layer_of(name) for name, _ in wanted} - {-1})
    if not layers:
        return {}
    picked = {layers[0], layers[len(layers) // 2], layers[-1]}
    return {
        name: float(p.detach().float().abs().mean())
        for name, p in wanted
        if _layer_of(name) in picked and name.endswith("weight")
    }


def _layer_of(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else -1


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What storing one head's K or V in fewer bytes costs, all else exact: KL from the dense model in nats.

    k_prose, k_recall [layers, kv_heads, len(plan.KEY_OPTIONS)] and v_prose, v_recall [.., len(plan.VALUE_OPTIONS)]:
        mean over scored tokens of prose, and over answers to questions about the context.
    key_weight [layers, kv_heads, head_dim]: a K channel's variance around its segment's mean times the mean square of
        the query there. about: options measured, how pages were cut, windows, scored tokens.
    """

    about: dict[str, Any]
    k_prose: torch.Tensor
    k_recall: torch.Tensor
    v_prose: torch.Tensor
    v_recall: torch.Tensor
    key_weight: torch.Tensor

    def __post_init__(self) -> None:
        for name in SENSITIVITY:
            if not bool(torch.isfinite(getattr(self, name)).all() and (getattr(self, name) >= 0).all()):
                raise ValueError(f"{name} must be finite and not negative")
        for side, options in (("k", KEY_OPTIONS), ("v", VALUE_OPTIONS)):
            if self.about.get(f"{side}_options") != list(options):
                raise ValueError(
                    f"its {side}_options are {self.about.get(f'{side}_options')}, this longwave plans with "
                    f"{list(options)}: measure it again with `longwave calibrate`"
                )
            expected = (*self.key_weight.shape[:2], len(options))
            for kind in ("prose", "recall"):
                if tuple(getattr(self, f"{side}_{kind}").shape) != expected:
                    raise ValueError(f"{side}_{kind} is {list(getattr(self, f'{side}_{kind}').shape)}, not {expected}")

    def costs(self, side: str) -> torch.Tensor:
        """Cost of every option, prose and recall together: [layers, kv_heads, options]."""
        prose, recall = (getattr(self, f"{side}_{kind}") for kind in ("prose", "recall"))
        return prose + RECALL * recall

    def order(self, position: int) -> torch.Tensor:
        """K's channels of memory layer number `position` by falling weight: int64 [kv_heads, head_dim]."""
        return self.key_weight[position].argsort(dim=-1, descending=True, stable=True)

    def weights(self, position: int, head: int) -> list[float]:
        """K's channel weights of a head, falling."""
        return self.key_weight[position, head].sort(descending=True, stable=True).values.tolist()

    def as_dict(self) -> dict[str, Any]:
        return {"about": self.about, **{name: _rounded(getattr(self, name)) for name in SENSITIVITY}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sensitivity:
        return cls(data["about"], *(torch.tensor(data[name], dtype=torch.float32) for name in SENSITIVITY))


SENSITIVITY = ("k_prose", "k_recall", "v_prose", "v_recall", "key_weight")


@dataclass(frozen=True, eq=False)
class Profile:
    """Mean squared error of every channel's smooth approximation, per memory layer, and what the planner needs.

    k_error, v_error: float tensors [layers, kv_heads, head_dim], in squared units of the (rotated) keys and values.
    method: the options whose error it is. text: what it was measured on, with its sha256.
    sensitivity: for plans; None where only channels were measured.
    """

    model: dict[str, Any]
    method: dict[str, Any]
    text: dict[str, Any]
    k_error: torch.Tensor
    v_error: torch.Tensor
    sensitivity: Sensitivity | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.k_error.ndim != 3 or self.k_error.shape != self.v_error.shape:
            raise ValueError(
                f"channel errors are [layers, kv_heads, head_dim] for K and V alike, got {tuple(self.k_error.shape)} "
                f"and {tuple(self.v_error.shape)}"
            )
        if not bool(torch.isfinite(self.k_error).all() and torch.isfinite(self.v_error).all()):
            raise ValueError("channel errors must be finite")

    def error(self, side: str, position: int) -> torch.Tensor:
        """Errors of memory layer number `position`, side "k" or "v": [kv_heads, head_dim]."""
        return (self.k_error if side == "k" else self.v_error)[position]

    @property
    def digest(self) -> str:
        """Hex digest of what was measured: profiles that plan alike share it."""
        found = hashlib.sha256(repr(sorted(self.method.items(), key=str)).encode())
        tensors = [self.k_error, self.v_error]
        if self.sensitivity is not None:
            tensors += [getattr(self.sensitivity, name) for name in SENSITIVITY]
        for tensor in tensors:
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def check(self, model: PreTrainedModel, shape: CacheShape) -> None:
        """Raise unless this profile was measured on `model`."""
        expected = (len(shape.memory_layers), shape.kv_heads, shape.head_dim)
        whose = f"the profile{f' {self.source}' if self.source else ''} is of {self.model.get('id') or 'another model'}"
        if tuple(self.k_error.shape) != expected:
            raise ValueError(
                f"{whose}, {'x'.join(map(str, self.k_error.shape))} layers x heads x channels; this model has "
                f"{'x'.join(map(str, expected))}"
            )
        mine, theirs = signature(model), self.model.get("signature", {})
        shared = mine.keys() & theirs.keys()
        differing = [key for key in shared if not math.isclose(mine[key], theirs[key], rel_tol=TOLERANCE, abs_tol=1e-8)]
        if differing or (theirs and mine and not shared):
            raise ValueError(f"{whose}, and this model's weights differ: measure it with `longwave calibrate`")

    # files

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "method": self.method,
            "text": self.text,
            "k_error": _rounded(self.k_error),
            "v_error": _rounded(self.v_error),
        }
        if self.sensitivity is not None:
            data["sensitivity"] = self.sensitivity.as_dict()
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(data))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        path = Path(path)
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"no profile at {path}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a profile: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(
                f"{path} is not a longwave profile. A compressed_dims_*.json file of the FourierAttention release is "
                "read with Profile.from_published(path, model)"
            )
        if data.get("version") not in (1, VERSION):  # version 1 had no sensitivities
            raise ValueError(f"{path} has profile version {data.get('version')}, this longwave reads {VERSION}")
        try:
            model, method, text = (data[key] for key in ("model", "method", "text"))
            if not all(isinstance(part, dict) for part in (model, method, text, model.get("signature", {}))):
                raise TypeError("model, its signature, method and text are objects")
            k, v = (torch.tensor(data[key], dtype=torch.float32) for key in ("k_error", "v_error"))
            found = Sensitivity.from_dict(data["sensitivity"]) if "sensitivity" in data else None
            if found is not None and found.key_weight.shape != k.shape:
                raise ValueError(f"key_weight is {list(found.key_weight.shape)}, k_error {list(k.shape)}")
            return cls(model, method, text, k, v, found, source=str(path))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    @classmethod
    def from_published(cls, path: str | Path, model: PreTrainedModel) -> Profile:
        """Read a compressed_dims_*.json of the FourierAttention release, plain or splithead, for `model`.

        Such files list compressed channels (index head * head_dim + channel) and no errors, so the profile holds
        ranks instead: a plain file lists the smallest error first, and a splithead file only says which of the two
        sides a channel is on. Used with the shares that made the file (`fourier-paper`), the same channels result.
        """
        path = Path(path)
        shape = CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)
        try:
            data = json.loads(path.read_text())
            layers = [data[key] for key in sorted(data, key=lambda name: int(str(name).rsplit("_", 1)[-1]))]
            if not layers:
                raise ValueError("it has no layers")
            errors = [torch.stack([_published_rank(layer, side, shape) for layer in layers]) for side in ("k", "v")]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} is not a compressed_dims file for this model: {error}") from None
        info = {"id": getattr(model.config, "_name_or_path", ""), "signature": signature(model)}
        profile = cls(
            info, {"published": path.name}, {"sha256": "", "tokens": 0}, errors[0], errors[1], source=str(path)
        )
        profile.check(model, shape)
        return profile


def _published_rank(layer: dict[str, list[int]], side: str, shape: CacheShape) -> torch.Tensor:
    """Rank of each channel in one layer's file entry, compressed ones below kept ones: [kv_heads, head_dim]."""
    whole = shape.kv_heads * shape.head_dim
    splithead = f"{side}c_list" in layer
    listed = layer[f"{side}c_list"] if splithead else layer[f"self_attn.{side}_proj"]
    if len(set(listed)) != len(listed) or not all(0 <= channel < whole for channel in listed):
        raise ValueError(f"channels must be distinct and below {whole}")
    rank = torch.full((whole,), float(whole))
    for place, channel in enumerate(listed):
        rank[channel] = 0.0 if splithead else float(place)
    if splithead:
        kept = layer[f"{side}n_list"]
        if sorted([*listed, *kept]) != list(range(whole)):
            raise ValueError(f"{side}c_list and {side}n_list do not make up all {whole} channels")
    return rank.reshape(shape.kv_heads, shape.head_dim)


def _rounded(errors: torch.Tensor) -> Any:
    return [[[float(f"{x:.4g}") for x in head] for head in layer] for layer in errors.tolist()]


def shipped(model: PreTrainedModel, shape: CacheShape, paper: bool) -> Profile | None:
    """The profile in this package that was measured on `model`, if there is one."""
    for entry in sorted(resources.files("longwave.plan.profiles").iterdir(), key=lambda item: item.name):
        if not entry.name.endswith(".json") or entry.name.endswith("-paper.json") != paper:
            continue
        with resources.as_file(entry) as path:
            profile = Profile.load(path)
        try:
            profile.check(model, shape)
        except ValueError:
            continue
        return profile
    return None
