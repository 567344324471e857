"""A codec for a model that was given none: one that was fitted before, or one that is fitted now, and kept beside the
model's profile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from longwave.codec.blob import CodecError
from longwave.codec.file import Codec
from longwave.codec.fit import fit
from longwave.plan import automatic
from longwave.plan.fingerprint import digest, fingerprint
from longwave.plan.once import made_once, name_of
from longwave.shape import CacheShape, check_supported

_lock = threading.Lock()  # two threads that ask for one model fit it once


def codec_for(model: PreTrainedModel, tokenizer: Any = None) -> Codec:
    """The codec of `model`: kept from before, or fitted now, in a minute or so, on text that ships with the package.

    tokenizer: of the model; None looks for it where the model came from, should one be needed. Raises what `fit`
    raises, and ValueError where no tokenizer is found.
    """
    shape = CacheShape.of(check_supported(model), model.dtype)
    with _lock:
        kept = _kept(model, shape)
        if kept is not None:
            return kept
        tokenizer = tokenizer or automatic._tokenizer(model)
        if tokenizer is None:
            raise ValueError("this model has no codec yet, and its tokenizer was not found: pass tokenizer=")
        return _fitted(model, tokenizer, shape)


def kept_codec(model: PreTrainedModel) -> Codec | None:
    """The codec of `model` that is kept from before, None where none is."""
    return _kept(model, CacheShape.of(check_supported(model), model.dtype))


def _stem(shape: CacheShape) -> str:
    return f"codec-{len(shape.memory_layers)}x{shape.kv_heads}x{shape.head_dim}"


def _kept(model: PreTrainedModel, shape: CacheShape) -> Codec | None:
    """What was fitted before on this model, or on another form of it. What is damaged is fitted again."""
    for path in sorted(automatic._folder().glob(f"{_stem(shape)}-*.safetensors")):
        try:
            found = Codec.load(path)
            found.check(model)
        except (OSError, ValueError, CodecError):
            continue
        return found
    return None


def _fitted(model: PreTrainedModel, tokenizer: Any, shape: CacheShape) -> Codec:
    path: Path = automatic._folder() / f"{_stem(shape)}-{digest(fingerprint(model, shape.memory_layers))}.safetensors"
    return made_once(
        lambda advance: fit(model, tokenizer, progress=advance),
        path,
        f"fitting a codec to {name_of(model)}, once",
        ("fitting", "fitted", "fits"),
        "window",
    )
