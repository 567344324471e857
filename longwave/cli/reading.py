"""What is shown while a prompt is read: a bar of the layers that have read it, where somebody is watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

from longwave.cli import console


@contextmanager
def reading(model: Any, tokens: int, chunk: int | None = None) -> Iterator[Callable[[], None]]:
    """A bar for passes over `tokens` tokens, of `chunk` each where that is given. Yields what ends it early.

    Without a terminal the model is left alone. A method that reads twice waits with a full bar.
    """
    with ExitStack() as shown:
        if console.stderr.is_terminal:
            advance = shown.enter_context(console.progress(f"reading {tokens:,} tokens"))
            layers = layers_of(model)
            done, total = count(1), len(layers) * -(-tokens // (chunk or tokens or 1))

            def read(*_: Any) -> None:
                advance(min(next(done), total), total)

            for layer in layers:
                shown.callback(layer.register_forward_hook(read).remove)
        yield shown.close


def layers_of(model: Any) -> list[Any]:
    """The decoder's layers: the longest list among its own parts."""
    from torch.nn import ModuleList

    lists = [list(part) for part in model.get_decoder().children() if isinstance(part, ModuleList)]
    return max(lists, key=len, default=[])
