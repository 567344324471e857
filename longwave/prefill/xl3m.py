"""`longwave.xl3m`: a prompt is shortened to the segments after which a model is surest how its question goes on.

Source: XL3M, arXiv 2405.17755. The text is cut into segments; each is read alone with the question, the prompt's last
tokens, behind it. What comes next is predicted with an entropy, and segments of little entropy are taken for those that
matter. They are put together in their order, with the question behind them, and read as a prompt of their own. Length
of segments and question, and that entropy counts at the last token alone, are choices of ours: the paper does not say.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from longwave.checks import whole
from longwave.prefill.draft import checked_mask, placed
from longwave.prefill.specpc import Shortened
from longwave.shape import context_limit


@torch.no_grad()
def xl3m(
    model: PreTrainedModel,
    ids: torch.Tensor,
    tokens: int | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    question: int = 64,
    segment: int | None = None,
    prefix: int = 0,
    batch: int = 8,
) -> Shortened:
    """Shorten a prompt to at most `tokens` tokens a row, by how sure the model is behind each segment of it.

    ids int64 [batch, n]; attention_mask alike, 0 where a row is padded, on the left. tokens: three quarters of the
    positions that the model's config names. question: the prompt's last tokens, read behind every segment. segment:
    tokens; a third of `tokens`. prefix: first tokens, read before every segment and kept. batch: segments that are read
    at once. A row of at most `tokens` tokens stays as it is, and nothing is read of it.

    Every segment is read once, without a cache: time grows with the text, and memory with `tokens`. Another question is
    another reading. `drafted` of what it returns is empty.
    Raises ValueError for options out of range, rows that end in padding, and a model that names no positions where
    `tokens` is left out.
    """
    if tokens is None:
        limit = context_limit(model)
        if limit is None:
            raise ValueError("this model's config names no number of positions: say how many tokens may be left")
        tokens = limit * 3 // 4
    whole("question", question, 1, "tokens")
    whole("prefix", prefix, 0, "tokens")
    whole("batch", batch, 1, "segments")
    segment = max(1, tokens // 3) if segment is None else whole("segment", segment, 1, "tokens")
    whole("tokens", tokens, prefix + segment + question, "tokens (prefix + segment + question)")
    mask = checked_mask(ids, attention_mask)
    rows = [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
    kept = []
    for row in rows:
        n, end = len(row), len(row) - question
        if n <= tokens:
            kept.append(torch.arange(n))
            continue
        cuts = [(start, min(start + segment, end)) for start in range(prefix, end, segment)]
        unsure = entropies(model, [torch.cat([row[:prefix], row[a:b], row[end:]]) for a, b in cuts], batch)
        best = _surest(cuts, unsure, tokens - prefix - question)
        kept.append(torch.cat([torch.arange(prefix), *(torch.arange(a, b) for a, b in best), torch.arange(end, n)]))
    return Shortened.of(ids, mask, kept, ids.new_empty(len(rows), 0))


def entropies(model: PreTrainedModel, texts: list[torch.Tensor], batch: int) -> list[float]:
    """How unsure a model is of what comes behind each text of ids, in nats."""
    found: list[float] = []
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        width = max(map(len, some))
        ids, mask = (torch.zeros(len(some), width, dtype=torch.long, device=model.device) for _ in range(2))
        for row, text in enumerate(some):
            ids[row, width - len(text) :], mask[row, width - len(text) :] = text, 1
        logits = model(ids, use_cache=False, logits_to_keep=1, **placed(mask, width)).logits[:, -1].float()
        log = logits.log_softmax(-1)
        found += (-(log.exp() * log).nan_to_num(0).sum(-1)).tolist()  # a token that cannot be adds nothing
    return found


def _surest(cuts: list[tuple[int, int]], unsure: list[float], room: int) -> list[tuple[int, int]]:
    """Of the cuts [start, stop) those that stay, in their order: from the surest on what finds room in so many tokens,
    of equals the earlier one."""
    stay = []
    for _, (start, stop) in sorted(zip(unsure, cuts, strict=True)):
        if stop - start <= room:
            stay.append((start, stop))
            room -= stop - start
    return sorted(stay)
