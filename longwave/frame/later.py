"""What merging asks with (ops/merge.py): the remembered queries as later ones, and what their softmax divides by."""

from __future__ import annotations

import torch

from longwave.frame.layer import MemoryLayer
from longwave.frame.observe import probing
from longwave.ops.mass import log_sum_exp


def later_queries(
    layer: MemoryLayer, window: int, gone: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Of a layer that `probing(window)` was asked of: q [B, Hq, P, D], turned to later positions; how many tokens of
    its row each one sees, int64 [B, P] on the host, 0 or less where none is remembered; and the log of what its softmax
    over the dense tokens divides by [B, Hq, P], -inf where none is remembered. None where nothing was ever asked.

    gone: of the tokens that each row has seen, so many before the others do not lie dense any more.
    """
    wanted, queries = probing(window), layer.queries
    assert queries is not None
    if (queries.width, queries.every) != (wanted.queries, wanted.every):
        queries = queries.last(wanted.queries, wanted.every)
    if queries.q is None:  # written without a pass
        return None
    k, _ = layer.dense.view()
    q, sees = queries.later(layer.progress.rotary, layer.index)
    near = (sees - torch.tensor(gone or [0] * k.shape[0])[:, None]).clamp(min=0)
    return q, sees, log_sum_exp(q, k, layer.scaling, near.to(k.device, non_blocking=True))
