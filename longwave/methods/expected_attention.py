"""expected_attention: the tokens that queries to come are expected to attend to, by what queries looked like so far.

Source: Expected Attention, arXiv 2510.00636: un-rotated queries are taken as Gaussian with mean m and covariance S; R
is the rotation averaged over the next `ahead` positions. A key's expected weight is z = exp(mu k / sqrt(d) + k' C k /
(2 d)) with mu = R m and C = R S R'; a token is worth (z / sum z, averaged over a group's query heads, + eps) times the
length of its value. Sinks are outliers: as in the authors' code neither moments nor sums have them. There the moments
are those of the whole prompt; here of the last `queries` queries, one in `stride`, so that they can be brought up in
steps and cost no d x d numbers a head. eps there is 0.02 in the paper, 0 in its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.frame import Needs
from longwave.methods.evicting import Evicting, Held


@dataclass(frozen=True)
class ExpectedAttention(Evicting):
    """Tokens that queries to come are expected to attend to (Expected Attention).

    queries: how many say what queries look like, of the last `queries` x `stride` tokens. ahead: positions to come that
    are averaged over. eps: what every token is worth beside its weight. covariance: False leaves it out.
    """

    name: ClassVar[str] = "expected_attention"
    every: ClassVar[int] = 64

    queries: int = 64
    stride: int = 4
    ahead: int = 512
    eps: float = 0.0
    covariance: bool = True

    def __post_init__(self) -> None:
        whole("queries", self.queries, 1, "tokens")
        whole("stride", self.stride, 1, "tokens")
        whole("ahead", self.ahead, 1, "positions")
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps is a weight beside those of a softmax, at least 0; got {self.eps!r}")
        if not isinstance(self.covariance, bool):
            raise ValueError(f"covariance is True or False, got {self.covariance!r}")
        super().__post_init__()

    def needs(self) -> Needs:
        return super().needs() | Needs(queries=self.queries, every=self.stride, unrotated=True)

    def score(self, held: Held) -> torch.Tensor:
        assert held.queries is not None
        wide = torch.float64 if held.k.dtype == torch.float64 else torch.float32
        k, v = held.k.to(wide), held.v.to(wide)
        lengths = torch.linalg.vector_norm(v, dim=-1)
        mean, covariance = self.moments(held, wide)
        k = k.repeat_interleave(mean.shape[1] // k.shape[1], 1)
        expected = (k @ mean[..., None])[..., 0] * held.scaling
        if self.covariance:
            expected += ((k @ covariance) * k).sum(-1) * (held.scaling**2 / 2)
        slots = torch.arange(k.shape[2], device=k.device)
        counted = (slots >= self.sinks) & (slots < held.lengths[:, None])
        weight = expected.masked_fill(~counted[:, None], torch.finfo(wide).min).softmax(-1)
        return (weight.unflatten(1, (v.shape[1], -1)).mean(2) + self.eps) * lengths

    def moments(self, held: Held, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """mu [batch, query_heads, head_dim] and C [batch, query_heads, head_dim, head_dim] of queries to come; 0 where
        none but sinks is remembered."""
        assert held.queries is not None
        assert held.rotation is not None
        q, positions = held.queries.q, held.queries.positions
        assert q is not None
        assert positions is not None
        plain = held.rotation.off(q.to(wide), positions)
        known = (held.queries.numbers() > self.sinks).to(q.device)[:, None, :, None]
        many = known.sum(2).clamp(min=1)
        mean = (plain * known).sum(2) / many
        off = (plain - mean[:, :, None]) * known
        spread = off.mT @ off / many[..., None]
        last = held.columns["position"].amax((1, 2)).long()[:, None]
        ahead = self.rotation(held, last + torch.arange(1, self.ahead + 1, device=q.device), wide)
        return (ahead @ mean[..., None])[..., 0], ahead @ spread @ ahead.mT

    def rotation(self, held: Held, positions: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
        """R [batch, 1, head_dim, head_dim]: the rotation in the mean of positions [batch, n]."""
        assert held.rotation is not None
        batch, n, dim = *positions.shape, held.k.shape[3]
        unit = torch.eye(dim, dtype=wide, device=held.k.device)[None, :, None].expand(batch, dim, n, dim)
        return held.rotation.on(unit, positions).mean(2).mT[:, None]
