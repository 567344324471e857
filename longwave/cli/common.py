"""What the commands share: options that mean the same in each, loading a model, and the methods there are.

torch and transformers are imported when they are used, so that the command line itself starts at once.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from longwave.budget import parse_budget
from longwave.checks import check_options, read_text
from longwave.cli.console import stderr, waiting
from longwave.cli.listing import methods
from longwave.evals.spec import parse_value

Model = Annotated[str, typer.Option(help='Hub id, local path, or "smollm2" (a small model, fetched once).')]
MethodName = Annotated[str, typer.Option("--method", help="How to hold the cache: a name of those below.")]
Budget = Annotated[
    str | None,
    typer.Option(
        help='Fraction of the dense bytes ("0.25") or a size ("512MiB"); some methods, as fourier-paper, take none.'
    ),
]
ProfilePath = Annotated[
    Path | None, typer.Option(help="Profile made by `longwave calibrate`; else the model's own, measured if need be.")
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure/--no-measure", help="Whether a model without a profile is measured, once, or planned safely."
    ),
]
ExtendTo = Annotated[
    int | None, typer.Option(help="Read so many tokens, beyond those that the model was trained on, by --extend-rule.")
]
ExtendRule = Annotated[
    str | None, typer.Option(help='Rotary tables for it: "ntk" (the default), "ntk_fixed", "yarn", "linear" ...')
]
OptionList = Annotated[list[str] | None, typer.Option("--option", "-o", help="Method option, NAME=VALUE; repeats.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[
    str, typer.Option(help='"auto" (CUDA, MPS or CPU, the first there is), "cpu", "cuda", "cuda:1", "mps".')
]
Dtype = Annotated[
    str, typer.Option(help='"auto" (16 bits where model and device have them), "float32", "bfloat16", "float16".')
]


def parse_options(items: list[str] | None) -> dict[str, Any]:
    """["segment=512", "keep=(0.1, 0.4)"] -> {"segment": 512, "keep": (0.1, 0.4)}."""
    options = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"a method option is NAME=VALUE, got {item!r}")
        options[name] = parse_value(value)
    return options


def read_method(name: str, items: list[str] | None, budget: str | None = None, dtype: str = "auto") -> Any:
    """The method that a command was told of. Raises ValueError for it, its options, a budget or a type that there
    cannot be: what is only misspelt is said before torch is imported."""
    options = parse_options(items)
    check_options(name, options, {each: about.options for each, about in methods().items()}, "method")
    if budget is not None:
        parse_budget(budget)
    check_dtype(dtype)
    from longwave.methods import get_method

    return get_method(name, **options)


def check_dtype(dtype: str) -> None:
    choices = ("auto", "float32", "bfloat16", "float16")
    if dtype not in choices:
        raise ValueError(f"dtype is one of {', '.join(choices)}, got {dtype!r}")


class WithMethods(TyperCommand):
    """A command whose help ends with the methods there are."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        lines = [
            f"{name}: {about.what} Options: {', '.join(about.options) or 'none'}." for name, about in methods().items()
        ]
        self.epilog = escape("\n\n".join(["Methods:", *lines]))
        super().format_help(ctx, formatter)


def read_document(path: Path) -> str:
    """A text that a user named, "-" for standard input. ValueError where it is not UTF-8, or empty."""
    if path != Path("-"):
        return read_text(path, blank=False)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("standard input is not UTF-8 text") from None
    if not text.strip():
        raise ValueError("standard input is empty")
    return text


