"""How far a rotary base reaches, and the base that reaches a wanted length, by the scaling law of extrapolation.

Source: ScalingRoPE, arXiv 2310.05209; the factor without training: LongLLaDA, arXiv 2506.14429. Channel pair i of d / 2
turns once in 2 pi b^(2i / d) tokens. Pairs up to the *critical dimension* turned once or more within the trained
length: the model has seen all of their angles. A larger base stays readable until the last of these has turned once.

A bidirectional model sees distances of both signs in training, 2 T of them: UltraLLaDA (arXiv 2510.10481) puts twice
both lengths into the same law (`both_signs`). LongLLaDA's published factors, of diffusion models too, are without it.
"""

from __future__ import annotations

import math

from longwave.checks import whole


def critical_dimension(base: float, head_dim: int, trained: int) -> int:
    """Channels, of `head_dim` that are turned, whose period lies within the trained length: even, head_dim at most.

    2 ceil(d / 2 log_b(T / 2 pi)). base: of the trained frequencies. trained: tokens, 7 at least.
    """
    whole("head_dim", head_dim, 2, "channels that are turned")
    whole("trained", trained, 7, "tokens (one turn of the fastest channel)")
    if not base > 1:
        raise ValueError(f"base is of the frequencies base^(-2i / d), above 1; got {base!r}")
    return min(head_dim, 2 * math.ceil(head_dim / 2 * math.log(trained / (2 * math.pi), base)))


def ntk_factor(base: float, head_dim: int, trained: int, target: int, both_signs: bool = False) -> int:
    """What to multiply a rotary base by to read `target` tokens without training: a whole number, rounded up.

    (T / 2 pi)^(d / d_extra) / b, d_extra the `critical_dimension`: with it the critical period is `target` tokens.
    both_signs: d_extra and the period are of twice the tokens. Raises ValueError for a target not beyond `trained`.
    """
    sides = 1 + both_signs
    extra = critical_dimension(base, head_dim, sides * trained)
    whole("target", target, trained + 1, f"tokens (the {trained:,} trained are readable as they are)")
    return max(1, math.ceil((sides * target / (2 * math.pi)) ** (head_dim / extra) / base))


def ntk_reach(base: float, head_dim: int, trained: int, factor: float, both_signs: bool = False) -> float:
    """Tokens that a model reads whose base is multiplied by `factor`: 2 pi (factor b)^(d_extra / d); `both_signs`: half
    of that, d_extra being of twice the trained length."""
    sides = 1 + both_signs
    return 2 * math.pi * (factor * base) ** (critical_dimension(base, head_dim, sides * trained) / head_dim) / sides
