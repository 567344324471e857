"""Prompts that ask questions of one document: their token ids agree up to its end, so it is read once for all of them.

A document that is too long is cut once, for the longest of its questions.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longwave.evals.task import Setting


@dataclass(frozen=True)
class Prompt:
    """Token ids of a whole prompt, how many come before the question, and the tokens it had before it was cut."""

    ids: array[int]
    context: int
    cut_from: int | None = None


def ask(
    setting: Setting,
    before: str,
    document: str,
    questions: Sequence[str],
    new_tokens: int,
    what: str,
    keep: Literal["start", "ends"],
    system: str | None = None,
    chat: bool = True,
) -> list[Prompt]:
    """before + document + question, for every question.

    keep: what stays of a document that does not fit: its "start", in whole words, or both "ends" of the prompt, half of
        the room each. what: names the document in errors.
    """

    def encode(text: str, question: str) -> tuple[array[int], int]:
        return setting.encode(before + text + question, question, system=system, chat=chat)

    text, dropped = document, 0
    longest = max(questions, key=setting.count)
    overhead = setting.added(chat)
    room = setting.room(new_tokens, overhead)
    if room is not None:
        allowed = room + overhead
        offsets = setting.spans(document)
        size = min(len(offsets), allowed - len(encode("a", longest)[0]) + 1)
        while size > 0:
            if size < len(offsets):
                if keep == "start":
                    text = first_words(document, offsets, size)
                else:
                    text = both_ends(document, offsets, size, setting.count(longest) - setting.count(before))
                dropped = len(offsets) - setting.count(text)
            over = len(encode(text, longest)[0]) - allowed
            if over <= 0:
                break
            size -= over
        if size <= 0 and offsets:
            raise ValueError(
                f"{what}: the question and the words around it leave no room for the document in {allowed} tokens "
                f"({new_tokens} more are for the answer); a longer window, a larger --max-tokens or fewer new tokens "
                "would"
            )
    prompts = [encode(text, question) for question in questions]
    first = prompts[0][0]
    context = min(context for _, context in prompts)
    while any(ids[:context] != first[:context] for ids, _ in prompts):  # a token across the border
        context -= 1
    return [Prompt(ids, max(context, 1), len(ids) + dropped if dropped else None) for ids, _ in prompts]


def first_words(text: str, offsets: Sequence[tuple[int, int]], tokens: int) -> str:
    """The whole words that the first `tokens` tokens of a text hold."""
    last = end = offsets[tokens - 1][1]
    while end and not text[end : end + 1].isspace():
        end -= 1
    return text[: end or last]


def both_ends(text: str, offsets: Sequence[tuple[int, int]], tokens: int, lean: int) -> str:
    """`tokens` tokens of a text's two ends, `lean` more of its start than of its end."""
    start = min(max((tokens + lean) // 2, 0), tokens)
    first = text[: offsets[start - 1][1]] if start else ""
    return first + (text[offsets[start - tokens][0] :] if start < tokens else "")


def mean_over_sets(rows: Sequence[Mapping[str, Any]], score: Callable[[Sequence[Mapping[str, Any]]], float]) -> float:
    """Every set counts the same, however many samples it has."""
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        sets.setdefault(row["meta"]["set"], []).append(row)
    return sum(map(score, sets.values())) / len(sets)


def mean_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """From 0 to 100."""
    return 100 * float(sum(row["score"] for row in rows)) / len(rows)
