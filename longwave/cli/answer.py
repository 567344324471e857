"""What `longwave generate` and `longwave chat` share: how an answer is sampled, decoded and watched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from this many tokens at most.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from the tokens that make up this share.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
PrefillChunk = Annotated[int | None, typer.Option(min=1, help="Read in chunks of this many tokens.")]


def told(temperature: float, top_k: int | None, top_p: float | None, prefill_chunk: int | None) -> dict[str, Any]:
    """What `generate` is told of how to read and to choose tokens. ValueError for options that decide nothing."""
    chosen = {name: value for name, value in (("top_k", top_k), ("top_p", top_p)) if value is not None}
    if chosen and not temperature:
        raise ValueError("--top-k and --top-p choose what is sampled from: give a --temperature above 0")
    how = {"do_sample": True, "temperature": temperature, **chosen} if temperature else {"do_sample": False}
    return how | ({"prefill_chunk_size": prefill_chunk} if prefill_chunk else {})


def why_python(device: Any, graph: bool | None) -> str | None:
    """Why transformers' own loop decodes, as far as the device and the options say it."""
    if graph is False:
        return "--no-graph"
    return f"a graph needs CUDA, and the model is on {device.type}" if device.type != "cuda" else None


def loop_of(model: Any, why: str | None, compiled: bool = False) -> Callable[..., Any]:
    """`generate` of transformers where there is a reason `why`, else ours."""
    import longwave

    return model.generate if why else partial(longwave.generate, model, compile=compiled)


class Read:
    """A logits processor that changes nothing: the first call says that the prompt is read."""

    def __init__(self, done: Callable[[], None]):
        self.done = done

    def __call__(self, ids: Any, scores: Any) -> Any:
        self.done()
        return scores
