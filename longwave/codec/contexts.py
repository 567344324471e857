"""What numbers of a group of layers are coded in: their contexts, made once for each form that segments have."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from longwave.codec import entropy
from longwave.codec.fitted import Scales
from longwave.codec.transform import bands

KEPT = 256  # of a group each: a byte a number


@lru_cache(KEPT)
def contexts(sides: tuple[Scales, ...], step: int, n: int, cosines: bool, device: torch.device) -> Tensor:
    """uint8 [numbers] on a device: of the components of K and of V that are coded at `step`, n numbers each. sides:
    their sizes. cosines: whether time is transformed. Not to be written to."""
    band = bands(n).numpy() if cosines else np.zeros(n, np.int64)
    found = [
        entropy.context(scales.band.numpy().astype(np.int64)[scales.coded(step)], step)[:, band].reshape(-1)
        for scales in sides
    ]
    return torch.from_numpy(np.concatenate(found)).to(device)
