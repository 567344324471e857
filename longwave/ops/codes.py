"""Numbers in few bits: affine quantisation of groups, and packing of the codes into bytes.

A group of n numbers x becomes codes 0 .. 2^bits - 1 with x ~ scale * code + zero. Packing is strided: of n codes with
`bits` each, code i lies in byte i mod (n * bits / 8), above the codes before it. So the codes of one shift are
contiguous, in memory and after unpacking, which is what vector units want. Three bits are a plane of two and a plane of
one, one after the other.
"""

import torch

BITS = (8, 4, 3, 2, 1)
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
# the share of a group's range that the codes span: outliers are clipped where that lowers the squared error
SPANS = {
    8: (1.0,),
    4: (1.0, 0.95, 0.9, 0.85, 0.8),
    3: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7),
    2: (1.0, 0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5),
    1: (0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25),
}
TINY = 2.0**-14  # the smallest normal float16: a constant group has no range


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of n packed codes; n must fill whole bytes in every plane."""
    if n % 8:
        raise ValueError(f"codes are packed by eights, got {n} in a row")
    return n * bits // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., n] below 2^bits -> uint8 [..., n * bits / 8]."""
    parts, shift = [], 0
    for width in PLANES[bits]:
        plane = (codes >> shift) & (2**width - 1)
        columns = plane.unflatten(-1, (8 // width, -1))  # [..., codes in a byte, bytes]
        byte = columns[..., 0, :].clone()
        for i in range(1, 8 // width):
            byte |= columns[..., i, :] << (i * width)
        parts.append(byte)
        shift += width
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [..., n * bits / 8] -> uint8 codes [..., n]."""
    n = packed.shape[-1] * 8 // bits
    codes, start, shift = None, 0, 0
    for width in PLANES[bits]:
        plane = packed[..., start : start + n * width // 8]
        if width < 8:
            plane = torch.stack([(plane >> i * width) & (2**width - 1) for i in range(8 // width)], dim=-2).flatten(-2)
        codes = plane if codes is None else codes | plane << shift
        start += n * width // 8
        shift += width
    assert codes is not None
    return codes


def quantize(
    x: torch.Tensor, bits: int, zero: bool = True, fit: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of groups x [..., n] (float32 or float64): (uint8 [..., n], scale [..., 1], zero [..., 1] in float16).

    zero: whether the codes may be centred anywhere; False centres them on 0, and the zero need not be stored, since it
    is -scale * (2^bits - 1) / 2. fit: choose the span with the least squared error instead of the whole range.
    Raises ValueError where a scale exceeds float16.
    """
    top = 2**bits - 1
    if zero:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        centre, reach = (low + high) / 2, high - low
    else:
        centre, reach = torch.zeros_like(x[..., :1]), 2 * x.abs().amax(-1, keepdim=True)
    best: tuple[torch.Tensor, ...] | None = None
    for span in SPANS[bits] if fit else (1.0,):
        scale = (reach * span / top).clamp(min=TINY).half()
        start = (centre - scale.to(x.dtype) * top / 2).half() if zero else centre
        wide = start.to(x.dtype) if zero else -scale.to(x.dtype) * top / 2
        codes = ((x - wide) / scale.to(x.dtype)).round_().clamp_(0, top)
        error = (codes * scale.to(x.dtype) + wide - x).square().sum(-1, keepdim=True)
        if best is None:
            best = (codes, scale, start, error)
        else:
            better = error < best[3]
            fresh = (codes, scale, start, error)
            best = tuple(torch.where(better, new, old) for new, old in zip(fresh, best, strict=True))
    assert best is not None
    codes, scale, start, _ = best
    if not bool(torch.isfinite(scale).all() and torch.isfinite(start).all()):
        raise ValueError("K or V exceed what float16 scales can hold (65504): keep these channels at 16 bits")
    return codes.to(torch.uint8), scale, start.half()


def signs(n: int) -> torch.Tensor:
    """`rotation` times the square root of n, a power of two: int8 [n, n], all 1 and -1."""
    return (rotation(n) * n**0.5).round().to(torch.int8)


def rotation(n: int) -> torch.Tensor:
    """An orthonormal, symmetric or not, [n, n] table that spreads every channel over all: float64.

    Hadamard where n is a power of two, else the DCT-II. Values after it are closer to normal, so a scale for a token
    serves all of them.
    """
    if n & (n - 1) == 0:
        table = torch.ones(1, 1, dtype=torch.float64)
        while table.shape[0] < n:
            table = torch.cat([torch.cat([table, table], 1), torch.cat([table, -table], 1)])
        return table / n**0.5
    from longwave.ops.spectral.basis import BASES

    return BASES["dct"](n).mT.contiguous()
