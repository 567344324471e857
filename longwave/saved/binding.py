"""A `Bound` as JSON and tensors, and back: the same options and the very same plan, by its digest.

Only classes that are known here already are built, by name, from their dataclass fields; nothing is imported or run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from longwave.methods.base import Bound, Method
from longwave.ops.spectral.layout import Code
from longwave.plan.axes import Axes
from longwave.plan.plan import LayerCodes
from longwave.plan.planner import Expected
from longwave.shape import CacheShape

_VALUES: dict[str, Any] = {cls.__name__: cls for cls in (Axes, Code, LayerCodes, CacheShape, Expected)}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _below(cls: Any) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _below(sub)


def pack(bound: Bound) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(what JSON can say, tensors by name). NotImplementedError for a plan of what no file can hold."""
    tensors: dict[str, torch.Tensor] = {}
    met: dict[int, int] = {}  # layers may share their codes

    def packed(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (tuple, list)):
            return {"tuple" if isinstance(value, tuple) else "list": [packed(item) for item in value]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.Tensor):
            tensors[f"plan.{len(tensors)}"] = value
            return {"tensor": f"plan.{len(tensors) - 1}"}
        if id(value) in met:
            return {"again": met[id(value)]}
        cls = type(value)
        if not (is_dataclass(value) and (isinstance(value, (Bound, Method)) or _VALUES.get(cls.__name__) is cls)):
            raise NotImplementedError(
                f"{bound} decides by a {cls.__name__}, which cannot be saved: save K and V with size="
            )
        own = {field.name: packed(getattr(value, field.name)) for field in fields(value) if field.init}
        met[id(value)] = len(met)
        return {"class": cls.__name__ if cls.__name__ in _VALUES else _name(cls), "fields": own}

    return {"bound": packed(bound), "digest": bound.digest}, tensors


def unpack(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Bound:
    """The inverse. ValueError for a class that is not known here, or where the plan is not the same again."""
    classes = {_name(cls): cls for base in (Bound, Method) for cls in _below(base)} | _VALUES
    made: list[Any] = []

    def unpacked(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for kind, maker in (("tuple", tuple), ("list", list)):
            if kind in value:
                return maker(unpacked(item) for item in value[kind])
        if "dtype" in value:
            return getattr(torch, value["dtype"])
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "again" in value:
            return made[value["again"]]
        if value["class"] not in classes:
            raise ValueError(f"{value['class']} is not known here: import the module that has this method first")
        own = {name: unpacked(item) for name, item in value["fields"].items()}
        found = classes[value["class"]](**own)
        made.append(found)
        return found

    bound = unpacked(facts["bound"])
    if not isinstance(bound, Bound) or bound.digest != facts["digest"]:
        raise ValueError("the plan by which it was stored does not come out the same again in this longwave")
    return bound
