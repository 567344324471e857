"""`generate`: a masked-diffusion model's answer, block by block from left to right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.build import expect
from longwave.checks import nearest, whole
from longwave.diffusion.confidence import above
from longwave.diffusion.noise import Draws
from longwave.diffusion.reading import KEEPS, Reader
from longwave.diffusion.samplers import Dream, LLaDA, Moment, Sampler
from longwave.frame import LongCache

Criterion = Callable[[torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Block:
    """A block that is done. tokens int64 [batch, block_length]: behind a row's end they are padding. passes: how often
    the model was asked for it. ends int64 [batch]: columns of the text up to each row's end so far, prompt included."""

    tokens: torch.Tensor
    passes: int
    ends: torch.Tensor


def generate(
    model: PreTrainedModel,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    streamer: Any = None,
    **options: Any,
) -> torch.Tensor:
    """The prompts ids int64 [batch, tokens] and their answers, as `model.generate` gives them: int64 [batch, tokens +
    new], padding behind a row's end.

    streamer: gets the prompts, then each block when it is done (`put`, `end`: transformers' streamers have them).
    Everything else, and all errors: as `blocks`, which does the work.
    """
    made = [ids]
    longest = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.ndim == 2 else 0
    for number, block in enumerate(blocks(model, ids, attention_mask, **options)):
        if streamer is not None and not number:
            streamer.put(ids.cpu())
        made.append(block.tokens.to(ids.device))
        longest = int(block.ends.max())
        if streamer is not None:
            streamer.put(block.tokens[:, : longest - sum(part.shape[1] for part in made[:-1])].cpu())
    if streamer is not None:
        streamer.end()
    return torch.cat(made, 1)[:, :longest]


def blocks(
    model: PreTrainedModel,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    sampler: Sampler | None = None,
    max_new_tokens: int = 128,
    block_length: int | None = None,
    steps: int | None = None,
    threshold: float | None = None,
    cache: LongCache | None = None,
    keep: str | None = None,
    refresh: int | None = None,
    delay: int = 0,
    seed: int | None = None,
    stop_ids: Sequence[int] | None = None,
    stopping_criteria: Sequence[Criterion] = (),
    pad_token_id: int | None = None,
) -> Iterator[Block]:
    """The blocks of the answers to prompts ids int64 [batch, tokens], each as soon as it is done.

    model: attends in both directions (`is_causal=False` in its config) and names `mask_token_id` there, as what
        `longwave.load` makes of LLaDA and Dream does. attention_mask [batch, tokens]: 0 for padding, on the left.
    sampler: `LLaDA(...)` or `Dream(...)`; None: whichever the model's logits are for.
    max_new_tokens: of the answer. block_length: its masks are decided block by block, each of so many tokens (None: all
        in one), while those of later blocks are there to be attended to. steps: for the whole answer (None: as many as
        tokens), shared evenly by the blocks.
    threshold: instead of steps, every step keeps all tokens whose confidence is at least this, and the surest one.
    cache: an empty `longwave.cache(model, ...)`, which holds what is not read in every pass: "prefix" (`keep`, the
        default) the tokens before the block, "dual" those around it. It is filled anew for every block, and within a
        block after every `refresh` passes (None: never; 1 is as good as no cache). delay: passes of a block before it
        is filled first: by then its first tokens are there to ask (Sparse-dLLM, arXiv 2508.02558, waits for 1).
    seed: of all that is drawn; row b draws by seed + b. None: taken from torch's generator.
    stop_ids: tokens that end a row (None: the model's `eos_token_id`; (): none do). stopping_criteria: as transformers
        has them, asked after each token of a block that is done. Rows that have ended are padded with pad_token_id
        (None: the model's, or the first of stop_ids).

    Rows do not depend on each other. Raises ValueError for options that do not fit, TypeError for a cache of another
    kind, before anything is read; and ValueError behind the first pass where the window of the cache's method is
    shorter than what is read again of a text.
    """
    config = model.config.get_text_config(decoder=True)
    mask_id = mask_of(model)
    real = real_tokens(ids, attention_mask, mask_id)
    shift = bool(getattr(config, "logit_shift", False))
    sampler = (Dream() if shift else LLaDA()) if sampler is None else sampler
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler is LLaDA(...) or Dream(...), got {type(sampler).__name__}")
    new = whole("max_new_tokens", max_new_tokens, 1, "tokens")
    length = new if block_length is None else whole("block_length", block_length, 1, "tokens")
    if new % length:
        raise ValueError(f"{new} new tokens are no whole number of blocks of {length}: change either")
    count = new // length
    each = _steps(steps, threshold, new, count, sampler)
    _check_cache(model, cache, keep, refresh, delay)
    ends = _stop_ids(config, stop_ids)
    if isinstance(sampler, LLaDA) and sampler.eos != "any" and not ends:
        raise ValueError(f"eos={sampler.eos!r} is about tokens that end an answer, and none is known: give stop_ids")
    pad = next((x for x in (pad_token_id, config.pad_token_id, *ends) if x is not None), mask_id)
    start_seed = int(torch.randint(2**62, (1,))) if seed is None else whole("seed", seed, None)
    state = _State(model, ids, real, new, mask_id, pad, ends, tuple(stopping_criteria))
    state.draws = [Draws(start_seed + row, model.device) for row in range(ids.shape[0])]
    reader = _reader(model, state, shift, sampler, cache, keep)
    return _run(reader, state, sampler, length, each, threshold, refresh, delay)


