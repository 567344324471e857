"""`longwave.specpc`: a prompt is shortened to the tokens that a draft model looks at, before another model reads it.

Source: SpecPC, arXiv 2506.08373. The draft's last prompt queries ask, the i-th of n with weight (i - 1) / (n - 1), and
those of a few tokens that it writes with weight 1. A token is worth the most that any of them gives it, over all heads
and all layers but the first ones. The best tokens stay with their neighbours, and so do the last ones of the prompt.
The model reads what is left as a prompt of its own, at positions 0, 1, 2 ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import max_pool1d
from transformers import PreTrainedModel

from longwave.checks import whole
from longwave.frame import Needs, observing
from longwave.ops.mass import peak
from longwave.prefill.draft import checked_mask, vocabulary, write_on


@dataclass(frozen=True, eq=False)
class Shortened:
    """What is left of a prompt: `model.generate(short.ids, attention_mask=short.mask)`.

    ids, mask int64 [batch, n], padded on the left; positions int64 [batch, n]: the number that each token had in its
    row before, from 0 on, -1 where it is padding. drafted int64 [batch, ahead]: what the draft wrote after the prompt.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    drafted: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor, kept: list[torch.Tensor], drafted: torch.Tensor) -> Shortened:
        """What stays of a prompt ids, mask int64 [batch, n]: of each row's real tokens the numbers `kept`, rising."""
        found = torch.full((len(ids), max(map(len, kept))), -1)
        columns = torch.zeros_like(found)
        for b, some in enumerate(kept):
            found[b, found.shape[1] - len(some) :] = some
            columns[b, found.shape[1] - len(some) :] = mask[b].nonzero()[:, 0].cpu()[some]
        found, columns = found.to(ids.device), columns.to(ids.device)
        return cls(ids.gather(1, columns), (found >= 0).to(mask.dtype), found, drafted.to(ids.device))


@torch.no_grad()
def specpc(
    draft: PreTrainedModel,
    ids: torch.Tensor,
    tokens: int = 1024,
    attention_mask: torch.Tensor | None = None,
    *,
    window: int = 64,
    ahead: int = 1,
    skip: int = 8,
    kernel: int = 65,
) -> Shortened:
    """Shorten a prompt to at most `tokens` tokens a row, by what a draft model of the same tokenizer attends to.

    ids int64 [batch, n]; attention_mask alike, 0 where a row is padded, on the left. window: the prompt's last tokens,
    that ask and stay. ahead: tokens that the draft writes, which ask as well. skip: first layers of the draft that have
    no say. kernel: tokens that stay together, a best one and its neighbours; odd.

    The draft holds K and V of the whole prompt while it reads; nothing of it stays. Selects longwave's attention
    function on the draft, whose other uses go on as before.
    Raises ValueError for options out of range, rows that end in padding, another tokenizer, and a draft whose layers
    are all skipped; NotImplementedError for a draft that no cache of ours fits.
    """
    whole("window", window, 1, "tokens")
    whole("tokens", tokens, window + 1, "tokens (window + 1)")
    whole("ahead", ahead, 0, "tokens")
    whole("skip", skip, 0, "layers")
    if whole("kernel", kernel, 1, "tokens") % 2 == 0:
        raise ValueError(f"kernel is an odd number of tokens, got {kernel}")
    mask = checked_mask(ids, attention_mask)
    memory = observing(draft, Needs(queries=window + ahead))
    layers = [layer for layer in memory.memory_layers() if layer.index >= skip]
    if not layers:
        raise ValueError(
            f"skip={skip} leaves no layer of this draft to ask: its last one with full attention is "
            f"{max(layer.index for layer in memory.memory_layers())}"
        )
    # of one more than are asked for, all those are read
    drafted = write_on(draft, memory, ids, mask, ahead + 1, vocabulary(draft))[:, :ahead]
    worth = torch.stack([_worth(layer, window, ahead).amax(1).cpu() for layer in layers]).amax(0)
    kept = [chosen(worth[b, :n], tokens, window, kernel) for b, n in enumerate(mask.sum(-1).tolist())]
    return Shortened.of(ids, mask, kept, drafted)


def _worth(layer: Any, window: int, ahead: int) -> torch.Tensor:
    """The most that one query gives each token in a layer that remembers the last ones: [batch, kv_heads, tokens]."""
    k, _ = layer.dense.view()
    queries = layer.queries
    number = queries.numbers().to(k.device)
    back = torch.arange(window + ahead - 1, -1, -1, device=k.device) - ahead  # tokens before the prompt's last
    asking = (torch.tensor(queries.seen, device=k.device) - ahead).clamp(max=window)[:, None]  # of the prompt
    rank = (asking - 1 - back) / (asking - 1).clamp(min=1)
    weight = torch.where((back < 0) | (asking == 1), 1.0, rank) * (number > 0)
    return peak(queries.q, k, layer.scaling, number.clamp(min=0), weight.to(torch.float32))


def chosen(worth: torch.Tensor, tokens: int, window: int, kernel: int) -> torch.Tensor:
    """Which of a prompt's tokens stay, rising: int64 [at most `tokens`], by worth [n].

    The last `window`; and of the others, from the best on, each with the kernel // 2 tokens on either side of it; of
    the last neighbourhood that finds room the tokens nearest to its best one.
    """
    n = len(worth)
    if n <= tokens:
        return torch.arange(n)
    free = worth[: n - window]
    most, best = (x[0] for x in max_pool1d(free[None], kernel, 1, kernel // 2, return_indices=True))
    near = (torch.arange(len(free)) - best).abs().argsort(stable=True)
    order = near[most[near].argsort(descending=True, stable=True)]
    return torch.cat([order[: tokens - window].sort().values, torch.arange(n - window, n)])
