"""What a task is to the runner and the report: it makes samples, judges outputs and adds scores up.

A task is one file in `longwave/evals/tasks/`: a frozen dataclass whose fields are the options a user may set.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import TemplateError

from longwave.checks import nearest

# for chat templates that print today's date: prompts must not change with the day
NO_CLOCK = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro -%}"


@dataclass(frozen=True)
class Sample:
    """One prompt, tokenised once and given to every method.

    ids: the whole prompt, int32 token ids.
    context: the first `context` ids are read and compressed before the rest, the question, is seen; 1 <= context <
        len(ids). In a loss task the first id after them is fed and every later one scored.
    scored: of a loss task, the indices of the ids that count, rising, all behind the one that is fed first; None: all.
    meta: what the report groups by, such as {"length": 4000, "depth": 0.5}; JSON values.
    cut_from: tokens the prompt had before truncation, None where nothing was cut.
    stop_at_newline: generation ends at a newline token, but not before its first token.
    """

    id: str
    ids: array[int]
    context: int
    max_new_tokens: int = 0
    answers: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    cut_from: int | None = None
    stop_at_newline: bool = False
    scored: tuple[int, ...] | None = None

    @property
    def prompt_sha256(self) -> str:
        """Hash of the token ids: equal for every method that was given this prompt."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()


@dataclass(frozen=True)
class Judged:
    """score from 0 to 1, what was read out of the output, and further metrics the task adds up itself."""

    score: float
    parsed: Any
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What samples are made for: the tokenizer and room of a model, and the run's seed, limit and data.

    window: tokens the model reads at most, prompt and answer together; None where it names no limit.
    max_tokens: prompts of tasks with a truncation rule are cut to this many tokens, None: to what the window leaves.
    limit: at most this many samples of every set of a task.
    chat: whether prompts are wrapped in the tokenizer's chat template where the protocol asks for one.
    """

    tokenizer: Any
    window: int | None = None
    seed: int = 42
    limit: int | None = None
    data: Path | None = None
    max_tokens: int | None = None
    chat: bool = True

    @property
    def wraps(self) -> bool:
        return self.chat and bool(getattr(self.tokenizer, "chat_template", None))

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    @property
    def opening(self) -> list[int]:
        """The token that the tokenizer puts before every text, if it does."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a").input_ids[:1] == [bos] else []

    def added(self, chat: bool) -> int:
        """The same for a prompt whose protocol wants a chat template or not."""
        return len(self.encode("a b", "b", chat=chat)[0]) - self.count("a b")

    def render(self, prompt: str, prefix: str = "", system: str | None = None, chat: bool = True) -> str:
        """The text a model reads: the chat template around `prompt`, then `prefix`, which opens the model's turn."""
        if not (chat and self.wraps):
            return (f"{system}\n\n" if system else "") + prompt + prefix
        try:
            try:
                return self._fill(prompt, system) + prefix
            except TemplateError:  # no place for a system message: it opens the user's turn
                return self._fill(f"{system}\n\n{prompt}" if system else prompt, None) + prefix
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template fails ({error}): use --no-chat") from None

    def _fill(self, prompt: str, system: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        template = self.tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = NO_CLOCK + template
        return str(
            self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )

    def encode(
        self, prompt: str, question: str, prefix: str = "", system: str | None = None, chat: bool = True
    ) -> tuple[array[int], int]:
        """Token ids of the rendered prompt, and how many come before `question`, which ends the prompt.

        With question "" only the last token is left for after the compression.
        """
        special = not (chat and self.wraps)
        text = self.render(prompt, prefix, system, chat)
        told = self.tokenizer.is_fast  # one written in Python does not know where its tokens lie
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=told, verbose=False)
        ids = array("i", encoded.input_ids)
        if len(ids) < 2:
            raise ValueError(f"a prompt needs at least two tokens, got {len(ids)} from {prompt!r}")
        start = text.rfind(question.rstrip()) if question.strip() else -1
        if start < 0 and question.strip():
            start = text.rfind(question.strip())  # a template that trims a prompt which is all question
        if question.strip() and start < 0:
            raise ValueError(f"the chat template changes the question {question[:40]!r}: use --no-chat")
        before = len(ids) - 1
        if start >= 0 and told:
            before = next((i for i, (_, end) in enumerate(encoded.offset_mapping) if end > start), before)
        elif start >= 0:
            head = self.tokenizer(text[:start], add_special_tokens=special, verbose=False).input_ids
            before = next((i for i, pair in enumerate(zip(ids, head, strict=False)) if len(set(pair)) == 2), len(head))
        return ids, min(max(before, 1), len(ids) - 1)

    def spans(self, text: str) -> Sequence[tuple[int, int]]:
        """From where to where each token of a text reaches, in characters."""
        if not self.tokenizer.is_fast:
            return Spans(self.count, text)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found.offset_mapping

    def room(self, new_tokens: int, overhead: int = 0) -> int | None:
        """Tokens a prompt's own text may have beside `overhead` and the answer; None where there is no limit."""
        if self.window is None:
            return self.max_tokens
        left = self.window - new_tokens - overhead
        if left < 2:
            raise ValueError(
                f"{new_tokens} new tokens leave no room in this model's window of {self.window}: a model with a longer "
                "window is needed"
            )
        return left if self.max_tokens is None else min(left, self.max_tokens)

    def cut_middle(self, text: str, room: int | None) -> tuple[str, int | None]:
        """`text` with its middle removed where it has more than `room` tokens, and its tokens before that.

        LongBench's rule: the first and the last room // 2 tokens stay. (text, None) where nothing was cut.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if room is None or len(ids) <= room:
            return text, None
        half = max(1, room // 2)
        first, last = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
        return first + last, len(ids)

    def check_fits(self, tokens: int, new_tokens: int, what: str) -> None:
        """For tasks that build prompts of an exact length and have nothing to cut."""
        if self.window is not None and tokens + new_tokens > self.window:
            raise ValueError(
                f"{what} takes {tokens} tokens and {new_tokens} new ones, more than this model's window of "
                f"{self.window}: choose a shorter length, or a model with a longer window (in transformers, one loaded "
                "with RoPE scaling). Only tasks with a truncation rule (longbench, leval, ...) cut prompts"
            )

    def limited(self, items: Sequence[Any]) -> Sequence[Any]:
        """The first `limit` of a set."""
        return items if self.limit is None else items[: self.limit]


class Spans(Sequence[tuple[int, int]]):
    """`Setting.spans` for a tokenizer written in Python, which does not tell: found where they are asked for, by
    counting the tokens of a text's beginnings."""

    def __init__(self, tokens: Callable[[str], int], text: str):
        self.tokens, self.text = tokens, text
        self.length = tokens(text)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        number = range(self.length)[index]
        return self._end(number), self._end(number + 1)

    def _end(self, tokens: int) -> int:
        """The longest beginning of the text that has no more than `tokens` tokens."""
        return bisect_right(range(len(self.text) + 1), tokens, key=lambda size: self.tokens(self.text[:size])) - 1


