"""A fitted codec, its dial from size to step, and its file: safetensors, and what it is of as JSON beside them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from longwave.codec.blob import CodecError
from longwave.codec.fitted import Fitted
from longwave.codec.segment import SegmentCodec
from longwave.plan.fingerprint import fingerprint, same
from longwave.shape import CacheShape

FORMAT, VERSION = "longwave-codec", 2


@dataclass(frozen=True, eq=False)
class Codec:
    """What coding a model's cache needs, whatever the size.

    fitted: the numbers. curve: (step, size) by rising step, sizes as measured on windows that made neither bases nor
    tables. model: its id and `fingerprint`. about: what it was fitted on, and how.
    """

    fitted: Fitted
    curve: tuple[tuple[int, float], ...]
    model: dict[str, Any]
    about: dict[str, Any]

    @property
    def sizes(self) -> tuple[float, float]:
        """The least and the largest size that `at` takes."""
        return self.curve[-1][1], self.curve[0][1]

    def at(
        self, size: float, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> SegmentCodec:
        """The codec whose segments take `size` of their K and V in 16 bits, on average over text like its own.

        device, dtype: where and in what it computes. ValueError for a size outside `sizes`.
        """
        least, most = self.sizes
        if not least <= size <= most:
            raise ValueError(f"size is a fraction of the bytes in 16 bits, {least:.3f} to {most:.3f} here; got {size}")
        return SegmentCodec(self.fitted, self.step(size), size, device, dtype)

    def step(self, size: float) -> int:
        """The least step that is expected to take no more than `size`."""
        for (j, larger), (k, smaller) in zip(self.curve, self.curve[1:], strict=False):
            if size >= smaller:
                share = math.log(larger / size) / math.log(larger / smaller)
                return min(k, j + math.ceil(max(0.0, share) * (k - j) - 1e-9))
        return self.curve[-1][0]

    def check(self, model: PreTrainedModel) -> None:
        """ValueError unless it was fitted on `model`, or on another form of it that makes the same K and V."""
        shape, name = CacheShape.of(model.config.get_text_config(decoder=True), model.dtype), self.model.get("id")
        ours = (self.fitted.layers, self.fitted.kv_heads, self.fitted.head_dim)
        theirs = (len(shape.memory_layers), shape.kv_heads, shape.head_dim)
        if ours != theirs:
            raise ValueError(
                f"the codec is of {name or 'another model'}, {'x'.join(map(str, ours))} layers x heads x channels; "
                f"this model has {'x'.join(map(str, theirs))}"
            )
        if not same(fingerprint(model, shape.memory_layers), self.model.get("fingerprint", {})):
            raise ValueError(
                f"the codec is of {name or 'another model'}, and this model's weights differ: fit one with "
                "longwave.codec.fit(model, tokenizer)"
            )

    def save(self, path: str | Path) -> None:
        """Write the codec, whole or not at all."""
        path, fitted = Path(path), self.fitted
        said = {
            "layers": fitted.layers, "kv_heads": fitted.kv_heads, "head_dim": fitted.head_dim, "groups": fitted.groups,
            "limit": fitted.places.limit if fitted.places else 0, "cosines": fitted.cosines, "curve": self.curve,
            "model": self.model, "about": self.about, "fingerprint": fitted.fingerprint.hex(),
        }  # fmt: skip
        metadata = {"format": FORMAT, "version": str(VERSION), "codec": json.dumps(said)}
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file({name: x.contiguous().clone() for name, x in fitted.tensors()}, partial, metadata)
            partial.replace(path)
        except SafetensorError as error:  # its own name for a full disk
            raise OSError(f"cannot write {path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Codec:
        """Read one. FileNotFoundError where there is none, CodecError for a file that is no codec, or damaged."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no codec at {path}")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CodecError(f"{path} is not a longwave codec")
                if metadata.get("version") != str(VERSION):
                    raise CodecError(
                        f"{path} is a codec of version {metadata.get('version')}, this longwave reads {VERSION}: fit "
                        "it again"
                    )
                said = json.loads(metadata["codec"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            groups = tuple((int(first), int(last)) for first, last in said["groups"])
            fitted = Fitted.from_tensors(
                tensors, said["layers"], said["kv_heads"], said["head_dim"], groups, said["limit"], said["cosines"]
            )
            curve = tuple((int(step), float(size)) for step, size in said["curve"])
            if fitted.fingerprint.hex() != said["fingerprint"] or not curve:
                raise CodecError(f"{path} is damaged: its numbers are not those that were saved")
            return cls(fitted, curve, said["model"], said["about"])
        except CodecError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise CodecError(f"{path} is damaged: {error}") from None