class Source:
    """A model of which everything is read but its weights: what is wrong with it, or asked of it, is said before them.

    tokenizer: its tokenizer. device, dtype: what it will be on and in. skeleton: the model on the meta device.
    extend_to: tokens that it is to read beyond those it was trained on, by the rotary tables of `rule`.
    """

    def __init__(self, model: str, device: str, dtype: str, extend_to: int | None = None, rule: str | None = None):
        check_dtype(dtype)
        import torch
        from transformers.utils import logging

        from longwave import models
        from longwave.rotary import extend

        warnings.showwarning = _show_warning
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.device = models.find_device(device)
        self._model, self._dtype = model, dtype
        self._longer: dict[str, Any] = {} if extend_to is None else {"extend_to": extend_to, "rule": rule}
        models.check_extension(extend_to, rule)
        with models.readable(model):
            path = models.locate(model)
            config = models.load_config(path)
            half = models.half_type(self.device)
            own = models.checkpoint_dtype(config, half) or half
            found = own if dtype == "auto" else getattr(torch, dtype)
            if extend_to is not None:
                stderr.print(f"longwave: {extend(config, extend_to, rule or 'ntk')}", highlight=False, markup=False)
            self.skeleton = models.skeleton(config, found)
            self.tokenizer: Any = models.load_tokenizer(path)

    def check(self, method: Any, budget: Any, max_tokens: int | None = None) -> Any:
        """Raise what `longwave.cache` would for a method and a budget, as far as it can be told without weights. What
        they bind to without a measurement, where there is such a thing."""
        from longwave.build import check

        if what := method.beforehand():
            raise ValueError(f"the command has one model, and {what}")
        method.check(self.device)
        return check(self.skeleton, method, budget, max_tokens)

    def check_length(self, tokens: int, new: int, bound: Any = None, chunk: int | None = None) -> int | None:
        """Raise ValueError for more tokens than the model reads, with the cache of `bound` where there is one, or in a
        pass of `chunk`. Else the tokens that a pass brings, None for all."""
        from longwave.shape import context_limit

        limit = context_limit(self.skeleton)
        reach = limit if limit is None or bound is None else bound.reach(limit)
        if reach is None or tokens + new <= reach:
            return chunk if bound is None else bound.passes(tokens, limit, chunk)
        said = f"{tokens} tokens of prompt and {new} new ones exceed "
        if bound is None:
            raise ValueError(f"{said}this model's context of {limit}")
        if reach != limit:
            raise ValueError(f"{said}the {reach} that {bound.method.name} reads with this model's context of {limit}")
        raise ValueError(f"{said}this model's context of {limit}: --method infllm reads any length, --extend-to more")

    def cache(self, loaded: Any, method: Any, budget: Any, profile: Any, coming: int | None, measure: bool) -> Any:
        """An empty cache on the loaded model. A budget given as a size is spent on the `coming` tokens, on the
        model's window where that is None."""
        import longwave
        from longwave.build import sized

        room = coming if sized(budget) else None
        return longwave.cache(
            loaded, method, budget, profile, max_tokens=room, measure=measure, tokenizer=self.tokenizer
        )

    def load(self) -> Any:
        """The model."""
        from longwave import models

        with waiting(f"loading {self._model}"):
            return models.load(self._model, device=self.device, dtype=self._dtype, **self._longer)[0]


def load_model(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    source = Source(model, device, dtype)
    return source.load(), source.tokenizer


def named(dtype: Any) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def encode(tokenizer: Any, text: str, chat: bool) -> Any:
    """A user's turn as token ids, in the chat template where one is wanted and there."""
    if not (chat and tokenizer.chat_template):
        return tokenizer(text, return_tensors="pt", verbose=False)
    return _template(tokenizer, text, return_tensors="pt", return_dict=True)


def filled_in(tokenizer: Any, *said: str) -> str:
    """What a user said, the model, the user ... in the chat template, as text, up to where an answer begins."""
    return _template(tokenizer, *said, tokenize=False)


def _template(tokenizer: Any, *said: str, **options: Any) -> Any:
    from jinja2 import TemplateError

    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
    except TemplateError as error:
        raise ValueError(f"this tokenizer's chat template fails ({error}): pass --no-chat") from None


def _show_warning(message: object, *_: object, **__: object) -> None:
    """One line without the place in the code."""
    stderr.print(f"longwave: {message}", highlight=False, soft_wrap=True, markup=False)
