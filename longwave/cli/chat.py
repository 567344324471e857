"""longwave chat: a talk of many turns with a model, over documents, with what its cache holds in the prompt line."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator
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
from longwave.cli.prefix import prefix_ids
from longwave.cli.reading import reading
from longwave.cli.talk import SIZE, Talk

ORDERS = f"/save PATH [SIZE or exact; else {SIZE} of 16-bit bytes], /load PATH, /quit; Ctrl-C ends an answer"


def command(
    model: Annotated[
        str, typer.Argument(help='Hub id, local path, or "smollm2" (a small model, fetched once).')
    ] = "smollm2",
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="A document to talk about; repeats.")] = None,
    method: MethodName = "dense",  # of which the codec has K and V; what merges or drops tokens is saved exactly
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

        from longwave.plan.profile import Profile
        from longwave.shape import context_limit

        measured = Profile.load(profile) if profile is not None else None
        source = Source(model, device, dtype, extend_to, extend_rule)
        if not source.tokenizer.chat_template:
            raise ValueError("this tokenizer has no chat template, so its model knows no turns: use longwave generate")
        documents = prefix_ids(source.tokenizer, text, True) if text else None
        if documents is not None:
            source.check_length(documents.shape[1], 1)
        limit = context_limit(source.skeleton)
        source.check(chosen, budget, limit)
        loaded = source.load()
        torch.manual_seed(seed)

        def fresh() -> Any:
            return source.cache(loaded, chosen, budget, measured, limit, measure)

        talk = Talk(loaded, source.tokenizer, fresh, limit, max_new_tokens, choice)
        if documents is not None:
            with reading(loaded, documents.shape[1], prefill_chunk):
                talk.read(documents)
        say(ORDERS)
        for line in lines(talk.held):
            before = talk.memory.get_seq_length()
            try:
                if line.startswith("/"):
                    if line.split() == ["/quit"]:
                        return
                    say(order(talk, line))
                else:
                    answer(talk, line)
            except (ValueError, NotImplementedError, OSError) as error:
                if talk.memory.get_seq_length() != before:  # half an answer is read: this talk is over
                    raise
                say(f"longwave: {error}")


def lines(held: Callable[[], str]) -> Iterator[str]:
    """What is typed, until it ends. Ctrl-C forgets a line."""
    while True:
        try:
            line = input(f"[{held()}] > ").strip()
        except (EOFError, KeyboardInterrupt) as end:
            print()
            if isinstance(end, EOFError):
                return
            continue
        if line:
            yield line


def order(talk: Talk, line: str) -> str:
    """Do what a line with a slash says; what to answer. ValueError for what there is not."""
    orders: dict[str, tuple[Callable[..., str], range]] = {
        "/save": (talk.save, range(1, 3)),
        "/load": (talk.load, range(1, 2)),
    }
    name, *given = shlex.split(line)
    do, counts = orders.get(name, (None, range(0)))
    if do is None or len(given) not in counts:
        raise ValueError(f"there is {ORDERS}")
    try:
        return do(*given)
    except KeyboardInterrupt:  # files and talks change whole or not at all
        return "stopped"


def answer(talk: Talk, question: str) -> None:
    """Print the answer as it comes."""
    from transformers import TextStreamer

    ids = talk.ask(question)
    new = ids.shape[1] - talk.memory.get_seq_length()
    streamer = TextStreamer(talk.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with interruptible() as stop, reading(talk.model, new, talk.choice.get("prefill_chunk_size")) as done:
        talk.answer(ids, streamer, [Read(done)], [stop])


class Stop:
    """A stopping criterion: the first Ctrl-C ends an answer behind the token under way. A second one is Python's."""

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
