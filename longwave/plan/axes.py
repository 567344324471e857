"""Axes of K before rotation and of V, those that carry most first: what a low rank keeps.

Source: Palu, arXiv 2407.21118, decomposes W of k_proj and v_proj over groups of heads so that |X (W - L R)| is least
for X of a calibration text. The best L R projects X W on its own first axes, so here they are those of K and V
themselves: the same answer for any module that makes them, biases and norms included. The first tokens of a text, whose
keys are like no others, are left out: they stay dense.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from longwave.frame import Needs, cache_argument, observing
from longwave.plan import automatic
from longwave.plan.fingerprint import digest, fingerprint
from longwave.plan.once import made_once, name_of
from longwave.shape import CacheShape, context_limit

FIRST = 4  # tokens of a text that are left out
TOKENS = 1024  # of a window
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Axes:
    """k, v float32 [layers, groups, width, width]: rows are orthonormal axes of the heads of a group, side by side.
    powers float32 [2, layers, groups, width]: mean squares along them, of K and V. Equal if all numbers are."""

    k: torch.Tensor
    v: torch.Tensor
    powers: torch.Tensor
    digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        found = hashlib.sha256()
        for x in (self.k, self.v, self.powers):
            found.update(repr(tuple(x.shape)).encode() + x.cpu().contiguous().numpy().tobytes())
        object.__setattr__(self, "digest", found.hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Axes) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Axes({self.digest[:16]})"

    def save(self, path: Path) -> None:
        save_file({"k": self.k, "v": self.v, "powers": self.powers}, path)

    @classmethod
    def load(cls, path: Path) -> Axes:
        with safe_open(path, "pt") as file:
            return cls(*(file.get_tensor(name) for name in ("k", "v", "powers")))


def fit(
    model: PreTrainedModel,
    windows: Sequence[torch.Tensor],
    heads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Axes:
    """Axes of groups of `heads` KV heads, by texts int64 [rows, tokens] that the model reads.

    NotImplementedError for a model whose rotation cannot be undone.
    """
    needs, moments = Needs(positions=True, unrotated=True), None
    for number, ids in enumerate(windows):
        memory = observing(model, needs)
        with torch.no_grad():
            model(ids.to(model.device), **cache_argument(model, memory), use_cache=True, logits_to_keep=1)
        found = [torch.stack([_moments(x, heads) for x in _plain(layer)]) for layer in memory.memory_layers()]
        now = torch.stack([x.cpu() for x in found], 1)  # [2, layers, groups, width, width]
        moments = now if moments is None else moments + now
        progress(number + 1, len(windows))
    assert moments is not None
    powers, axes = torch.linalg.eigh(moments / sum(ids.shape[0] * (ids.shape[1] - FIRST) for ids in windows))
    axes = axes.mT.flip(-2).float()
    return Axes(axes[0].contiguous(), axes[1].contiguous(), powers.flip(-1).clamp(min=0).float().contiguous())


def _plain(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """K before rotation and V of a dense layer that was read, [B, H, n, D]."""
    (k, v), rotary = layer.dense.view(), layer.progress.rotary
    module = rotary.module_of(layer.index)
    return rotary.unrotate(module, k, layer.dense.column("position")[:, 0].long()), v


def _moments(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Sums of products of channels, float64 [groups, heads * D, heads * D], of x [B, H, n, D]."""
    wide = x[:, :, FIRST:].double().unflatten(1, (-1, heads)).transpose(2, 3).flatten(3)  # [B, groups, n, heads * D]
    return (wide.mT @ wide).sum(0)


def place(model: PreTrainedModel, shape: CacheShape, heads: int) -> Path:
    """Where the axes of `model` are kept."""
    own = digest(fingerprint(model, shape.memory_layers))
    sizes = f"{len(shape.memory_layers)}x{shape.kv_heads}x{shape.head_dim}-{heads}"
    return automatic._folder() / f"axes-{sizes}-{own}.safetensors"


def axes_for(model: PreTrainedModel, shape: CacheShape, heads: int, tokenizer: Any = None) -> Axes:
    """The axes of `model`, kept from before or measured now on text that ships with the package.

    ValueError where no tokenizer is found: None looks for it where the model came from.
    """
    path = place(model, shape, heads)
    with _lock:
        try:
            return Axes.load(path)
        except (OSError, SafetensorError):  # not there, or damaged: measured again
            pass
        tokenizer = tokenizer or automatic._tokenizer(model)
        if tokenizer is None:
            raise ValueError("this model was not measured yet, and its tokenizer was not found: pass tokenizer=")
        count = min(TOKENS, context_limit(model) or TOKENS)
        windows = [
            torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:count]])
            for text in automatic.own_texts()
        ]
        return made_once(
            lambda advance: fit(model, windows, heads, advance),
            path,
            f"measuring {name_of(model)}, once",
            ("measuring", "measured", "measures"),
            "window",
        )
