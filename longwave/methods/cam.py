"""cam: what goes is added, by chance and in parts, to the values of the tokens right behind it.

Source: CaM (ICML 2024, openreview LCTmppB165): with A the attention that tokens got so far, token i that goes is merged
with probability min(1, A[i] / mean(A[i + 1 .. i + m])): each of the m tokens behind it gets v[i] / m. Keys and A stay,
norms grow. Which token goes is another method's to say: streaming's there for language modelling, with m = 16.
A pass that takes many takes them from left to right, as steps would. Draws depend on seed, layer, head and position
alone, so a row does not depend on others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.checks import whole
from longwave.frame import Needs
from longwave.methods.evicting import Evicting, Held

SOLVED = 128  # tokens that are solved for at a time


@dataclass(frozen=True)
class CaM(Evicting):
    """Recent or heavy tokens; what goes may be merged into those behind it (CaM).

    policy: which token goes, "streaming" (the oldest) or "h2o" (that of least attention). reach: tokens behind it that
    share its value. seed: of the draws.
    """

    name: ClassVar[str] = "cam"
    observes: ClassVar[Needs] = Needs(mass=True)
    folds: ClassVar[bool] = True

    policy: str = "streaming"
    reach: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("reach", self.reach, 1, "tokens")
        whole("seed", self.seed, 0, "")
        if self.policy not in ("streaming", "h2o"):
            raise ValueError(f'policy is "streaming" or "h2o", got {self.policy!r}')

    def score(self, held: Held) -> torch.Tensor:
        mass = held.columns["mass"]
        if self.policy == "h2o":
            return mass
        return torch.arange(mass.shape[2], dtype=torch.float32, device=mass.device).expand_as(mass)

    def fold(self, held: Held, gone: torch.Tensor, most: int) -> torch.Tensor:
        n, mass = held.v.shape[2], held.columns["mass"].double()
        slots = torch.arange(n, device=mass.device)
        total = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))  # of the first so many
        end = torch.minimum(slots + 1 + self.reach, held.lengths[:, None])[:, None].expand_as(mass)
        near = (end - 1 - slots).clamp(min=1)  # there may be fewer at the end
        mean = (total.gather(2, end) - total[..., 1:]) / near
        merges = draws(self.seed, held.layer, held.columns["position"]) < mass / mean
        wide = torch.float64 if held.v.dtype == torch.float64 else torch.float32
        share = (gone & merges).to(wide) / near
        return _added(held.v.to(wide), share, end, self.reach, most).to(held.v.dtype)


def _added(v: torch.Tensor, share: torch.Tensor, end: torch.Tensor, reach: int, most: int) -> torch.Tensor:
    """v [B, H, n, D] once every token has given share[.., i] of its value, with what it was given, to those from the
    next to before end[.., i]. most: how many of a head give at all."""
    n = v.shape[2]
    slots = torch.arange(n, device=v.device)
    if most == 1:
        giver = share.argmax(-1, keepdim=True)
        gets = (slots > giver) & (slots < end.gather(2, giver))
        given = share.gather(2, giver)[..., None] * v.gather(2, giver[..., None].expand(*giver.shape, v.shape[3]))
        return torch.where(gets[..., None], v + given, v)
    out = v.clone()
    for start in range(0, n, SOLVED):
        low, stop = max(0, start - reach), min(n, start + SOLVED)
        gets = (slots[low:stop] < slots[start:stop, None]) & (slots[start:stop, None] < end[..., None, low:stop])
        part = gets * share[..., None, low:stop]
        given = v[:, :, start:stop] + part[..., : start - low] @ out[:, :, low:start]
        near = torch.eye(stop - start, dtype=v.dtype, device=v.device) - part[..., start - low :]
        out[:, :, start:stop] = torch.linalg.solve_triangular(near, given, upper=False, unitriangular=True)
    return out


def draws(seed: int, layer: int, position: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), float64 as position [B, H, n]: a hash of seed, layer, head and position (splitmix64)."""
    heads = torch.arange(position.shape[1], device=position.device)[:, None]
    x = (position.long() * 4099 + heads) * 4099 + layer + seed * 0x5851F42D4C957F2D % (1 << 62)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((x >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
