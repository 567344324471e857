"""A talk of many turns over one cache: what `longwave chat` gives to the model, and keeps of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longwave.cli.answer import loop_of, why_python
from longwave.cli.common import encode
from longwave.cli.console import waiting
from longwave.cli.prefix import as_input, code_prefix, coder_for, going_on, prompt_ids, read_prefix, turn_ids
from longwave.cli.reading import reading

SIZE = "0.1"  # of what /save codes, unless it says


class Talk:
    """What was said so far. memory: the cache that has read it, or an empty one that reads it with the next question.
    ids: int64 [1, n], all of it, on the host; the last one may not be read yet. answered: whether an answer ends them;
    else they are empty, or documents that a question is to follow in the same turn.

    build: makes an empty cache of a method and a budget, or says in a ValueError why there is none. method, budget: of
    this talk. limit: positions that the model knows, None where it names none. new_tokens: of an answer at most.
    choice: more for `generate`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        build: Callable[[Any, Any], Any],
        method: Any,
        budget: Any,
        limit: int | None,
        new_tokens: int,
        choice: dict[str, Any],
    ):
        import torch

        self.model, self.tokenizer, self.build = model, tokenizer, build
        self.method, self.budget = method, budget
        self.limit, self.new_tokens, self.choice = limit, new_tokens, choice
        self.memory, self.answered = self.fresh(), False
        self.ids = torch.zeros(1, 0, dtype=torch.long)

    def fresh(self) -> Any:
        """An empty cache for this talk."""
        return self.build(self.method, self.budget)

    def read(self, ids: Any) -> None:
        """Documents, as `prefix_ids` makes them, before anything was said."""
        self._read(self.memory, ids)
        self.ids = ids

    def chunk(self, memory: Any, tokens: int) -> int | None:
        """Tokens of a pass of a text of so many: what was asked for, or fewer where a method takes fewer; None: all."""
        asked, most = self.choice.get("prefill_chunk_size"), memory.method.passes(tokens, self.limit)
        return min((x for x in (asked, most) if x is not None), default=None)

    def _read(self, memory: Any, ids: Any) -> None:
        chunk = self.chunk(memory, ids.shape[1])
        with reading(self.model, ids.shape[1], chunk):
            read_prefix(self.model, memory, ids, chunk)

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
                f"{self.reach(self.memory):,}: ask something shorter, or /quit"
            )
        return ids

    def reach(self, memory: Any) -> int | None:
        """Tokens that the model reads at most with a cache; None for any number."""
        return None if self.limit is None else memory.method.reach(self.limit)

    def _room(self, tokens: int) -> int:
        reach = self.reach(self.memory)
        return self.new_tokens if reach is None else min(self.new_tokens, reach - tokens)

    def answer(self, ids: Any, streamer: Any, processors: list[Any], criteria: list[Any]) -> None:
        """Give `streamer` the answer to what `ask` made. If anything fails this question was not asked, and what was
        said before it is read again with the next one."""
        from longwave.decode import supports
        from longwave.frame import cache_argument

        why = why_python(self.model.device, None) or supports(self.model, self.memory)
        choice = self.choice | {"prefill_chunk_size": self.chunk(self.memory, ids.shape[1])}
        given = {name: x.to(self.model.device) for name, x in as_input(ids).items()}
        try:
            out = loop_of(self.model, why)(
                **given,
                **cache_argument(self.model, self.memory),
                max_new_tokens=self._room(ids.shape[1]),
                streamer=streamer,
                logits_processor=processors,
                stopping_criteria=criteria,
                pad_token_id=self.tokenizer.pad_token_id,
                **going_on(self.model, self.memory, ids, choice),
            )
        except BaseException:
            self.memory = self.fresh()  # a pass that ends half-way leaves layers that differ
            raise
        ends = self.model.generation_config.eos_token_id
        ended = int(out[0, -1]) in (ends if isinstance(ends, list) else [ends])
        self.ids = (out[:, :-1] if ended else out).cpu()  # the template ends an answer itself; the last is not read
        self.answered = True

    def change(self, method: Any, budget: Any) -> str:
        """Hold what was said by another method or budget; what to say of it. Where it fails the talk is as it was.

        A dense cache has K and V, which settle into any method that can do with them; else the model reads again.
        """
        from longwave.methods.dense import DenseBound
        from longwave.saved.saving import beside
        from longwave.saved.settling import can_settle, prompt_of, settle_into

        memory, began = self.build(method, budget), time.perf_counter()
        held, cost = self.memory.get_seq_length() or self.ids.shape[1], ""
        reach = self.reach(memory)
        if reach is not None and held > reach:
            raise ValueError(f"the {held:,} tokens of this talk exceed the {reach:,} that {memory.method} reads")
        if held:
            exact = self.memory.get_seq_length() and type(self.memory.method) is DenseBound
            if exact and can_settle(memory, next(memory.memory_layers()).needs):
                settle_into(self.model, memory, prompt_of(self.memory, self.ids, beside(self.memory), "this talk"))
                how = "settled from the dense cache"
            else:
                self._read(memory, self.ids[:, :held])
                how = "read again"
            cost = f"; {held:,} tokens {how} in {time.perf_counter() - began:.1f} s"
        self.memory, self.method, self.budget = memory, method, budget
        return f"{memory.method}{cost}"

    def held(self) -> str:
        """Tokens and bytes held against those of a dense cache, in words."""
        from longwave.budget import human

        if not self.memory.get_seq_length():
            return f"{self.ids.shape[1]:,} tokens to read again" if self.ids.shape[1] else "nothing read"
        report = self.memory.report()
        return f"{report.tokens:,} tokens in {human(report.nbytes)}, dense {human(report.dense_nbytes)}"

    def bytes(self) -> str:
        """What is held, part by part."""
        return str(self.memory.report()) if self.memory.get_seq_length() else self.held()

    def save(self, path: str, how: str = SIZE) -> str:
        """Keep the talk in a file; what to say of it. how: a size, as in `longwave.save`, or "exact".

        What is coded are the K and V that the cache holds. Where it has dropped or merged some the model reads again.
        """
        import longwave
        from longwave.budget import human
        from longwave.saved.container import check_place
        from longwave.saved.settling import can_settle

        check_place(Path(path))
        about, cost, began = {"chat": True, "answered": self.answered}, "", time.perf_counter()
        if how == "exact":
            if not self.memory.get_seq_length() and self.ids.shape[1]:
                memory = self.fresh()
                self._read(memory, self.ids)
                self.memory = memory
            written = longwave.save(self.memory, self.ids, path, exact=True, about=about)
        elif not can_settle(self.memory, next(self.memory.memory_layers()).needs):
            raise ValueError(f"{self.memory.method} needs more of a text than a coded file has: /save {path} exact")
        elif self._whole():
            with waiting(f"writing {path}"):
                written = longwave.save(self.memory, self.ids, path, size=how, tokenizer=self.tokenizer, about=about)
        else:
            coder = coder_for(self.memory, self.model, self.tokenizer, how)
            chunk = self.chunk(self.memory, self.ids.shape[1])
            with reading(self.model, self.ids.shape[1], chunk):
                written = code_prefix(self.model, self.memory, self.ids, Path(path), how, coder, chunk, about)
            cost = f"; {self.ids.shape[1]:,} tokens read again in {time.perf_counter() - began:.1f} s"
        return f"{path}: {human(written)}{cost}"

    def _whole(self) -> bool:
        """Whether the cache can give K and V of every token; so it can where nothing is to be read again."""
        from longwave.saved.coded import whole

        if not self.memory.get_seq_length():
            return not self.ids.shape[1]
        try:
            whole(self.memory)
        except ValueError:
            return False
        return True

    def load(self, path: str) -> str:
        """Go on with a talk that was kept, or with a text that `longwave generate --save-prefix` kept; what to say.

        What was coded goes into the talk's own method, an exact file brings its own. Where it fails the talk is
        as it was.
        """
        import longwave
        from longwave.saved import look

        kept = look(Path(path), whole=False)  # restoring looks at every byte
        if kept.about.get("chat") is not True:
            raise ValueError(f"{path} holds no talk: /save and `longwave generate --save-prefix` write those")
        into = None if kept.kind == "exact" else self.fresh()
        with waiting(f"reading {path}"):
            memory, ids = longwave.restore(self.model, path, into, tokenizer=self.tokenizer)
        if into is None:
            self.method, self.budget = memory.method, None
        self.memory, self.ids, self.answered = memory, ids.cpu(), kept.about.get("answered", False)
        return f"{path}: {kept.method}, {kept.kind}, {kept.tokens:,} tokens"
