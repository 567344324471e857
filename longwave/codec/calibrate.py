"""Reading calibration text for a codec: sums over its tokens, and segments kept apart that make neither of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longwave.codec import find, weigh
from longwave.codec.predict import Moments, embedding, features
from longwave.codec.rotation import Rotation
from longwave.codec.segment import RAW
from longwave.codec.transform import TOKENS
from longwave.plan import recall
from longwave.plan.fingerprint import fingerprint
from longwave.shape import CacheShape, check_supported, context_limit

Progress = Callable[[int, int], None]
APART = 0.2  # of every text, its end: what the entropy tables and the curve are made of
SHORTEST = 3 * TOKENS


@dataclass(frozen=True)
class Effort:
    """How much is read: `windows` of `tokens`, of which the first `probed` are scored by `probes` backward passes over
    their last `scored` tokens; and `apart` segments of every text's end. channels: the most that one basis joins."""

    tokens: int
    windows: int
    probed: int
    probes: int
    scored: int
    apart: int
    channels: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Effort:
        """What takes a minute or so on the model's device. ValueError where its context is too short."""
        cuda = model.device.type == "cuda"
        made = cls(3072, 34, 9, 4, 256, 16, 6144) if cuda else cls(1280, 8, 3, 2, 128, 5, 2048)
        tokens = min(made.tokens, context_limit(model) or made.tokens)
        if tokens < SHORTEST:
            raise ValueError(f"its context of {tokens} tokens is too short to fit a codec, at least {SHORTEST}")
        return replace(made, tokens=tokens)


@dataclass(frozen=True, eq=False)
class Apart:
    """A segment that was kept apart: k, v [L, n, H, D] as cached, ids int64 [n], position of the first."""

    k: Tensor
    v: Tensor
    ids: Tensor
    start: int


@dataclass(eq=False)
class Calibration:
    """What was read of a model: all that codecs of it are made of, with whatever steps.

    moments: K's (turned back) and V's, by group of layers. weights: sqrt of Fisher information, float64 [L, H, D].
    """

    shape: CacheShape
    groups: tuple[tuple[int, int], ...]
    rotation: Rotation
    table: Tensor
    places: find.Places | None
    moments: tuple[Moments, Moments]
    weights: tuple[Tensor, Tensor]
    apart: list[Apart]
    model: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)


