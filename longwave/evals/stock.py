"""transformers' own QuantizedCache as a method of the evaluation, so that ours are compared with what users have.

It quantises a prompt right after its exact pass, all of it, and keeps later tokens dense until `residual_length` of
them wait. It cannot select rows, and scales may span rows, so every prompt is read by itself, in a pass of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from inspect import signature
from typing import Any, ClassVar

import torch
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, QuantizedCache
from transformers.cache_utils import QuantizedLayer

from longwave.checks import nearest, whole
from longwave.evals.spec import STOCK
from longwave.frame import Report, storage_bytes

# backend -> the package it needs, the bits and the axes it takes; fp8 is torch's own and has no options
BACKENDS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "quanto": ("optimum-quanto", (2, 4), (0, -1)),
    "hqq": ("hqq", (1, 2, 3, 4, 8), (0, 1)),
    "fp8": ("", (), ()),
}


@dataclass(frozen=True)
class Quantized:
    """transformers' own QuantizedCache, with its options; what is left out is the class's default.

    backend: "quanto", "hqq" or "fp8" (8 bits, takes no other option). nbits: of a code. axis_key, axis_value,
    q_group_size: which numbers share a scale. residual_length: tokens after the prompt that wait dense, at most.
    """

    name: ClassVar[str] = STOCK

    backend: str = "quanto"
    nbits: int | None = None
    axis_key: int | None = None
    axis_value: int | None = None
    q_group_size: int | None = None
    residual_length: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is one of {', '.join(BACKENDS)}; got {self.backend!r}")
        _, bits, axes = BACKENDS[self.backend]
        given = [name for name, value in asdict(self).items() if name != "backend" and value is not None]
        if self.backend == "fp8":
            if given:
                raise ValueError(f"backend=fp8 has one scale a layer and takes no other option; got {', '.join(given)}")
            return
        usual = signature(QuantizedLayer.__init__).parameters
        for field in fields(self)[1:]:
            if field.name not in given:
                object.__setattr__(self, field.name, usual[field.name].default)
        for name, allowed in (("nbits", bits), ("axis_key", axes), ("axis_value", axes)):
            value = getattr(self, name)
            if isinstance(value, bool) or value not in allowed:
                raise ValueError(
                    f"{name} is one of {', '.join(map(str, allowed))} with backend={self.backend}; got {value!r}"
                )
        for name, unit in (("q_group_size", "numbers"), ("residual_length", "tokens")):
            whole(name, getattr(self, name), 1, unit)

    def __str__(self) -> str:
        settings = (f"{name}={value}" for name, value in asdict(self).items() if value is not None)
        return f"QuantizedCache({', '.join(settings)})"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Quantized:
        """From the options of a spec; an unknown one is an error that suggests the nearest."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(f"{cls.name} has no option {name!r}; {nearest(name, known)}")
        return cls(**options)

    def check_backend(self) -> None:
        """Store and read a few numbers: a backend that is absent or broken is found before a model is loaded.

        The first time, quanto compiles an extension here, which takes a minute or two.
        """
        group = self.q_group_size or 1
        x = torch.zeros(1, 1, 8 * group, group)  # whole groups, and whole bytes of codes, along every axis
        try:
            (layer,) = StockCache(self, LlamaConfig(num_hidden_layers=1)).layers
            for _ in range(2):  # the second update reads what the first one stored
                layer.update(x, x)
        except ImportError as error:
            package = BACKENDS[self.backend][0]
            raise ValueError(
                f"{self.name} with backend={self.backend} needs {package}: pip install -U {package}"
            ) from error
        except Exception as error:  # whatever a backend does where it cannot work
            raise ValueError(f"{self} does not work here: {_first_line(error)}") from error

    def cache(self, model: PreTrainedModel, rows: int = 1) -> StockCache:
        """An empty cache. Raises ValueError where transformers does not quantise what this model stores."""
        if rows != 1:
            raise ValueError(f"{self.name} reads one prompt at a time, not {rows}: its scales may span rows")
        return StockCache(self, model.config)


class StockCache(QuantizedCache):
    """QuantizedCache that knows what it holds; nothing else is changed."""

    layers: list[Any]

    def __init__(self, quantized: Quantized, config: PretrainedConfig):
        super().__init__(config=config, **asdict(quantized))
        package = BACKENDS[quantized.backend][0]
        self.method = f"{quantized}, {package} {version(package)}" if package else str(quantized)
        self._token_bytes = [0] * len(self.layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' own. A length that the groups do not divide is an error that says what fits."""
        self._token_bytes[layer_idx] = (key_states.nbytes + value_states.nbytes) // key_states.shape[-2]
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{self.method} cannot hold {self.get_seq_length(layer_idx)} tokens of this model: "
                f"{_first_line(error)}. axis_key=0, axis_value=0 and a q_group_size that divides the head's "
                f"{key_states.shape[-1]} channels fit any length"
            ) from error

    def report(self) -> Report:
        """Bytes of the storages that the layers hold, scales and zero points included, and of a dense cache."""
        held: dict[str, list[torch.Tensor]] = {"quantized": [], "dense": []}
        for layer in self.layers:
            for name, value in vars(layer).items():
                held["dense" if name in ("keys", "values") else "quantized"] += _plain(value)
        parts = {name: storage_bytes(tensors) for name, tensors in held.items()}
        lengths = [layer.get_seq_length() for layer in self.layers]
        dense = sum(size * tokens for size, tokens in zip(self._token_bytes, lengths, strict=True))
        nbytes = sum(parts.values())
        return Report(
            self.method, tokens=lengths[0], held=lengths[0], batch=1, nbytes=nbytes, dense_nbytes=dense, parts=parts
        )


def _plain(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that own storage. A backend's wrapper names what it wraps; by itself it would claim dense bytes."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _plain(getattr(value, name))
        else:
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _plain(item)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
