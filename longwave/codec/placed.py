"""One side's numbers on a device, in the type that is computed in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longwave.codec.fitted import Scales, Side


class Placed:
    """weight, mean [c], predictor [2r + 1, c] or [0, c]; the axes of what is coded at `step` are held ready."""

    def __init__(self, side: Side, device: torch.device, dtype: torch.dtype, step: int):
        self.bases, self.device, self.dtype = side.bases, device, dtype
        self.weight, self.mean = (x.to(device, dtype) for x in (side.weight, side.mean))
        self.predictor = side.predictor.to(device, dtype) * side.unit.to(device, dtype)
        self._held = {
            (g, known): (step, self._axes(g, step, known)) for g in range(len(side.bases)) for known in (True,)
        }

    def predicted(self, f: Tensor | None, columns: slice = slice(None)) -> Tensor:
        """[n, channels], the mean alone without ids."""
        return self.mean[columns] if f is None or not len(self.predictor) else f @ self.predictor[:, columns]

    def scales(self, group: int, known: bool) -> Scales:
        basis = self.bases[group]
        return basis.known if known else basis.blind

    def coded(self, group: int, step: int, known: bool) -> np.ndarray:
        return self.scales(group, known).coded(step)

    def axes(self, group: int, step: int, known: bool) -> Tensor:
        """[g H D, components coded]."""
        held = self._held.get((group, known))
        return held[1] if held is not None and held[0] == step else self._axes(group, step, known)

    def _axes(self, group: int, step: int, known: bool) -> Tensor:
        return (
            self.bases[group]
            .orthonormal[:, torch.from_numpy(self.coded(group, step, known))]
            .to(self.device, self.dtype)
        )
