"""Compress and attend over pages in plain torch: the twin every kernel is held to.

Notation: E is a basis table [S, T] with orthonormal rows, X one head's keys or values over a segment [T, channels].
Compressed channels are stored as C = E X, kept ones as values or as codes with X ~ scale * code + zero. Attention is
linear in K before the softmax and linear in V after it, so none of it has to be rebuilt:
    compressed        scores += (q C^T) E                       out += (p E^T) C
    codes, axis time  scores += (q * scale) codes + q zero      out += (p codes) * scale + sum(p) zero
    codes, axis token scores += (q codes) * scale + sum(q) zero out += (p * scale) codes + (p zero)
    merged             scores += b, one number a segment
Residual codes stand for (X - E^T C) R, R a rotation across channels: q R comes in, and R^T goes out.
Source: docs/fourier.md; the re-association replaces the per-position synthesis of arXiv 2506.11886.

Where many queries come at once, `expand` makes all of it dense again instead, once for all of them.

Shapes below: B batch, H key/value heads, h heads of a group, R query rows per such head (group x query length), N
segments of T tokens, D head_dim. Pages are uint8 [B, N, page bytes] (layout.py); a head with fewer states takes the
first rows of the table.
"""

import functools
from collections.abc import Iterable, Iterator

import torch

from longwave.ops.codes import BITS, pack, quantize, rotation, unpack
from longwave.ops.spectral.layout import Group, Layout

BLOCK = 2048  # tokens, of all rows, that `expand` makes at once


