"""Basis tables: [states, tokens], orthonormal rows, lowest frequency (or degree) first.

This module knows nothing about attention or caches.
"""

import functools
import math
from collections.abc import Callable

import torch


def _dct(tokens: int) -> torch.Tensor:
    """DCT-II: cos(pi n (t + 1/2) / T). No jump where the ends meet, so it suits a cut-out segment."""
    n = torch.arange(tokens, dtype=torch.float64)[:, None]
    t = torch.arange(tokens, dtype=torch.float64)[None, :]
    table = torch.cos(math.pi * n * (t + 0.5) / tokens) * math.sqrt(2 / tokens)
    table[0] /= math.sqrt(2)
    return table


def _dft(tokens: int) -> torch.Tensor:
    """Real DFT: constant, then cosine and sine of 1, 2, ... periods (and the alternating row if T is even)."""
    t = torch.arange(tokens, dtype=torch.float64)
    rows = [torch.ones(tokens, dtype=torch.float64) / math.sqrt(tokens)]
    for n in range(1, (tokens + 1) // 2):
        phase = 2 * math.pi * n * t / tokens
        rows += [torch.cos(phase) * math.sqrt(2 / tokens), torch.sin(phase) * math.sqrt(2 / tokens)]
    if tokens % 2 == 0:
        rows.append(torch.cos(math.pi * t) / math.sqrt(tokens))
    return torch.stack(rows)


def _legendre(tokens: int) -> torch.Tensor:
    """Discrete Legendre (Gram) polynomials, by degree.

    Recurrences for them lose all digits at high degree. Their Jacobi matrix has the sample points as
    eigenvalues and the polynomials' values as eigenvectors, which a symmetric solver finds to full precision.
    """
    k = torch.arange(1, tokens, dtype=torch.float64)
    off = k / 2 * torch.sqrt((tokens**2 - k**2) / (4 * k**2 - 1))
    _, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return vectors * torch.sign(vectors[0])  # column t is point t; degree 0 is positive


BASES: dict[str, Callable[[int], torch.Tensor]] = {"dct": _dct, "dft": _dft, "legendre": _legendre}


@functools.cache  # a captured graph reads a table at its address: none may go
def table(
    basis: str,
    states: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The first `states` rows of a basis on `tokens` points: [states, tokens], rows orthonormal.

    Made in float64 and rounded once. Shared by all layers, so treat it as read-only.
    """
    if basis not in BASES:
        raise ValueError(f"unknown basis {basis!r}; choose from {', '.join(BASES)}")
    if not 1 <= states <= tokens:
        raise ValueError(f"states must be between 1 and the segment length {tokens}, got {states}")
    with torch.inference_mode(False):  # the table outlives its caller's mode
        return BASES[basis](tokens)[:states].contiguous().to(dtype=dtype, device=device)


def smooth_ge(n: int) -> int:
    """The smallest even number >= n whose only prime factors are 2, 3 and 5: lengths that FFTs like."""
    candidate = max(2, n + n % 2)
    while True:
        rest = candidate
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return candidate
        candidate += 2
