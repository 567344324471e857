"""What a model's channels and heads tolerate, measured on real text: how much of each channel its smooth approximation
misses, and what every way to store a head's K or V costs in quality.

A profile is a JSON file with a version. It names the model it was measured on and is refused on another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.plan.fingerprint import fingerprint, same
from longwave.plan.options import BOTH_OPTIONS, KEY_OPTIONS, VALUE_OPTIONS
from longwave.shape import CacheShape

FORMAT, VERSION = "longwave-profile", 4
RECALL = 0.25  # what a nat on recall prompts counts beside a nat on prose


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What storing one head's K or V in fewer bytes costs, all else exact: KL from the dense model in nats, by window.

    k [windows, layers, kv_heads, len(plan.KEY_OPTIONS)], v [.., len(plan.VALUE_OPTIONS)] and, of K and V together, both
        [.., len(plan.BOTH_OPTIONS)]: mean over scored tokens.
    recall bool [windows]: windows that ask for facts hidden in them, of which the answers are scored; the rest is text.
    key_weight [layers, kv_heads, head_dim]: a K channel's variance around its segment's mean times the mean square of
        the query there. about: options measured, how pages were cut, scored tokens, how it was measured.
    """

    about: dict[str, Any]
    k: torch.Tensor
    v: torch.Tensor
    both: torch.Tensor
    recall: torch.Tensor
    key_weight: torch.Tensor

    def __post_init__(self) -> None:
        for name in SENSITIVITY:
            if not bool(torch.isfinite(getattr(self, name)).all() and (getattr(self, name) >= 0).all()):
                raise ValueError(f"{name} must be finite and not negative")
        for side, options in zip(SIDES, (KEY_OPTIONS, VALUE_OPTIONS, BOTH_OPTIONS), strict=True):
            if self.about.get(f"{side}_options") != list(options):
                raise ValueError(
                    f"its {side}_options are {self.about.get(f'{side}_options')}, this longwave plans with "
                    f"{list(options)}: measure it again with `longwave calibrate`"
                )
            expected = (len(self.recall), *self.key_weight.shape[:2], len(options))
            if tuple(getattr(self, side).shape) != expected:
                raise ValueError(f"{side} is {list(getattr(self, side).shape)}, not {list(expected)}")

    def costs(self, side: str) -> torch.Tensor:
        """Cost of every option, text and recall together: [layers, kv_heads, options]."""
        every = getattr(self, side)
        return sum(
            (share * every[rows].mean(0) for share, rows in ((1.0, ~self.recall), (RECALL, self.recall)) if rows.any()),
            torch.zeros(every.shape[1:]),
        )

    def unseen(self, side: str) -> torch.Tensor:
        """What one more window may add to an option's mean over windows, should a head lose in it what the median head
        loses in the window that is its worst: [options]. What is rare is in none of a few windows."""
        every = getattr(self, side)
        return every.amax(0).flatten(0, 1).median(0).values / len(every)

    def order(self, position: int) -> torch.Tensor:
        """K's channels of memory layer number `position` by falling weight: int64 [kv_heads, head_dim]."""
        return self.key_weight[position].argsort(dim=-1, descending=True, stable=True)

    def weights(self, position: int, head: int) -> list[float]:
        """K's channel weights of a head, falling."""
        return self.key_weight[position, head].sort(descending=True, stable=True).values.tolist()

    def as_dict(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "recall": self.recall.tolist(),
            **{name: _rounded(getattr(self, name)) for name in SENSITIVITY},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sensitivity:
        k, v, both, weight = (torch.tensor(data[name], dtype=torch.float32) for name in SENSITIVITY)
        return cls(data["about"], k, v, both, torch.tensor(data["recall"], dtype=torch.bool), weight)


SIDES = ("k", "v", "both")
SENSITIVITY = (*SIDES, "key_weight")


@dataclass(frozen=True, eq=False)
class Profile:
    """What was measured on a model: the costs that a plan is made of, or the errors of its channels, or both.

    sensitivity: for plans. k_error, v_error: mean squared error of every channel's smooth approximation, per memory
    layer, float [layers, kv_heads, head_dim] in squared units of the (rotated) keys and values (`fourier-paper`).
    model: its id and `fingerprint`. method: the options measured. text: what it was measured on, with its sha256.
    """

    model: dict[str, Any]
    method: dict[str, Any]
    text: dict[str, Any]
    k_error: torch.Tensor | None = None
    v_error: torch.Tensor | None = None
    sensitivity: Sensitivity | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        k, v, found = self.k_error, self.v_error, self.sensitivity
        if (k is None) != (v is None) or (k is None and found is None):
            raise ValueError("a profile holds channel errors of K and V, or a sensitivity, or both; got neither")
        if k is not None and v is not None:
            if k.ndim != 3 or k.shape != v.shape:
                raise ValueError(
                    f"channel errors are [layers, kv_heads, head_dim] for K and V alike, got {tuple(k.shape)} and "
                    f"{tuple(v.shape)}"
                )
            if not bool(torch.isfinite(k).all() and torch.isfinite(v).all()):
                raise ValueError("channel errors must be finite")
            if found is not None and found.key_weight.shape != k.shape:
                raise ValueError(f"key_weight is {list(found.key_weight.shape)}, k_error {list(k.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, kv_heads, head_dim)."""
        measured = self.k_error if self.sensitivity is None else self.sensitivity.key_weight
        assert measured is not None
        return tuple(measured.shape)

    def error(self, side: str, position: int) -> torch.Tensor:
        """Errors of memory layer number `position`, side "k" or "v": [kv_heads, head_dim]."""
        errors = self.k_error if side == "k" else self.v_error
        if errors is None:
            raise ValueError(
                f"the profile{f' {self.source}' if self.source else ''} has no channel errors: measure it with "
                "`longwave calibrate MODEL --method fourier-paper --text FILE --out PROFILE`"
            )
        return errors[position]

    @property
    def digest(self) -> str:
        """Hex digest of what was measured: profiles that plan alike share it."""
        found = hashlib.sha256(repr(sorted(self.method.items(), key=str)).encode())
        tensors = [x for x in (self.k_error, self.v_error) if x is not None]
        if self.sensitivity is not None:
            tensors += [getattr(self.sensitivity, name) for name in SENSITIVITY]
        for tensor in tensors:
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def check(self, model: PreTrainedModel, shape: CacheShape) -> None:
        """Raise unless this profile was measured on `model`, or on another form of it that makes the same K and V."""
        expected = (len(shape.memory_layers), shape.kv_heads, shape.head_dim)
        whose = f"the profile{f' {self.source}' if self.source else ''} is of {self.model.get('id') or 'another model'}"
        if self.shape != expected:
            raise ValueError(
                f"{whose}, {'x'.join(map(str, self.shape))} layers x heads x channels; this model has "
                f"{'x'.join(map(str, expected))}"
            )
        theirs = self.model.get("fingerprint", {})
        if theirs and not same(fingerprint(model, shape.memory_layers), theirs):
            raise ValueError(
                f"{whose}, and this model's weights differ: leave profile out, and the model is measured, or measure "
                "it with `longwave calibrate`"
            )

    # files

    def as_dict(self) -> dict[str, Any]:
        """What a file holds: three digits of every number."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "method": self.method,
            "text": self.text,
        }
        for name in ("k_error", "v_error"):
            if getattr(self, name) is not None:
                data[name] = _rounded(getattr(self, name))
        if self.sensitivity is not None:
            data["sensitivity"] = self.sensitivity.as_dict()
        return data

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        data, path = self.as_dict(), Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
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
        if data.get("version") != VERSION:
            raise ValueError(
                f"{path} has profile version {data.get('version')}, this longwave reads {VERSION}: measure it again "
                "with `longwave calibrate`, which takes seconds now"
            )
        try:
            return cls.from_dict(data, str(path))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "") -> Profile:
        model, method, text = (data[key] for key in ("model", "method", "text"))
        if not all(isinstance(part, dict) for part in (model, method, text, model.get("fingerprint", {}))):
            raise TypeError("model, its fingerprint, method and text are objects")
        k, v = (torch.tensor(data[key], dtype=torch.float32) if key in data else None for key in ("k_error", "v_error"))
        found = Sensitivity.from_dict(data["sensitivity"]) if "sensitivity" in data else None
        return cls(model, method, text, k, v, found, source)

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
        found = fingerprint(model, shape.memory_layers)
        info = {"id": getattr(model.config, "_name_or_path", ""), "fingerprint": found}
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


def _rounded(numbers: torch.Tensor) -> Any:
    def shorter(x: Any) -> Any:
        return [shorter(part) for part in x] if isinstance(x, list) else float(f"{x:.3g}")

    return shorter(numbers.tolist())