def project(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Coefficients of channels: x [..., T, c], table [S, T] -> [..., S, c] in the table's dtype."""
    return table @ x.to(table.dtype)


def synthesize(coef: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The channels that coefficients stand for: [..., S, c] -> [..., T, c]."""
    return table.mT @ coef.to(table.dtype)


@functools.cache  # a captured graph reads a table at its address: none may go
def _rotation(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return rotation(n).to(dtype=dtype, device=device)


def encode(layout: Layout, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Pages [B, N, page bytes] of K and V [B, H, N * T, D]."""
    b, _, m, _ = k.shape
    pages = torch.zeros(b, m // layout.segment, layout.page_bytes, dtype=torch.uint8, device=k.device)
    for groups, x in ((layout.k, k), (layout.v, v)):
        x = x.unflatten(2, (-1, layout.segment)).transpose(1, 2)  # [B, N, H, T, D]
        for group in groups:
            order = group.order.long()[:, None].expand(*x.shape[:2], -1, layout.segment, -1)
            _encode_group(group, pages, x.index_select(2, group.heads).gather(-1, order), table)
    return pages


def _encode_group(group: Group, pages: torch.Tensor, x: torch.Tensor, table: torch.Tensor) -> None:
    code, table = group.code, table[: group.code.states]
    fine = x.to(table.dtype)
    if group.states is not None:
        coef = project(fine if code.residual else fine[..., code.kept :], table)
        if group.gains is not None:
            gain = (coef.abs().amax(-1) / 127).half()
            coef = (coef / gain.to(coef.dtype).clamp(min=2.0**-24)[..., None]).round().clamp(-127, 127)
            group.gains.view(pages).copy_(gain)
        group.states.view(pages).copy_(coef)
        if code.residual:
            fine = fine - synthesize(_states(group, pages, table.dtype), table)
    start = 0
    for (bits, n), values, scales in zip(code.runs, group.values, group.scales, strict=True):
        part = fine[..., start : start + n]
        start += n
        if code.residual:
            part = part @ _rotation(n, part.dtype, part.device)
        if scales is None:
            values.view(pages).copy_(part)
            continue
        if code.axis == "time":
            codes, scale, zero = quantize(part.mT, bits, fit=code.fit)
            stored = torch.stack([scale[..., 0], zero[..., 0]], dim=-2)
        else:
            shared = part.unflatten(-1, (-1, code.group or n))
            codes, scale, zero = quantize(shared, bits, zero=code.zero, fit=code.fit)
            codes = codes.flatten(-2)
            stored = torch.stack([scale, zero], dim=-4)[..., 0] if code.zero else scale.unsqueeze(-4)[..., 0]
        values.view(pages).copy_(pack(codes, bits))
        scales.view(pages).copy_(stored)


def _states(group: Group, pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Coefficients [B, N, h, S, c]."""
    assert group.states is not None
    coef = group.states.view(pages).to(dtype)
    return coef if group.gains is None else coef * group.gains.view(pages).to(dtype)[..., None]


def _token_scales(group: Group, run: int, pages: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of a run on the token axis, each [B, N, h, T, groups]."""
    bits, _ = group.code.runs[run]
    field = group.scales[run]
    assert field is not None
    held = field.view(pages).to(dtype)
    scale = held[..., 0, :, :]
    return scale, held[..., 1, :, :] if group.code.zero else -scale * (2**bits - 1) / 2


def _runs(group: Group, pages: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """(run, first channel, channels, values or codes in `dtype`)."""
    start = 0
    for i, ((bits, n), field) in enumerate(zip(group.code.runs, group.values, strict=True)):
        held = field.view(pages)
        yield i, start, n, (unpack(held, bits) if bits in BITS else held).to(dtype)
        start += n


def scores(layout: Layout, pages: torch.Tensor, q: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Scores [B, H, R, N * T] of q [B, H, R, D], which is scaled already (the table's dtype)."""
    b, _, r, _ = q.shape
    out = q.new_empty(b, layout.heads, r, pages.shape[1] * layout.segment)
    for group in layout.k:
        order = group.order.long()[:, None].expand(b, -1, r, -1)
        part = _group_scores(group, pages, q.index_select(1, group.heads).gather(-1, order), table)
        out[:, group.heads] = part.permute(0, 2, 3, 1, 4).flatten(-2)
    return out


def _group_scores(group: Group, pages: torch.Tensor, q: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """q [B, h, R, D] in the group's channel order -> [B, N, h, R, T]."""
    code, q = group.code, q[:, None]
    total = q.new_zeros(*pages.shape[:2], *q.shape[2:4], table.shape[1])
    if group.states is not None:
        smooth = q if code.residual else q[..., code.kept :]
        total += smooth @ _states(group, pages, q.dtype).mT @ table[: code.states]
    if group.bias is not None:
        total += group.bias.view(pages).to(q.dtype)[..., None, None]
    for i, start, n, held in _runs(group, pages, q.dtype):
        own = q[..., start : start + n]
        if code.residual:
            own = own @ _rotation(n, q.dtype, q.device)
        field = group.scales[i]
        if field is None:
            total += own @ held.mT
        elif code.axis == "time":
            scale, zero = field.view(pages).to(q.dtype)[..., None, :].unbind(-3)
            total += (own * scale) @ held + (own * zero).sum(-1, keepdim=True)
        else:
            scale, zero = _token_scales(group, i, pages, q.dtype)
            for g in range(scale.shape[-1]):
                width = n // scale.shape[-1]
                some = own[..., g * width : (g + 1) * width]
                dot = some @ held[..., g * width : (g + 1) * width].mT
                total += dot * scale[..., None, :, g] + some.sum(-1, keepdim=True) * zero[..., None, :, g]
    return total


def write_bias(layout: Layout, pages: torch.Tensor, bias: torch.Tensor) -> None:
    """Put bias [B, H, N] of merged heads into pages [B, N, page bytes]; that of other heads is left out."""
    for group in layout.k:
        if group.bias is not None:
            group.bias.view(pages).copy_(bias[:, group.heads].mT)


def read_bias(layout: Layout, pages: torch.Tensor) -> torch.Tensor:
    """float32 [B, H, N]: what is added to the scores of each segment of each head."""
    out = torch.zeros(pages.shape[0], layout.heads, pages.shape[1], device=pages.device)
    for group in layout.k:
        if group.bias is not None:
            out[:, group.heads] = group.bias.view(pages).float().mT
    return out


def mix(layout: Layout, pages: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The output [B, H, R, D] of probabilities p [B, H, R, N * T] (the table's dtype)."""
    b, _, r, _ = p.shape
    out = p.new_zeros(b, layout.heads, r, layout.dim)
    by_page = p.unflatten(-1, (-1, layout.segment)).permute(0, 3, 1, 2, 4)  # [B, N, H, R, T]
    for group in layout.v:
        part = _group_mix(group, pages, by_page.index_select(2, group.heads), table)
        order = group.order.long()[:, None].expand(b, -1, r, -1)
        out[:, group.heads] = torch.zeros_like(part).scatter(-1, order, part)
    return out


def _group_mix(group: Group, pages: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """p [B, N, h, R, T] -> [B, h, R, D] in the group's channel order."""
    code = group.code
    b, _, h, r, _ = p.shape
    out = p.new_zeros(b, h, r, group.order.shape[1])
    if group.states is not None:
        first = 0 if code.residual else code.kept
        out[..., first:] += (p @ table[: code.states].mT @ _states(group, pages, p.dtype)).sum(1)
    for i, start, n, held in _runs(group, pages, p.dtype):
        field = group.scales[i]
        if field is None:
            own = (p @ held).sum(1)
        elif code.axis == "time":
            scale, zero = field.view(pages).to(p.dtype)[..., None, :].unbind(-3)
            own = ((p @ held.mT) * scale + p.sum(-1, keepdim=True) * zero).sum(1)
        else:
            scale, zero = _token_scales(group, i, pages, p.dtype)
            width = n // scale.shape[-1]
            own = torch.cat(
                [
                    (
                        (p * scale[..., None, :, g]) @ held[..., g * width : (g + 1) * width]
                        + (p * zero[..., None, :, g]).sum(-1, keepdim=True)
                    ).sum(1)
                    for g in range(scale.shape[-1])
                ],
                dim=-1,
            )
        if code.residual:
            own = own @ _rotation(n, p.dtype, p.device).mT
        out[..., start : start + n] += own
    return out


def decode(layout: Layout, pages: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The K and V that pages stand for, [B, H, N * T, D] each, in the table's dtype. Attention over them needs
    `read_bias` too."""
    return decode_side(layout, layout.k, pages, table), decode_side(layout, layout.v, pages, table)


def decode_side(layout: Layout, groups: Iterable[Group], pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """One of the two alone, by its groups."""
    whole = table.new_zeros(*pages.shape[:2], layout.heads, layout.segment, layout.dim)
    for group in groups:
        part = _group_values(group, pages, table)
        order = group.order.long()[:, None].expand_as(part)
        whole[:, :, group.heads] = torch.zeros_like(part).scatter(-1, order, part)
    return whole.transpose(1, 2).flatten(2, 3)


def expand(layout: Layout, pages: torch.Tensor, table: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor) -> None:
    """Write what `decode` gives into out_k and out_v [B, H, N * T, D], some pages at a time: of these alone there is a
    copy in the table's dtype beside."""
    b, n, _ = pages.shape
    for out in (out_k, out_v):
        check_dense(out, (b, layout.heads, n * layout.segment, layout.dim))
    some = max(1, BLOCK // max(1, b * layout.segment))
    for start in range(0, n, some):
        tokens = slice(start * layout.segment, (start + some) * layout.segment)
        for out, part in zip((out_k, out_v), decode(layout, pages[:, start : start + some], table), strict=True):
            out[:, :, tokens] = part


def check_dense(out: torch.Tensor, shape: tuple[int, int, int, int]) -> None:
    """Raise ValueError where `expand` cannot fill such an output."""
    if out.shape != shape or out.stride(-1) != 1:
        raise ValueError(f"pages expand to {list(shape)}, channels side by side; got {list(out.shape)}, {out.stride()}")


def _group_values(group: Group, pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[B, N, h, T, D] in the group's channel order."""
    code, dtype = group.code, table.dtype
    out = table.new_zeros(*pages.shape[:2], *group.order.shape[:1], table.shape[1], group.order.shape[1])
    if group.states is not None:
        first = 0 if code.residual else code.kept
        out[..., first:] = synthesize(_states(group, pages, dtype), table[: code.states])
    for i, start, n, held in _runs(group, pages, dtype):
        field = group.scales[i]
        if field is None:
            own = held
        elif code.axis == "time":
            scale, zero = field.view(pages).to(dtype).unbind(-2)
            own = (held * scale[..., None] + zero[..., None]).mT
        else:
            scale, zero = _token_scales(group, i, pages, dtype)
            own = (held.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None] + zero[..., None]).flatten(-2)
        if code.residual:
            own = own @ _rotation(n, dtype, own.device).mT
        out[..., start : start + n] += own
    return out
