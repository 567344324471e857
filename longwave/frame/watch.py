"""Columns of attention: what each stored token got, summed as long as it is held, or of the latest pass alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from longwave.frame.observe import Needs, Pass, Step, votes_of
from longwave.ops import mass as attention_mass


def watch(
    columns: Mapping[str, torch.Tensor],
    needs: Needs,
    p: Pass,
    k: torch.Tensor,
    visible: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    """Bring columns [batch, kv_heads, capacity] up to a pass over the held keys k [batch, kv_heads, n, head_dim].

    visible int [batch, tokens]: how many of them each query sees, None for all; lse as ops.mass has it.
    """
    if p.valid is not None:
        assert visible is not None
        visible = visible * p.valid  # padding asks nothing
    if needs.mass:
        columns["mass"][:, :, : k.shape[2]] += attention_mass.mass(p.q, k, p.scaling, visible, lse)
    for width in needs.votes:
        first = 0 if p.valid is not None else max(0, p.q.shape[2] - width)
        seen = None if visible is None else visible[:, first:]
        if p.valid is not None:
            assert seen is not None
            seen = seen * (p.valid.flip(-1).cumsum(-1).flip(-1) <= width)
        got = attention_mass.mass(p.q[:, :, first:], k, p.scaling, seen, None if lse is None else lse[:, :, first:])
        column = columns[votes_of(width)][:, :, : k.shape[2]]
        if p.valid is not None:  # a row that got nothing keeps what it had
            got = got.where(p.valid.any(-1)[:, None, None], column.to(got.dtype))
        column.copy_(got)


def watch_step(columns: Mapping[str, torch.Tensor], needs: Needs, p: Pass, k: torch.Tensor, step: Step) -> None:
    """The same of one token a row, in place and by what the device knows."""
    for name in (*(["mass"] if needs.mass else []), *map(votes_of, needs.votes)):
        total = columns[name] if name == "mass" else columns[name].zero_()
        attention_mass.add_step(total, p.q, k, p.scaling, step.seen)
