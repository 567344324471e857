"""Which tokens, at which positions? Read back from layer 0, whose K and V are functions of token and position alone.

V of layer 0 says the token, K turned back says the same at the right position only. Both are compared in a few
principal directions over the vocabulary. So a cache is its text in clear to whoever has the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache

from longwave.codec.rotation import Rotation
from longwave.frame import cache_argument
from longwave.shape import other_layers

DIRECTIONS = 48
PROBED = 4  # tokens by which the first position is found
NEAR = 0.05  # what may be left of the mean square: a hundred times what bfloat16's rounding leaves
BATCH, CHUNK = 2048, 2**22


@dataclass(frozen=True, eq=False)
class Places:
    """axes float32 [2, H D, m] of K (turned back) and V; rows float16 [2, vocabulary, m]; centre float32 [2, H D];
    limit: positions a model knows."""

    axes: Tensor
    rows: Tensor
    centre: Tensor
    limit: int

    def find(self, k: Tensor, v: Tensor, rotation: Rotation) -> tuple[Tensor, int] | None:
        """(ids int64 [n], position of the first) of layer 0's k, v [n, H, D], consecutive tokens; None where they are
        no tokens of this model. rotation: of layer 0 alone."""
        n = len(k)
        axes, rows, centre = self.axes.to(k.device), self.rows.to(k.device).float(), self.centre.to(k.device)
        value = (v.reshape(n, -1).float() - centre[1]) @ axes[1]
        ids = torch.cdist(value, rows[1]).argmin(-1)
        start = self._start(k[:PROBED].float(), rows[0][ids[:PROBED]], axes[0], centre[0], rotation.to(k.device))
        positions = torch.arange(start, start + n, device=k.device)
        key = (rotation.unrotate(k[None].float(), positions)[0].reshape(n, -1) - centre[0]) @ axes[0]
        both, table = torch.cat([key, value], -1), torch.cat([rows[0], rows[1]], -1)
        size = table.var(0, unbiased=False).clamp(min=1e-20).view(2, -1).sum(-1).sqrt()  # K's and V's count alike
        scale = size.repeat_interleave(rows.shape[2])
        both, table = both / scale, table / scale
        ids = torch.cdist(both, table).argmin(-1)
        left = (both - table[ids]).square().sum(-1)
        return (ids.cpu(), start) if bool((left <= NEAR * 2).all()) else None

    def _start(self, k: Tensor, rows: Tensor, axes: Tensor, centre: Tensor, rotation: Rotation) -> int:
        """The first position at which k [p, H, D], turned back, is nearest to rows [p, m]."""
        p, best, start = len(k), float("inf"), 0
        step = max(1, CHUNK // k.numel())
        for first in range(0, self.limit, step):
            places = torch.arange(first, min(first + step, self.limit), device=k.device)
            at = (places[:, None] + torch.arange(p, device=k.device)).flatten()
            turned = rotation.unrotate(k.repeat(len(places), 1, 1)[None], at)[0].reshape(len(at), -1)
            off = ((turned - centre) @ axes - rows.repeat(len(places), 1)).square().sum(-1).view(-1, p).sum(-1)
            least, where = off.min(0)
            if float(least) < best:
                best, start = float(least), first + int(where)
        return start


class _Stored(Exception):
    """K and V of the first layer."""


class _Tap(DynamicCache):
    """An empty cache that ends a forward pass at what its first layer stores."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Stored(key_states, value_states)


@torch.no_grad()
def places(model: Any, rotation: Rotation, limit: int) -> Places | None:
    """Of a model; None where its first layer is no memory layer, or cannot be asked for one token at a time."""
    config = model.config.get_text_config(decoder=True)
    if other_layers(config)[0] is not None:
        return None
    vocabulary, first = model.get_input_embeddings().weight.shape[0], rotation.layers([0])
    sides: list[list[Tensor]] = [[], []]
    for start in range(0, vocabulary, BATCH):
        ids = torch.arange(start, min(start + BATCH, vocabulary), device=model.device)[:, None]
        try:
            model(ids, **cache_argument(model, _Tap(config=config)), use_cache=True, position_ids=torch.zeros_like(ids))
        except _Stored as stored:
            k, v = (x[:, :, 0].float().cpu() for x in stored.args)  # [rows, H, D]
            sides[0].append(first.unrotate(k[None], torch.zeros(len(k), dtype=torch.long))[0].flatten(1))
            sides[1].append(v.flatten(1))
        except Exception:  # whatever this model asks of a cache: then ids must be given
            return None
    axes, rows, centres = [], [], []
    for x in (torch.cat(side).double() for side in sides):
        centre = x.mean(0)
        found = torch.linalg.eigh((x - centre).mT @ (x - centre))[1].flip(-1)[:, :DIRECTIONS]
        found = found / (x - centre).square().sum(-1).mean().sqrt().clamp(min=1e-30)  # within float16's range
        rows.append(((x - centre) @ found).half())
        axes.append(found.float())
        centres.append(centre.float())
    if not all(bool(torch.isfinite(x).all()) for x in rows):
        return None
    return Places(torch.stack(axes), torch.stack(rows), torch.stack(centres), limit)
