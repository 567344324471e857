"""What lm-evaluation-harness asks, one piece a request: contexts are read and compressed, and what follows is scored or
written by the compressed cache."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList

from longwave.evals.batches import EVEN
from longwave.evals.fork import pad_left, padding, read
from longwave.evals.generation import end_tokens, plain_generation
from longwave.evals.wish import StopTexts, Wish
from longwave.frame import LongCache, cache_argument


@dataclass(frozen=True)
class Piece:
    """One thing to ask the model. `context` is read in one exact pass and compressed, `fed` follows it.

    targets: what the last len(targets) outputs of `fed` should predict; () where text is generated.
    """

    number: int
    context: tuple[int, ...]
    fed: tuple[int, ...]
    targets: tuple[int, ...] = ()


def groups(pieces: Iterable[Piece], rows: int) -> Iterator[list[Piece]]:
    """Pieces whose contexts are read in one pass: those with the same context together, longest first."""
    families: dict[tuple[int, ...], list[Piece]] = {}
    for piece in pieces:
        families.setdefault(piece.context, []).append(piece)
    group: list[Piece] = []
    for context, family in sorted(families.items(), key=lambda item: -len(item[0])):
        uneven = bool(group) and len(context) < EVEN * len(group[0].context)
        if group and (uneven or len(group) + len(family) > rows):
            yield group
            group = []
        group += sorted(family, key=lambda piece: -len(piece.fed))
    if group:
        yield group


def branches(
    model: Any, tokenizer: Any, empty: LongCache, pieces: Iterable[Piece], rows: int
) -> Iterator[tuple[list[Piece], LongCache, torch.Tensor, torch.Tensor]]:
    """Up to `rows` pieces, a cache whose rows hold their contexts, and the ids and mask of those."""
    for group in groups(pieces, rows):
        index = {context: row for row, context in enumerate(dict.fromkeys(piece.context for piece in group))}
        which = torch.tensor([index[piece.context] for piece in group])
        ids, mask = pad_left(list(index), padding(tokenizer))
        memory = copy.deepcopy(empty)
        if ids.shape[1]:
            read(model, memory, ids, mask)
        for start in range(0, len(group), rows):
            end = start + rows
            branch = memory if end >= len(group) else copy.deepcopy(memory)
            if ids.shape[1]:
                branch.batch_select_indices(which[start:end])
            yield group[start:end], branch, ids[which[start:end]], mask[which[start:end]]


@torch.no_grad()
def score(
    model: Any, tokenizer: Any, part: Sequence[Piece], memory: LongCache, mask: torch.Tensor, step: int
) -> list[tuple[float, bool]]:
    """(sum of log-probabilities of the targets, whether each is the most likely token), piece by piece.

    Padding comes last, so that where a row's chunks begin does not depend on the other rows.
    """
    width = max(len(piece.fed) for piece in part)
    ids = torch.full((len(part), width), padding(tokenizer))
    targets = torch.full((len(part), width), -1)
    real = torch.zeros(len(part), width, dtype=torch.long)
    positions = torch.zeros(len(part), width, dtype=torch.long)
    for row, piece in enumerate(part):
        count = len(piece.fed)
        ids[row, :count] = torch.tensor(piece.fed)
        targets[row, count - len(piece.targets) : count] = torch.tensor(piece.targets)
        real[row, :count] = 1
        positions[row] = torch.arange(width).clamp(max=count - 1) + len(piece.context)
    ids, targets, positions, mask = (
        x.to(model.device) for x in (ids, targets, positions, torch.cat([mask, real], dim=1))
    )
    before = mask.shape[1] - width
    sums, greedy = [0.0] * len(part), [True] * len(part)
    for start in range(0, width, step):
        end = min(start + step, width)
        logits = model(
            ids[:, start:end],
            attention_mask=mask[:, : before + end],
            position_ids=positions[:, start:end],
            **cache_argument(model, memory),
            use_cache=True,
        ).logits
        for row, wanted in enumerate(targets[:, start:end]):
            scored = wanted >= 0
            if not bool(scored.any()):
                continue
            logprobs = logits[row, scored].float().log_softmax(-1)
            sums[row] += float(logprobs.gather(1, wanted[scored][:, None]).double().sum())
            greedy[row] = greedy[row] and bool((logprobs.argmax(-1) == wanted[scored]).all())
    return list(zip(sums, greedy, strict=True))


def write(
    model: Any,
    tokenizer: Any,
    part: Sequence[Piece],
    memory: LongCache,
    first: torch.Tensor,
    first_mask: torch.Tensor,
    wish: Wish,
) -> Iterator[tuple[Piece, str]]:
    """Each piece with the text that follows it. first, first_mask: ids and mask of the contexts that `memory` holds."""
    stops = end_tokens(model, tokenizer)
    pad = padding(tokenizer)
    rest, rest_mask = pad_left([piece.fed for piece in part], pad)
    ids, mask = (torch.cat(pair, dim=1).to(model.device) for pair in ((first, rest), (first_mask, rest_mask)))
    criteria = [StopTexts(tokenizer, wish.until, ids.shape[1])] if wish.until else []
    with plain_generation(model):
        out = model.generate(
            ids,
            attention_mask=mask,
            **cache_argument(model, memory),
            max_new_tokens=wish.new_tokens,
            num_beams=1,
            eos_token_id=stops or None,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList(criteria),
            **dict(wish.options),
        )
    for piece, row in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
        length = next((i for i, token in enumerate(row) if token in stops), len(row))
        text = str(tokenizer.decode(row[:length], skip_special_tokens=True))
        yield piece, text[: min((text.find(stop) for stop in wish.until if stop in text), default=len(text))]
