"""A talk of many turns over one cache: what `longwave chat` gives to the model, and keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from longwave.cli.answer import loop_of, why_python
from longwave.cli.common import encode
from longwave.cli.prefix import as_input, going_on, prompt_ids, read_prefix, turn_ids

SIZE = "0.1"  # of what /save codes, unless it says


class Talk:
    """What was said so far. memory: the cache that has read it. ids: int64 [1, n], all of it, on the host; the last one
    may not be read yet. answered: whether an answer ends them; else they are empty, or documents that a question is to
    follow in the same turn.

    fresh: makes an empty cache. limit: tokens that the model reads at most, None where it names none. new_tokens: of an
    answer at most. choice: more for `generate`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        fresh: Callable[[], Any],
        limit: int | None,
        new_tokens: int,
        choice: dict[str, Any],
    ):
        import torch

        self.model, self.tokenizer, self.fresh = model, tokenizer, fresh
        self.limit, self.new_tokens, self.choice = limit, new_tokens, choice
        self.memory, self.answered = fresh(), False
        self.ids = torch.zeros(1, 0, dtype=torch.long)

    def read(self, ids: Any) -> None:
        """Documents, as `prefix_ids` makes them, before anything was said."""
        read_prefix(self.model, self.memory, ids, self.choice.get("prefill_chunk_size"))
        self.ids = ids

    def ask(self, question: str) -> Any:
        """The ids so far and a question. ValueError where no room is left for an answer."""
        import torch

        if self.answered:
            turn = turn_ids(self.tokenizer, question)
        elif self.ids.shape[1]:
            turn = prompt_ids(self.tokenizer, question, True)
        else:
            turn = encode(self.tokenizer, question, True)["input_ids"]
        ids = torch.cat([self.ids, turn], 1)
        if self._room(ids.shape[1]) < 1:
            raise ValueError(
                f"{ids.shape[1]:,} tokens with this question leave no room for an answer in the model's context of "
                f"{self.limit:,}: ask something shorter, or /quit"
            )
        return ids

    def _room(self, tokens: int) -> int:
        return self.new_tokens if self.limit is None else min(self.new_tokens, self.limit - tokens)

    def answer(self, ids: Any, streamer: Any, processors: list[Any], criteria: list[Any]) -> None:
        """Give `streamer` the answer to what `ask` made."""
        from longwave.decode import supports
        from longwave.frame import cache_argument

        why = why_python(self.model.device, None) or supports(self.model, self.memory)
        given = {name: x.to(self.model.device) for name, x in as_input(ids).items()}
        out = loop_of(self.model, why)(
            **given,
            **cache_argument(self.model, self.memory),
            max_new_tokens=self._room(ids.shape[1]),
            streamer=streamer,
            logits_processor=processors,
            stopping_criteria=criteria,
            pad_token_id=self.tokenizer.pad_token_id,
            **going_on(self.model, self.memory, ids, self.choice),
        )
        ends = self.model.generation_config.eos_token_id
        ended = int(out[0, -1]) in (ends if isinstance(ends, list) else [ends])
        self.ids = (out[:, :-1] if ended else out).cpu()  # the template ends an answer itself; the last is not read
        self.answered = True

    def held(self) -> str:
        """Tokens and bytes held against those of a dense cache, in words."""
        from longwave.budget import human

        if not self.memory.get_seq_length():
            return "nothing read"
        report = self.memory.report()
        return f"{report.tokens:,} tokens in {human(report.nbytes)}, dense {human(report.dense_nbytes)}"

    def save(self, path: str, how: str = SIZE) -> str:
        """Keep the talk in a file; what to say of it. how: a size, as in `longwave.save`, or "exact"."""
        import longwave
        from longwave.budget import human
        from longwave.saved.coded import whole

        about = {"chat": True, "answered": self.answered}
        if how == "exact":
            written = longwave.save(self.memory, self.ids, path, exact=True, about=about)
        else:
            try:
                whole(self.memory)
            except ValueError as error:
                raise ValueError(f"{error}: /save {path} exact") from None
            written = longwave.save(self.memory, self.ids, path, size=how, tokenizer=self.tokenizer, about=about)
        return f"{path}: {human(written)}, dense {human(self.memory.report().dense_nbytes)}"

    def load(self, path: str) -> str:
        """Go on with a talk that was kept, or with a text that `longwave generate --save-prefix` kept; what to say.

        What was coded goes into the talk's own method, an exact file has its own. Where it fails the talk is as it was.
        """
        import longwave
        from longwave.saved import look

        kept = look(Path(path), whole=False)  # restoring looks at every byte
        if kept.about.get("chat") is not True:
            raise ValueError(f"{path} holds no talk: /save and `longwave generate --save-prefix` write those")
        into = None if kept.kind == "exact" else self.fresh()
        memory, ids = longwave.restore(self.model, path, into, tokenizer=self.tokenizer)
        self.memory, self.ids, self.answered = memory, ids.cpu(), kept.about.get("answered", False)
        return f"{path}: {kept.method}, {kept.kind}, {kept.tokens:,} tokens"
