"""longwave chat: a talk of many turns with a model, over documents, with what its cache holds in the prompt line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from longwave.checks import read_text
from longwave.cli.answer import MaxNewTokens, PrefillChunk, Read, Seed, Temperature, TopK, TopP, told
from longwave.cli.common import (
    Budget,
    Device,
    Dtype,
    ExtendRule,
    ExtendTo,
    Measure,
    MethodName,
    OptionList,
    ProfilePath,
    Source,
    read_method,
)
from longwave.cli.console import say, user_errors
from longwave.cli.orders import QUIT, obey
from longwave.cli.prefix import prefix_ids
from longwave.cli.reading import reading
from longwave.cli.talk import Talk
from longwave.cli.typed import history, lines
from longwave.fetch import cache_folder

HISTORY = "chat-history"  # in longwave's cache folder


def command(
    model: Annotated[
        str, typer.Argument(help='Hub id, local path, or "smollm2" (a small model, fetched once).')
    ] = "smollm2",
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="A document to talk about; repeats.")] = None,
    method: MethodName = "fourier",
    budget: Budget = None,
    profile: ProfilePath = None,
    measure: Measure = True,
    extend_to: ExtendTo = None,
    extend_rule: ExtendRule = None,
    option: OptionList = None,
    max_new_tokens: MaxNewTokens = 400,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    prefill_chunk: PrefillChunk = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model, over documents: many turns, one cache, which /save keeps and /load takes up again."""
    with user_errors():
        if Path("-") in (file or []):
            raise ValueError("standard input is where questions come from: give --file a file")
        text = "\n\n".join(read_text(path, blank=False) for path in file or [])
        choice = told(temperature, top_k, top_p, prefill_chunk)
        chosen = read_method(method, option, budget, dtype)
        import torch

        from longwave.methods import Bound
        from longwave.plan.profile import Profile
        from longwave.shape import context_limit

        measured = Profile.load(profile) if profile is not None else None
        source = Source(model, device, dtype, extend_to, extend_rule)
        documents = prefix_ids(source.tokenizer, text, True) if text else None
        limit = context_limit(source.skeleton)
        bound = source.check(chosen, budget, limit)
        if documents is not None:
            source.check_length(documents.shape[1], 1, bound, prefill_chunk)
        loaded = source.load()
        torch.manual_seed(seed)

        def build(method: Any, budget: Any) -> Any:
            if isinstance(method, Bound):  # of a file: all is decided
                return source.cache(loaded, method, None, None, None, measure)
            source.check(method, budget, limit)
            profile = measured if method is chosen or method.uses_profile else None
            return source.cache(loaded, method, budget, profile, limit, measure)

        talk = Talk(loaded, source.tokenizer, build, chosen, budget, limit, max_new_tokens, choice)
        say(f"{model}: the talk is held by {talk.memory.method}; /method and /budget change that, /help says more")
        if not source.tokenizer.chat_template:
            say("its tokenizer has no chat template: it goes on with the text that you type")
        if documents is not None:
            talk.read(documents)
        with history(cache_folder() / HISTORY):
            for line in lines(talk.held):
                if line == QUIT:
                    return
                try:
                    say(obey(talk, line)) if line.startswith("/") else answer(talk, line)
                except BrokenPipeError:
                    raise
                except (ValueError, TypeError, NotImplementedError, OSError, torch.OutOfMemoryError) as error:
                    say(f"longwave: {error}")


def answer(talk: Talk, question: str) -> None:
    """Print the answer as it comes. Ctrl-C ends it behind the token under way; pressed again it ends at once, and then
    the question was not asked."""
    from transformers import TextStreamer

    ids = talk.ask(question)
    new = ids.shape[1] - talk.memory.get_seq_length()
    streamer = TextStreamer(talk.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with interruptible() as stop, reading(talk.model, new, talk.chunk(talk.memory, ids.shape[1])) as done:
            talk.answer(ids, streamer, [Read(done)], [stop])
    except KeyboardInterrupt:
        print()
        say("stopped at once: this question and its answer are forgotten")


class Stop:
    """A stopping criterion: the first Ctrl-C ends an answer behind the token under way, a second one raises."""

    wanted = False

    def interrupt(self, *_: Any) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        return ids.new_full((ids.shape[0],), self.wanted, dtype=bool)


@contextmanager
def interruptible() -> Iterator[Stop]:
    stop = Stop()
    before = signal.signal(signal.SIGINT, stop.interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
