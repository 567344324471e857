"""How methods and tasks are written: NAME or NAME:option=value,option=value, as in "fourier:budget=0.25,window=64".

A comma starts the next option only where NAME= follows; elsewhere it continues a list, so that
"needle:lengths=1000,2000,depths=0,0.5" has two lengths and two depths. A text in quotes may hold commas.
"""

from __future__ import annotations

import ast
import re
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
