"""weightedkv: the key of the token with the least attention goes, its value is folded into its right neighbour's.

Source: WeightedKV, arXiv 2503.01330: keys lie in few directions, values do not. With w the attention that a token got
in the mean of the queries that saw it, v[j + 1] becomes (w[j] v[j] + w[j + 1] v[j + 1]) / (w[j] + w[j + 1]); the
neighbour's key and w stay its own. The printed algorithm writes the mean over the sum that it is taken of, which would
punish age; the text keeps both, and so does this. A prompt has no recipe there: here its tokens of least mean go
together, and of a run of them the rightmost is folded first. Grouped heads are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.frame import Needs
from longwave.methods.evicting import Evicting, Held


@dataclass(frozen=True)
class WeightedKV(Evicting):
    """Tokens that got most attention on average; what goes leaves its value in the next one (WeightedKV).

    merge: False drops the value as well (the paper's "Eviction").
    """

    name: ClassVar[str] = "weightedkv"
    observes: ClassVar[Needs] = Needs(mass=True)

    merge: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.merge, bool):
            raise ValueError(f"merge is True or False, got {self.merge!r}")

    @property
    def folds(self) -> bool:  # type: ignore[override]
        return self.merge

    def score(self, held: Held) -> torch.Tensor:
        return held.mean_mass()

    def fold(self, held: Held, gone: torch.Tensor, most: int) -> torch.Tensor:
        return into_the_right(held.v, held.mean_mass(), gone)


def into_the_right(v: torch.Tensor, weight: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Values v [.., n, D] with those gone, bool [.., n], folded into the next that stays, the nearest first.

    Each time the receiver becomes the mean of both by their own weight [.., n] > 0. One that stays must follow. What is
    left in the places of those gone means nothing.
    """
    n, wide = v.shape[-2], torch.float64 if v.dtype == torch.float64 else torch.float32
    slots = torch.arange(n, device=v.device).expand(gone.shape)
    target = slots.masked_fill(gone, n).flip(-1).cummin(-1).values.flip(-1).clamp(max=n - 1)  # the next that stays
    w = weight.double().clamp(min=torch.finfo(torch.float32).tiny)
    own = w.gather(-1, target)
    # what folding this one leaves of all that its receiver had before: logs, since they multiply up along a run
    left = torch.where(gone, torch.log(own / (own + w)), torch.zeros_like(w))
    mine = torch.where(gone, w / (own + w), torch.ones_like(w))
    # folded later, those further left in a run take their part of all that came before: from the run's start to here
    through = left.cumsum(-1)
    begins = (target != target.roll(1, -1)) | (slots == 0)
    start = slots.masked_fill(~begins, 0).cummax(-1).values
    before = through.gather(-1, start) - left.gather(-1, start)
    share = (mine * torch.exp(through - left - before)).to(wide)[..., None]
    x = v.to(wide)
    stays = torch.where((share == 1) & ~gone[..., None], x, share * x)  # untouched to the last bit
    parts = torch.where(gone[..., None], share * x, torch.zeros_like(x))
    return stays.scatter_add(-2, target[..., None].expand_as(parts), parts).to(v.dtype)
