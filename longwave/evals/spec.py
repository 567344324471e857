"""How methods and tasks are written: NAME or NAME:option=value,option=value, as in "fourier:budget=0.25,window=64".

A comma starts the next option only where NAME= follows; elsewhere it continues a list, so that
"needle:lengths=1000,2000,depths=0,0.5" has two lengths and two depths. A text in quotes may hold commas.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from typing import Any

OPTION = re.compile(r",\s*(?=[A-Za-z_]\w*\s*=)")


def parse_value(text: str) -> Any:
    """A Python literal where it is one, the text itself otherwise: "0.25" -> 0.25, "dct" -> "dct"."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):  # TypeError: "{[]: 1}"
        return text


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """ "fourier:budget=0.25,keep=(0.1,0.4)" -> ("fourier", {"budget": 0.25, "keep": (0.1, 0.4)})."""
    name, colon, rest = text.strip().partition(":")
    if not name or (colon and not rest):
        raise ValueError(f'a method or task is NAME or NAME:option=value,option=value; got "{text}"')
    options: dict[str, Any] = {}
    for item in OPTION.split(rest) if rest else []:
        key, equals, value = item.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key.strip()):
            raise ValueError(f'an option is NAME=VALUE, got "{item}" in "{text}"')
        if key.strip() in options:
            raise ValueError(f'option {key.strip()!r} is given twice in "{text}"')
        value = value.strip()
        whole = parse_value(value)
        if whole == value and "," in value:  # a list of words, or of numbers and words
            whole = tuple(parse_value(part.strip()) for part in value.split(",") if part.strip())
        options[key.strip()] = whole
    return name.strip(), options


def as_spec(item: Any) -> str:
    """A recipe's entry, a text or a mapping {name: ..., option: ...}, as the text of a spec."""
    if isinstance(item, str):
        return item.strip()
    if isinstance(item, dict) and isinstance(item.get("name"), str):
        written = (
            f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in item.items()
            if key != "name"
        )
        return item["name"] + (":" if len(item) > 1 else "") + ",".join(written)
    raise ValueError(f"a method or task in a recipe is a text or a mapping with a name, got {item!r}")


SAMPLED = ("steps", "threshold", "block_length")  # what the answers of a masked-diffusion model are compared at


STOCK = "transformers-quantized"  # the name of `longwave.evals.stock.Quantized`, which is no method of ours


def is_dense(method: str) -> bool:
    """Whether a label is of the model as it is: "dense", and of a masked-diffusion model dense that holds nothing."""
    return method == "dense" or (method.startswith("dense:") and "keep" not in _options(method))


def dense_of(method: str, methods: Iterable[str]) -> str | None:
    """Which of `methods` another one's scores are held against: dense, sampled alike. None for dense itself."""
    if is_dense(method):
        return None
    wanted = _sampled(method)
    return next((label for label in methods if is_dense(label) and _sampled(label) in ({}, wanted)), None)


def _sampled(method: str) -> dict[str, Any]:
    return {name: value for name, value in _options(method).items() if name in SAMPLED}


def _options(method: str) -> dict[str, Any]:
    try:
        return parse_spec(method)[1]
    except ValueError:  # of a damaged folder
        return {}