@torch.no_grad()
def _run(
    reader: Reader,
    state: _State,
    sampler: Sampler,
    length: int,
    each: int | None,
    threshold: float | None,
    refresh: int | None,
    delay: int,
) -> Iterator[Block]:
    prompt, total = state.prompt, state.text.shape[1]
    for start in range(prompt, total, length):
        before, stop = reader.passes, start + length
        first = state.masked[:, start:stop].sum(-1).tolist()
        step, since = 0, None  # passes since the cache was filled
        while any(masked := state.masked[:, start:stop].sum(-1).tolist()):
            moments = [Moment(step, each or 1, n) for n in first]
            step += 1
            if threshold is None and all(
                sampler.count(n, at) == 0 for n, at in zip(masked, moments, strict=True)
            ):  # nothing would come of a pass
                continue
            if reader.cache is None or reader.passes - before < delay:
                logits = state.asked(reader.plain, sampler, start, stop)
            elif since is None or since == refresh:
                logits, since = state.asked(reader.whole, sampler, start, stop), 1
            else:
                logits, since = state.asked(reader.again, sampler, start, stop), since + 1
            for row, at in enumerate(moments):
                state.decide(row, start, stop, logits[row], sampler, at, threshold)
        state.finish(start, stop)
        yield Block(state.text[:, start:stop].clone(), reader.passes - before, state.ends.clone())
        if bool(state.done.all()):
            return


class _State:
    """The texts as they stand: text int64 [batch, tokens], masked bool of the same shape, which rows are done."""

    draws: list[Draws]

    def __init__(
        self,
        model: PreTrainedModel,
        ids: torch.Tensor,
        real: torch.Tensor,
        new: int,
        mask_id: int,
        pad: int,
        stop_ids: tuple[int, ...],
        criteria: tuple[Criterion, ...],
    ):
        ids, real = ids.to(model.device), real.to(model.device)
        self.prompt, self.mask_id, self.pad, self.stop_ids, self.criteria = (
            ids.shape[1],
            mask_id,
            pad,
            stop_ids,
            criteria,
        )
        self.text = torch.cat([ids, ids.new_full((ids.shape[0], new), mask_id)], 1)
        self.real = torch.cat([real, real.new_ones(ids.shape[0], new)], 1)
        self.masked = torch.zeros_like(self.real)
        self.masked[:, self.prompt :] = True
        self.done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        self.ends = torch.full((ids.shape[0],), self.prompt, device=ids.device)

    def asked(self, read: Callable[..., torch.Tensor], sampler: Sampler, start: int, stop: int) -> torch.Tensor:
        """Logits [batch, stop - start, vocabulary] of the text, guided where the sampler says so."""
        if not sampler.guidance:
            return read(self.text, start, stop)
        hidden = self.text.clone()
        hidden[:, : self.prompt] = self.mask_id
        with_prompt, without = read(torch.cat([self.text, hidden]), start, stop).chunk(2)
        return without + (sampler.guidance + 1) * (with_prompt - without)

    def decide(
        self,
        row: int,
        start: int,
        stop: int,
        logits: torch.Tensor,
        sampler: Sampler,
        at: Moment,
        threshold: float | None,
    ) -> None:
        """Turn some of a row's masks in a block into tokens, by logits [stop - start, vocabulary]."""
        where = self.masked[row, start:stop].nonzero()[:, 0]
        if not len(where):
            return
        own = logits[where].float()
        own[:, self.mask_id] = float("-inf")  # a mask is no token
        tokens, sure = sampler.draw(own, self.draws[row], self.stop_ids)
        kept = sampler.keep(sure, at, self.draws[row]) if threshold is None else above(sure, threshold)
        columns = start + where[kept]
        self.text[row, columns] = tokens[kept]
        self.masked[row, columns] = False

    def finish(self, start: int, stop: int) -> None:
        """Find rows that end in a block that is done, and pad what is behind their ends."""
        for row in (~self.done).nonzero()[:, 0].tolist():
            self.ends[row] = end = self._end(row, start, stop)
            if self.done[row]:
                self.text[row, end:] = self.pad
                self.masked[row, end:] = False

    def _end(self, row: int, start: int, stop: int) -> int:
        for column in range(start, stop):
            here = self.text[row : row + 1, : column + 1]
            stops = int(here[0, -1]) in self.stop_ids
            if stops or any(bool(torch.as_tensor(criterion(here, None)).any()) for criterion in self.criteria):
                self.done[row] = True
                return column + 1
        return stop


