"""Compress and attend in plain torch: the twin every kernel is held to.

Notation: E is a basis table [S, T]; K one head's keys over a segment [T, channels]. A segment stores C = E K for its
compressed channels and K itself for the rest. Attention is linear in K before the softmax and linear in V after it,
so neither is ever rebuilt:
    scores = q_kept K_kept^T + (q_comp C^T) E            out_kept = p V_kept,   out_comp = (p E^T) C
Source: the re-association in docs/fourier.md, which replaces the per-position synthesis of arXiv 2506.11886.

Shapes below: B batch, H key/value heads, R query rows per such head (group x query length), M middle tokens
(a whole number of segments), n kept and c compressed channels.
"""

import torch


def project(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Coefficients of channels: x [B, H, M, c], table [S, T] -> [B, H, M/T, S, c] in the table's dtype."""
    b, h, m, c = x.shape
    return table @ x.reshape(b, h, m // table.shape[1], table.shape[1], c).to(table.dtype)


def synthesize(coef: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The channels that coefficients stand for: [B, H, segments, S, c] -> [B, H, M, c]. For tests and plots."""
    b, h, segments, _, c = coef.shape
    return (table.mT @ coef.to(table.dtype)).reshape(b, h, segments * table.shape[1], c)


def scores(
    q_kept: torch.Tensor,
    q_comp: torch.Tensor,
    kept: torch.Tensor,
    coef: torch.Tensor,
    table: torch.Tensor,
) -> torch.Tensor:
    """Unscaled attention scores over the middle.

    q_kept [B, H, R, n], q_comp [B, H, R, c], kept [B, H, M, n], coef [B, H, segments, S, c] -> [B, H, R, M],
    all computed in the dtype of `table` (float32 or float64).
    """
    b, h, r, _ = q_kept.shape
    segments, states, c = coef.shape[2:]
    dtype = table.dtype
    projected = q_comp @ coef.reshape(b, h, segments * states, c).to(dtype).mT
    smooth = (projected.view(b, h, r * segments, states) @ table).view(b, h, r, segments * table.shape[1])
    return smooth.add_(q_kept @ kept.to(dtype).mT) if kept.shape[-1] else smooth


def mix(
    p: torch.Tensor,
    kept: torch.Tensor,
    coef: torch.Tensor,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output over the middle from probabilities p [B, H, R, M]: (kept [B, H, R, n], compressed [B, H, R, c])."""
    b, h, r, _ = p.shape
    segments, states, c = coef.shape[2:]
    dtype = table.dtype
    spectrum = p.reshape(b, h, r * segments, table.shape[1]) @ table.mT
    out_comp = spectrum.view(b, h, r, segments * states) @ coef.reshape(b, h, segments * states, c).to(dtype)
    return p @ kept.to(dtype), out_comp