@dataclass(frozen=True)
class Task(ABC):
    """Options of a task, checked when built. Subclasses are frozen dataclasses with a docstring.

    version: raise it when prompts or scores of the same options change; results of two versions are never mixed.
    columns: the meta key that splits scores into columns of a table ("" for none), in the order samples come.
    heat: (meta key of rows, meta key of columns) of a heat map.
    groups: names of groups of columns that are averaged together, as the literature prints them.
    equal_sets: whether `total` is a mean over the sets in `columns`, whatever their sizes.
    unit: what the score is. lower: whether less is better.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    columns: ClassVar[str] = ""
    heat: ClassVar[tuple[str, str] | None] = None
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    equal_sets: ClassVar[bool] = False
    unit: ClassVar[str] = "score, 0 to 100"
    lower: ClassVar[bool] = False

    @abstractmethod
    def samples(self, setting: Setting) -> list[Sample]:
        """Every sample, deterministic in (options, tokenizer, seed); a limit takes the first ones of each set."""

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """The score of some result rows, in `unit`. Rows carry "score", "metrics" and "meta"."""
        return 100 * sum(row["score"] for row in rows) / len(rows)

    def options(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class TextTask(Task):
    """The model writes an answer."""

    @abstractmethod
    def judge(self, sample: Sample, output: str) -> Judged:
        """Score one output, the decoded new tokens without special ones."""


@dataclass(frozen=True)
class LossTask(Task):
    """The tokens after a sample's context are fed and scored; nothing is generated.

    feed: tokens fed at a time through the compressed cache; None feeds all scored tokens in one pass, or one by one to
        a method that is itself in steps alone.
    compares: whether next-token distributions are compared with the dense model's (metrics "kl" and "top1").
    recalls: whether it counts where the most likely token is the text's own (metric "hit").
    metric: which of the metrics is the score. nats: what a token's nats are called, in rows and tables: the loss, or a
        bound of it, which is never named alike.
    """

    unit: ClassVar[str] = "nats"
    lower: ClassVar[bool] = True
    compares: ClassVar[bool] = False
    recalls: ClassVar[bool] = False
    metric: ClassVar[str] = "loss"
    nats: ClassVar[str] = "loss"

    @property
    def feed(self) -> int | None:
        return None

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(row["score"] for row in rows) / len(rows))


def listed(value: Any, kind: type, what: str) -> tuple[Any, ...]:
    """An option that is a list, however it was written: 1000, (1000, 2000), [1000, 2000]."""
    items: Iterable[Any] = value if isinstance(value, (tuple, list)) else (value,)
    wanted = tuple(items)
    for item in wanted:
        good = isinstance(item, (int, float) if kind is float else kind) and not isinstance(item, bool)
        if not good:
            raise ValueError(f"{what} are {kind.__name__}s separated by commas, got {item!r}")
        if wanted.count(item) > 1:
            raise ValueError(f"{what} name {item!r} more than once")
    if not wanted:
        raise ValueError(f"{what} are missing")
    return wanted


def chosen(value: Any, known: Sequence[str], what: str) -> tuple[str, ...]:
    """An option that names some of `known`; "all" is all of them."""
    if value == "all":
        return tuple(known)
    names = listed(value, str, what)
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {name!r} among {what}; {nearest(name, known)}")
    return names
