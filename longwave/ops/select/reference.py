"""Votes and spans in plain torch, never with more scores at once than `query_block` allows.

Shapes: B batch, Hq query heads, H key/value heads, G = Hq / H, Q queries, L stored tokens, D head_dim. A query's score
of a token is q_h . k_(h // G), both before rotation; it has no scale, since the order alone counts. Every query votes
in each of its heads for the tokens of its best scores, votes are counted over all of a row, and what wins is read with
its neighbours (ReAttention, arXiv 2407.15176). Of equals the earlier one, everywhere.

Scores are compared in float32, those of float64 too: in a first layer the keys of one word are equal but for rounding,
which is not to choose.
"""

from collections.abc import Iterable

import torch

from longwave.ops.attention.reference import _product, group_heads, query_block

INF = float("inf")
TILE = 128  # tokens that offer their best one, where the choice is not exact
COLUMNS = 1 << 14  # tokens that are scored at once: whole tiles


@torch.no_grad()
def best(
    q: torch.Tensor, k: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, top: int, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each query the `top` tokens of best score, the best first: float32 scores and int64 numbers [B, Hq, Q, top],
    -inf and -1 where there are no more.

    Tokens and arguments as in __init__.py.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    kind = q.dtype if k.is_cuda else wide  # a CPU multiplies no 16-bit numbers
    (b, hq, queries, _), heads = q.shape, k.shape[1]
    step = query_block(b * hq, min(COLUMNS, k.shape[2]))
    some = [group_heads(q[:, :, at : at + step].to(kind), heads) for at in range(0, queries, step)]
    value = [torch.full((*x.shape[:3], top), -INF, device=q.device) for x in some]
    index = [torch.full(x.shape, -1, dtype=torch.long, device=q.device) for x in value]
    for start in range(0, k.shape[2], COLUMNS):  # tokens are read once, whoever asks
        part = k[:, :, start : start + COLUMNS].to(kind)
        for n, x in enumerate(some):
            found = _offers(x, part, start, begin, end, top, exact)
            value[n], index[n] = first(torch.cat([value[n], found[0]], -1), torch.cat([index[n], found[1]], -1), top)
    value, index = ([x.unflatten(2, (hq // heads, -1)).flatten(1, 2) for x in made] for made in (value, index))
    return torch.cat(value, 2), torch.cat(index, 2)


def _offers(
    q: torch.Tensor, k: torch.Tensor, start: int, begin: torch.Tensor, end: torch.Tensor, top: int, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and number of the best tokens of a stretch from `start` on: [B, H, G Q, n] each."""
    x, y = q.flatten(0, 1), k.flatten(0, 1).mT
    scores = (x @ y if q.dtype in (torch.float32, torch.float64) else _product(x, y)).float()
    scores = scores.unflatten(0, k.shape[:2])
    number = start + torch.arange(k.shape[2], device=q.device)
    inside = (number >= begin[:, None]) & (number < end[:, None])
    scores = scores.masked_fill_(~inside[:, None, None], -INF)
    if k.shape[2] % TILE:
        scores = torch.nn.functional.pad(scores, (0, -k.shape[2] % TILE), value=-INF)
    tiles = scores.unflatten(-1, (-1, TILE))
    begins = start + TILE * torch.arange(tiles.shape[-2], device=q.device)
    if not exact:
        value, at = tiles.max(-1)
        return first(value, at + begins, top)
    # the best lie in the tiles whose best are: before each of them stands one that is greater, or equal and earlier
    most = tiles.amax(-1)
    _, tile = first(most, torch.arange(most.shape[-1], device=q.device).expand_as(most), top)
    tile = tile.sort(-1).values[..., None]
    there = tile.clamp(min=0)
    value = tiles.gather(-2, there.expand(*there.shape[:-1], TILE)).masked_fill_(tile < 0, -INF)
    index = begins[there] + torch.arange(TILE, device=q.device)
    return first(value.flatten(-2), index.flatten(-2), top)


def first(value: torch.Tensor, index: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top` greatest of value [..., n] and their numbers in index, the first of equals; then -inf and -1."""
    values, indices = [], []
    left = value.clone()
    for _ in range(top):
        most, at = left.max(-1, keepdim=True)  # of several the first one, says torch
        values.append(most)
        indices.append(index.gather(-1, at).masked_fill(most == -INF, -1))
        left.scatter_(-1, at, -INF)
    return torch.cat(values, -1), torch.cat(indices, -1)


def around(
    index: torch.Tensor, tokens: int, begin: torch.Tensor, end: torch.Tensor, spans: int, span: int
) -> torch.Tensor:
    """What the votes index [B, ...], of tokens by number or below 0 for none, make a row read: bool [B, tokens].

    Of the tokens that got any the `spans` with most, each with the span // 2 before it and those behind it that make
    `span`, none outside begin[b] to end[b] - 1.
    """
    batch = index.shape[0]
    flat = index.flatten(1).long()
    flat = flat.where(flat >= 0, torch.full_like(flat, tokens))
    votes = flat.new_zeros(batch, tokens + 1).scatter_add_(1, flat, torch.ones_like(flat))[:, :tokens]
    order = votes * tokens - torch.arange(tokens, device=flat.device)  # no two are equal
    at = order.topk(min(spans, tokens)).indices
    won = (votes.gather(1, at) > 0).long()
    start = torch.maximum(at - span // 2, begin[:, None])
    stop = torch.minimum(at - span // 2 + span, end[:, None])
    edges = flat.new_zeros(batch, tokens + 1)
    edges.scatter_add_(1, start.clamp(0, tokens), won).scatter_add_(1, stop.clamp(0, tokens), -won)
    return edges.cumsum(1)[:, :tokens] > 0


def claims(
    q: torch.Tensor,
    parts: Iterable[tuple[int, torch.Tensor]],
    begin: torch.Tensor,
    end: torch.Tensor,
    asks: torch.Tensor | None,
    scaling: float,
    span: int,
) -> torch.Tensor:
    """What spans of `span` tokens side by side get of softmaxes over the middle, squared, and summed over heads and
    queries: float32 [B, ceil(L / span)]. Squared, since a query that is sure in one head says more than many that
    spread what they read. parts: where stretches of the keys begin, multiples of `span`, and they themselves."""
    b, hq, queries, _ = q.shape
    found: list[torch.Tensor] = []  # log of the sum of each span, [B, H, G Q, n]
    for start, part in parts:
        heads = part.shape[1]
        k = part.float().mT
        number = start + torch.arange(part.shape[2], device=q.device)
        inside = (number >= begin[:, None]) & (number < end[:, None])
        step = query_block(b * hq, part.shape[2])
        scores = []
        for at in range(0, queries, step):
            x = group_heads(q[:, :, at : at + step].float() * scaling, heads)
            s = (x @ k).masked_fill_(~inside[:, None, None], -INF)
            if part.shape[2] % span:
                s = torch.nn.functional.pad(s, (0, -part.shape[2] % span), value=-INF)
            scores.append(s.unflatten(-1, (-1, span)).logsumexp(-1).unflatten(2, (hq // heads, -1)))
        found.append(torch.cat(scores, 3).flatten(1, 2))
    each = torch.cat(found, -1)  # [B, Hq, Q, spans]
    share = torch.exp(each - each.logsumexp(-1, keepdim=True)).nan_to_num_(0)  # of nothing: nothing
    if asks is not None:
        share = share * asks[:, None, :, None]
    return share.square().sum((1, 2))


def greatest(claim: torch.Tensor, spans: int) -> torch.Tensor:
    """Numbers of the `spans` spans with the greatest claim [B, n], the earlier of equals: int64 [B, spans], -1 where
    there are no more that have any."""
    value, index = claim.sort(dim=-1, descending=True, stable=True)
    index = index.masked_fill(value <= 0, -1)[:, :spans]
    return torch.nn.functional.pad(index, (0, spans - index.shape[1]), value=-1)


def told(
    found: torch.Tensor, stop: torch.Tensor, sinks: int, window: int, span: int, since: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `places` gives where nothing is chosen any more: of row b's first stop[b] tokens, more than sinks, spans and
    window together, the ends, and between them the spans found, numbers int64 [B, n] or -1; of fewer all. since, int64
    [B]: of the window only tokens from there on. No more work than there are tokens read."""
    device, (batch, spans) = stop.device, found.shape
    near = torch.arange(window, device=device) + (stop[:, None] - window)
    first = near[:, :1] if since is None else torch.maximum(near[:, :1], since[:, None])
    inner = (found[..., None] * span + torch.arange(span, device=device)).flatten(1)
    there = (inner >= sinks) & (inner < first)
    ends = torch.arange(sinks, device=device).expand(batch, -1)
    far = torch.cat([ends, inner.where(there, stop[:, None]), near.where(near >= first, stop[:, None])], 1)
    order = torch.arange(sinks + spans * span + window, device=device)
    index = far.where(stop[:, None] > len(order), order).sort(-1).values
    count = (index < stop[:, None]).sum(-1)
    return index.where(order < count[:, None], 0), count


def places(keep: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers, rising, of those that keep, bool [B, n], says, at most `most` in a row: int64 [B, most], then zeros; and
    how many there are, int64 [B]."""
    slot = (keep.cumsum(1) - 1).where(keep, most).clamp(max=most)
    made = slot.new_zeros(keep.shape[0], most + 1)
    made.scatter_(1, slot, torch.arange(keep.shape[1], device=keep.device).expand_as(slot))
    return made[:, :most], keep.sum(1)
