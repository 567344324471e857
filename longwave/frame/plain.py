"""A 4D mask that says no more than a 2D one: models that read images hand one with every pass, text alone included."""

from __future__ import annotations

import torch

BLOCK = 1 << 24  # numbers of a mask looked at in one go


def padding_of(mask: torch.Tensor, rows: int, new: int, columns: int) -> torch.Tensor | None:
    """Which columns are real, bool [rows or 1, columns], where a mask is causal but for padding; None where it is not.

    mask [rows or 1, heads or 1, new, columns or more], bool or added to scores, of the last `new` columns. What a
    padding token sees says nothing. Reads back from the device once.
    """
    if mask.ndim != 4 or mask.shape[0] not in (1, rows) or mask.shape[2] != new or mask.shape[3] < columns:
        return None
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        return None
    device = mask.device
    step = max(1, BLOCK // (mask.shape[0] * mask.shape[1] * columns))
    blocks = [slice(start, min(start + step, new)) for start in range(0, new, step)]
    real = torch.stack([_shown(mask[:, :, block, :columns]).any(2).all(1) for block in blocks]).any(0)
    column, odd = torch.arange(columns, device=device), torch.zeros((), dtype=torch.bool, device=device)
    for block in blocks:
        part, asking = mask[:, :, block, :columns], column[columns - new :][block]
        plain = (column <= asking[:, None]) & real[:, None, None]
        differs = _shown(part) != plain
        if part.is_floating_point():  # a bias is neither shown nor hidden
            differs |= _shown(part) & (part != 0)
        odd |= (differs & real[:, asking][:, None, :, None]).any()
    return None if bool(odd) else real


def _shown(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