def _reader(
    model: PreTrainedModel, state: _State, shift: bool, sampler: Sampler, cache: LongCache | None, keep: str | None
) -> Reader:
    real = torch.cat([state.real] * 2) if sampler.guidance else state.real
    if cache is not None:
        expect(model, cache, real.shape[1], real.shape[0])
    return Reader(model, real, shift, cache, keep or KEEPS[0])


# what is refused


def mask_of(model: PreTrainedModel) -> int:
    """The mask token of a masked-diffusion model; ValueError for any other model."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_causal", True):
        raise ValueError(
            "this model's attention is causal, and a masked-diffusion model looks in both directions: longwave.load "
            "reads LLaDA and Dream so; of another one set config.is_causal = False"
        )
    mask_id = getattr(config, "mask_token_id", None)
    if mask_id is None:
        raise ValueError("the model's config names no mask_token_id, and an answer begins as masks: set it there")
    return whole("mask_token_id", mask_id, 0)


def real_tokens(ids: Any, attention_mask: torch.Tensor | None, mask_id: int) -> torch.Tensor:
    """Which of the prompts' tokens are real: bool [batch, tokens]."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        said = list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"ids are whole numbers [batch, tokens], at least one of each; got {said}")
    if attention_mask is None:
        real = torch.ones_like(ids, dtype=torch.bool)
    elif attention_mask.shape != ids.shape:
        raise ValueError(f"the attention mask is {list(attention_mask.shape)} and ids are {list(ids.shape)}: the same")
    else:
        real = attention_mask.to(ids.device).bool()
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("padding comes before a prompt, and every row has a token: tokenizer.padding_side = 'left'")
    if bool(((ids == mask_id) & real).any()):
        raise ValueError(f"a prompt holds the mask token {mask_id}: only what comes after a prompt is written")
    return real


def _steps(steps: int | None, threshold: float | None, new: int, count: int, sampler: Sampler) -> int | None:
    """Steps of each block, None where a threshold decides."""
    if threshold is None:
        total = new if steps is None else whole("steps", steps, 1, "steps for the whole answer")
        if total % count:
            raise ValueError(f"{total} steps cannot be shared evenly by {count} blocks: give a multiple of {count}")
        return total // count
    if steps is not None:
        raise ValueError("steps decide nothing where a threshold says how many tokens a step keeps: give one of them")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise ValueError(f"threshold is a confidence above 0 and at most 1, such as 0.9; got {threshold!r}")
    if why := sampler.why_no_threshold():
        raise ValueError(f"this sampler takes no threshold: {why}")
    return None


def _check_cache(
    model: PreTrainedModel, cache: LongCache | None, keep: str | None, refresh: int | None, delay: int
) -> None:
    whole("delay", delay, 0, "passes")
    if cache is None:
        for name, value in (("keep", keep), ("refresh", refresh), ("delay", delay or None)):
            if value is not None:
                raise ValueError(f"{name}={value!r} decides nothing without a cache: give one, or leave it out")
        return
    if not isinstance(cache, LongCache):
        raise TypeError(f"cache is a longwave.cache(model, ...), got {type(cache).__name__}")
    if cache.get_seq_length():
        raise ValueError(
            f"the cache holds {cache.get_seq_length()} tokens already, and attention in both directions reads all "
            "of them anew for every block: cache.reset() first"
        )
    if keep is not None and keep not in KEEPS:
        raise ValueError(f"unknown keep {keep!r}: {nearest(str(keep), KEEPS)}")
    if refresh is not None:
        whole("refresh", refresh, 1, "passes")
    if cache.origin() not in (None, model):
        raise ValueError("the cache was built on another model: longwave.cache(model, ...) on this very one")


def _stop_ids(config: Any, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        own = config.eos_token_id
        given = [] if own is None else own if isinstance(own, (list, tuple)) else [own]
    return tuple(whole("a stop id", x, 0) for x in given)
