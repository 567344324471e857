"""One side's numbers on a device, in the type that is computed in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longwave.codec.fitted import Scales, Side
from longwave.codec.predict import Said, Tokens


class Placed:
    """weight, mean [c], predictor [2r + 1, c] or [0, c]; the axes of what is coded at `step` are held ready.

    columns: of each group of layers.
    """

    def __init__(self, side: Side, columns: Sequence[slice], device: torch.device, dtype: torch.dtype, step: int):
        self.bases, self.columns, self.device, self.dtype = side.bases, columns, device, dtype
        self.step = step
        self.weight, self.mean = (x.to(device, dtype) for x in (side.weight, side.mean))
        self.predictor = side.predictor.to(device, dtype) * side.unit.to(device, dtype)
        self._held = [self._axes(g, step, True) for g in range(len(side.bases))]

    def part(self, group: int) -> Placed:
        """A group's alone, sharing its numbers."""
        made, cut = copy.copy(self), self.columns[group]
        vars(made).pop("_along", None)
        made.bases, made.columns = (self.bases[group],), [slice(0, cut.stop - cut.start)]
        made.weight, made.mean, made.predictor = self.weight[cut], self.mean[cut], self.predictor[:, cut]
        made._held = [self._held[group]]
        return made

    def said(self, tokens: Tokens | None, columns: slice) -> Said:
        """What is predicted of some channels, the mean alone without ids."""
        if tokens is None or not len(self.predictor):
            return Said(self.mean[None, columns])
        return tokens.said(self.predictor[:, columns])

    def coefficients(self, group: int, x: Tensor, tokens: Tokens | None) -> Tensor:
        """What prediction leaves of x [n, channels of a group], weighed, along the axes that are coded at `step`:
        [n, m]. Only that of the prediction is made which lies along them: it is a half or less."""
        cut = self.columns[group]
        found = ((x - self.mean[cut]) * self.weight[cut]) @ self.axes(group, self.step, tokens is not None)
        if tokens is None or not len(self.predictor):
            return found
        return found - tokens.times(self._along[group])

    @cached_property
    def _along(self) -> list[Tensor]:
        """The predictor, less the mean, along the axes of each group: [2r + 1, m]."""
        found = []
        for cut, axes in zip(self.columns, self._held, strict=True):
            w = self.predictor[:, cut].clone()
            w[-1] -= self.mean[cut]
            found.append((w * self.weight[cut]) @ axes)
        return found

    def scales(self, group: int, known: bool) -> Scales:
        basis = self.bases[group]
        return basis.known if known else basis.blind

    def coded(self, group: int, step: int, known: bool) -> np.ndarray:
        return self.scales(group, known).coded(step)

    def chosen(self, group: int, step: int, known: bool) -> np.ndarray:
        """Which of the components that are coded at this codec's own step are coded at a larger one."""
        return np.searchsorted(self.coded(group, self.step, known), self.coded(group, step, known))

    def axes(self, group: int, step: int, known: bool) -> Tensor:
        """[g H D, components coded]."""
        if not known or step < self.step:
            return self._axes(group, step, known)
        held = self._held[group]
        if step == self.step:
            return held
        return held[:, torch.from_numpy(self.chosen(group, step, known)).to(self.device, non_blocking=True)]

    def _axes(self, group: int, step: int, known: bool) -> Tensor:
        coded = torch.from_numpy(self.coded(group, step, known))
        return self.bases[group].orthonormal[:, coded].to(self.device, self.dtype)
