"""The ends of a coded row: its first tokens as they are, its last in 8 bits.

Every channel of a head and layer has 256 levels from its least to its largest number among these tokens. The first
tokens are none of them: they draw attention, and their keys are far from all others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

TOP = 255


def ends(x: torch.Tensor, sinks: int, exact: bool) -> dict[str, torch.Tensor]:
    """The first `sinks` tokens and the last ones of a row, numbers [layers, kv_heads, n, head_dim], as parts by name.

    "kept": what stays as it is; exact: all of it. "codes": uint8 of the others alike; "levels": float32 [2, layers,
    kv_heads, 1, head_dim], the least and the distance between two. ValueError for numbers that are not finite.
    """
    if exact:
        return {"kept": x}
    last = x[:, :, sinks:].float()
    least, most = last.amin(2, keepdim=True), last.amax(2, keepdim=True)
    levels = torch.stack([least, (most - least) / TOP])
    if not bool(torch.isfinite(levels).all()):
        raise ValueError("K or V of the last tokens holds a number that is not finite: save with exact=True")
    codes = ((last - levels[0]) / levels[1].clamp(min=torch.finfo(torch.float32).tiny)).round_().clamp_(0, TOP)
    return {"kept": x[:, :, :sinks].clone(), "codes": codes.to(torch.uint8), "levels": levels}


def from_ends(parts: Mapping[str, torch.Tensor], layers: slice) -> torch.Tensor:
    """The numbers of some layers again, in the type of what stayed as it was."""
    kept = parts["kept"][layers]
    if "codes" not in parts:
        return kept
    least, step = parts["levels"][:, layers]
    last = torch.addcmul(least, parts["codes"][layers].float(), step)
    return torch.cat([kept, last.to(kept.dtype)], 2)
