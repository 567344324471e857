"""What the commands share: options that mean the same in each, loading a model, and the methods there are.

torch and transformers are imported when they are used, so that the command line itself starts at once.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from longwave.cli.console import stderr, waiting
from longwave.evals.spec import parse_value

Model = Annotated[str, typer.Option(help='Hub id, local path, or "smollm2" (a small model from PyPI).')]
MethodName = Annotated[str, typer.Option("--method", help="How to hold the cache: a name of those below.")]
Budget = Annotated[
    str | None,
    typer.Option(
        help='Fraction of the dense bytes ("0.25") or a size ("512MiB"); some methods, as fourier-paper, take none.'
    ),
]
ProfilePath = Annotated[
    Path | None, typer.Option(help="Profile made by `longwave calibrate`; the shipped one otherwise.")
]
OptionList = Annotated[list[str] | None, typer.Option("--option", "-o", help="Method option, NAME=VALUE; repeats.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", "mps".')]
Dtype = Annotated[str, typer.Option(help='"auto", "float32", "bfloat16", "float16".')]


def parse_options(items: list[str] | None) -> dict[str, Any]:
    """["segment=512", "keep=(0.1, 0.4)"] -> {"segment": 512, "keep": (0.1, 0.4)}."""
    options = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"a method option is NAME=VALUE, got {item!r}")
        options[name] = parse_value(value)
    return options


def first_line(cls: type) -> str:
    """What a method or a task is, in a line: the first one of its docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def options_of(cls: Any) -> list[str]:
    """The options that a user may set."""
    return [field.name for field in fields(cls) if not field.name.startswith("_")]


class WithMethods(TyperCommand):
    """A command whose help ends with the methods there are. They are looked up when it is shown: that imports torch."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from longwave.methods import METHODS

        options = {name: ", ".join(options_of(cls)) or "none" for name, cls in METHODS.items()}
        lines = [f"{name}: {first_line(cls)} Options: {options[name]}." for name, cls in METHODS.items()]
        self.epilog = escape("\n\n".join(["Methods:", *lines]))
        super().format_help(ctx, formatter)


def load_model(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers.utils import logging

    from longwave.models import load

    # transformers 5.24 renames the argument to `cache`, which earlier ones do not know; the old name works until 5.40
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    warnings.showwarning = _show_warning
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    choices = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in choices:
        raise ValueError(f"dtype is one of {', '.join(choices)}, got {dtype!r}")
    with waiting(f"loading {model}"):
        loaded: Any
        loaded, tokenizer = load(model, dtype=choices[dtype])
        try:
            return loaded.to(device), tokenizer
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"cannot use device {device!r}: {error}") from None


def _show_warning(message: object, *_: object, **__: object) -> None:
    """One line without the place in the code."""
    stderr.print(f"longwave: {message}", highlight=False, soft_wrap=True, markup=False)


def check_length(model: Any, tokens: int, new: int) -> None:
    from longwave.shape import context_limit

    limit = context_limit(model)
    if limit is not None and tokens + new > limit:
        raise ValueError(f"{tokens} tokens of prompt and {new} new ones exceed this model's context of {limit}")