def grouped(layers: int, width: int, channels: int) -> tuple[tuple[int, int], ...]:
    """Layers in as few groups of equal size (but for one layer) as hold at most `channels` channels; one at least."""
    count = -(-layers // max(1, channels // width))
    ends = [layers * i // count for i in range(count + 1)]
    return tuple(pairwise(ends))


def opened(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> Tensor:
    """ids [rows, tokens] that begin with the token that the tokenizer puts before every text, if it does."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a").input_ids[:1] == [bos]:
        ids[:, 0] = bos
    return ids


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    effort: Effort | None = None,
    seed: int = 0,
    model_id: str = "",
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """Read `texts` with a model. seed: of the hidden facts.

    NotImplementedError where its keys cannot be turned back, NoGradients where probes reach nothing, ValueError where
    text or context are too short.
    """
    config = check_supported(model)
    shape = CacheShape.of(config, model.dtype)
    effort = effort or Effort.of(model)
    rotation = Rotation.of(model, shape.memory_layers)
    rows, ends, effort = _windows(tokenizer, texts, effort, seed)
    groups = grouped(len(shape.memory_layers), shape.kv_heads * shape.head_dim, effort.channels)
    cuts = [slice(*(end * shape.kv_heads * shape.head_dim for end in group)) for group in groups]
    table = embedding(model)
    fisher = weigh.Fisher(rotation, slice(RAW, rows.context - (TOKENS if rows.context >= 4 * TOKENS else 0)))
    moments, total = (Moments(cuts), Moments(cuts)), effort.windows + len(ends)
    device = model.device
    table_there, turn = table.to(device), rotation.to(device)
    for number in range(effort.windows):
        progress(number, total)
        one = rows.part(slice(number, number + 1))
        memory = weigh.read(model, one.ids[:, : one.context])
        k, v = _stacked(memory)
        f = features(table_there, one.ids[0, : one.context].to(device))[RAW:]
        k = turn.unrotate(k.float(), torch.arange(one.context, device=device))
        for side, x in zip(moments, (k, v.float()), strict=True):
            side.add(f, x[:, RAW:].transpose(0, 1).flatten(1))
        if number < effort.probed:
            for pair in weigh.gradients(model, memory, one, effort.probes, number):
                fisher.add(*pair)
        del memory
    apart = []
    for number, ids in enumerate(ends):
        progress(effort.windows + number, total)
        k, v = (x.cpu() for x in _stacked(weigh.read(model, ids[None])))
        for start in range(RAW, len(ids) - TOKENS + 1, TOKENS):
            some = slice(start, start + TOKENS)
            apart.append(Apart(k[:, some], v[:, some], ids[some], start))
    progress(total, total)
    limit = context_limit(model) or 2**17
    about = {
        "text": hashlib.sha256("\0".join(texts).encode()).hexdigest(), "seed": seed, **vars(effort),
        "read": moments[0].count, "segments apart": len(apart), "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    named = {
        "id": model_id or getattr(model.config, "_name_or_path", ""),
        "fingerprint": fingerprint(model, shape.memory_layers),
    }
    return Calibration(
        shape,
        groups,
        rotation,
        table,
        find.places(model, rotation, limit),
        moments,
        fisher.weights(),
        apart,
        named,
        about,
    )


def _stacked(memory: Any) -> tuple[Tensor, Tensor]:
    """K and V of all memory layers of a cache of one row: [L, n, H, D], on the first's device."""
    pairs = [layer.dense.view() for layer in memory.memory_layers()]
    device = pairs[0][0].device
    k, v = (torch.stack([x[0].transpose(0, 1).to(device) for x in side]) for side in zip(*pairs, strict=True))
    return k, v


def _windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], effort: Effort, seed: int
) -> tuple[recall.Windows, list[Tensor], Effort]:
    """Windows of the texts' beginnings, a third with hidden facts; their ends' tokens; the effort that they allow."""
    if not texts or not any(text.strip() for text in texts):
        raise ValueError("there is no text to fit a codec on")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    texts = [text for text in texts if text.strip()]
    if min(map(count, texts)) * (1 - APART) < effort.tokens + 1:
        texts = ["\n\n".join(texts)]
    begun = [text[: int(len(text) * (1 - APART))] for text in texts]
    tokens = min(effort.tokens, *(count(text) - 1 for text in begun))
    if tokens < SHORTEST:
        raise ValueError(f"the text has {tokens} tokens to fit on, at least {SHORTEST} are needed: give longer text")
    effort = replace(effort, tokens=tokens, scored=min(effort.scored, tokens // 4))
    asked = effort.windows // 3
    rows = recall.windows(
        tokenizer, begun, tokens - effort.scored - 1, effort.scored, effort.windows - asked, asked, seed
    )
    ends = []
    for text, start in zip(texts, map(len, begun), strict=True):
        ids = tokenizer(text[start:], add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[0]
        whole = min(effort.apart, (len(ids) - RAW) // TOKENS, (effort.tokens - RAW) // TOKENS)
        if whole > 0:
            ends.append(opened(tokenizer, ids[None, : RAW + whole * TOKENS].clone())[0])
    if sum((len(ids) - RAW) // TOKENS for ids in ends) < 2:
        raise ValueError(
            f"the last fifth of the text has less than two segments of {TOKENS} tokens, which the sizes are found on: "
            "give longer text"
        )
    return replace(rows, ids=opened(tokenizer, rows.ids)), ends, effort
