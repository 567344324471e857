"""How a task of lm-evaluation-harness wants text to be generated, and where a text of it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria

from longwave.checks import nearest, whole

NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one thing, four names
SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Wish:
    """How a task wants text to be generated, from its generation_kwargs."""

    until: tuple[str, ...]
    new_tokens: int
    options: tuple[tuple[str, Any], ...]  # for `generate`

    @classmethod
    def read(cls, kwargs: Mapping[str, Any], new_tokens: int) -> Wish:
        known = ("until", "do_sample", "num_beams", "repetition_penalty", *NEW_TOKENS, *SAMPLING)
        for name in kwargs:
            if name not in known:
                raise ValueError(f"generation argument {name!r} is not supported; {nearest(name, known)}")
        if kwargs.get("num_beams") not in (None, 1):
            raise ValueError(f"beams are not supported here: num_beams is 1, got {kwargs['num_beams']!r}")
        given = {name: kwargs[name] for name in NEW_TOKENS if kwargs.get(name) is not None}
        if len(set(given.values())) > 1:
            raise ValueError(f"{given} say different things: give max_gen_toks alone")
        until = kwargs.get("until") or ()
        texts = (until,) if isinstance(until, str) else until
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"until is a text or a list of texts, got {until!r}")
        temperature, sample = kwargs.get("temperature"), kwargs.get("do_sample")
        if sample is None:
            sample = bool(temperature)
        if sample and temperature is not None and temperature <= 0:
            raise ValueError(f"do_sample=True needs a temperature above 0, got {temperature!r}")
        taken = ("repetition_penalty", *(SAMPLING if sample else ()))  # do_sample=False: greedy, whatever else is said
        options = {name: kwargs[name] for name in taken if kwargs.get(name) is not None}
        tokens = next(iter(given.values()), new_tokens)
        counted("max_gen_toks", tokens, "tokens")
        return cls(tuple(filter(None, texts)), tokens, tuple({"do_sample": bool(sample), **options}.items()))


def counted(name: str, value: Any, unit: str) -> int:
    """A whole number, at least 1; command lines may hand it over as text."""
    return whole(name, int(value) if isinstance(value, str) and value.isdecimal() else value, 1, unit)


class StopTexts(StoppingCriteria):
    """Ends a row once its new tokens contain one of `texts`; the prompt, up to column `start`, does not count."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int):
        self.tokenizer, self.texts, self.start = tokenizer, texts, start
        self.reach = max(len(text.encode()) for text in texts)  # tokens that can hold a text that just ended

    def _ended(self, row: list[int]) -> bool:
        for ids in (row[-self.reach :], row):  # all of them only where the last ones say yes: their edge may read alike
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if not any(stop in text for stop in self.texts):
                return False
        return True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ended = [self._ended(row) for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(ended, device=input_ids.device)
