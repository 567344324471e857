"""Reading a text through its ends: what longcache reads of it while nothing is looked for (`scan=False`).

No stretch waits for what another one chose, so many of them, of all rows, are answered together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from longwave.frame import Pass
from longwave.methods.scoped import Stretch, at_places
from longwave.ops import mass
from longwave.ops.attention.reference import dense_attention, last_attention


def read_ends(
    p: Pass,
    turn: list[Stretch],
    rows: list[int],
    taken: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    sinks: int,
    near: int,
) -> torch.Tensor:
    """What the first `sinks` tokens and the last `near` up to their end tell the stretches of a turn, at places without
    gaps: as p.q, of which row n is turn[n], which ends behind sinks + near tokens. With p.sinks it sets p.lse.

    rows: tokens that rows have. taken: of tokens by number, int64 [rows, n], keys before rotation and values.
    """
    device, scope = p.q.device, sinks + near
    low = [min((s.stop for s in turn if s.row == row), default=near) - near for row in range(len(rows))]
    width = max(s.stop - low[s.row] for s in turn)  # what stretches share is taken once
    begin, most = torch.tensor([low, rows], device=device)[..., None]
    index = (begin + torch.arange(width, device=device)).minimum(most - 1).clamp(min=0)
    k, v = taken(torch.cat([torch.arange(sinks, device=device).expand(len(rows), -1), index], 1))
    own, first = torch.tensor([(s.row, sinks + s.stop - near - low[s.row]) for s in turn], device=device).T[..., None]
    at = torch.cat(
        [torch.arange(sinks, device=device).expand(len(turn), -1), first + torch.arange(near, device=device)], 1
    )
    k, v = (x[own, :, at].transpose(1, 2) for x in (k, v))
    k = at_places(p, k)
    new = torch.tensor([s.stop - s.start for s in turn], device=device)[:, None]
    place = (scope - new + torch.arange(p.q.shape[2], device=device)).clamp(max=scope - 1)
    q = p.rotary.shift(p.module, p.q, p.known_positions(), place)
    if p.sinks is not None:
        p.lse = mass.log_sum_exp(q, k, p.scaling, place + 1)
    if len({s.stop - s.start for s in turn}) == 1:
        return last_attention(q, k, v, p.scaling)
    return dense_attention(q, k, v, p.scaling, place + 1)
