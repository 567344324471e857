"""One side's numbers on a device, in the type that is computed in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longwave.codec.fitted import Scales, Side
from longwave.codec.predict import Tokens


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

    def predicted(self, tokens: Tokens | None, columns: slice) -> Tensor:
        """[n, channels], the mean alone without ids."""
        if tokens is None or not len(self.predictor):
            return self.mean[columns]
        return tokens.times(self.predictor[:, columns])

    def coefficients(self, x: Tensor, tokens: Tokens | None) -> list[Tensor]:
        """What prediction leaves of x [n, channels], weighed, along the axes that are coded at `step`: [n, m] of each
        group. Only that of the prediction is made which lies along them: it is a half or less."""
        known = tokens is not None
        left = (x - self.mean) * self.weight
        found = [left[:, cut] @ self.axes(g, self.step, known) for g, cut in enumerate(self.columns)]
        if tokens is None or not len(self.predictor):
            return found
        predicted = tokens.times(self._along).split([c.shape[1] for c in found], 1)
        return [c - some for c, some in zip(found, predicted, strict=True)]

    @cached_property
    def _along(self) -> Tensor:
        """The predictor, less the mean, along the axes of all groups: [2r + 1, components]."""
        parts = []
        for g, cut in enumerate(self.columns):
            w = self.predictor[:, cut].clone()
            w[-1] -= self.mean[cut]
            parts.append((w * self.weight[cut]) @ self._held[g])
        return torch.cat(parts, 1)

    def scales(self, group: int, known: bool) -> Scales:
        basis = self.bases[group]
        return basis.known if known else basis.blind

    def coded(self, group: int, step: int, known: bool) -> np.ndarray:
        return self.scales(group, known).coded(step)

    def axes(self, group: int, step: int, known: bool) -> Tensor:
        """[g H D, components coded]."""
        return self._held[group] if known and step == self.step else self._axes(group, step, known)

    def _axes(self, group: int, step: int, known: bool) -> Tensor:
        return (
            self.bases[group]
            .orthonormal[:, torch.from_numpy(self.coded(group, step, known))]
            .to(self.device, self.dtype)
        )
