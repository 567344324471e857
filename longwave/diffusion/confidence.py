"""How sure a sampler is of the tokens that it drew, and which of them stay: the others are masks again.

p [n, vocabulary] float64: probabilities at n masked positions; tokens int64 [n]: drawn there. Higher is surer.
"""

from __future__ import annotations

import torch


def probability(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """That of the drawn token ("low_confidence" of LLaDA, "maskgit_plus" of Dream): float64 [n]."""
    return p.gather(-1, tokens[:, None])[:, 0]


def margin(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The likeliest token's lead over the second: float64 [n]."""
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    return first - second


def order(p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Negative entropy in nats: float64 [n]."""
    return (p * torch.log(p + 1e-10)).sum(-1)


def surest(confidence: torch.Tensor, count: int) -> torch.Tensor:
    """Which `count` of confidence [n] are highest, the earlier one of equals: bool [n]."""
    kept = torch.zeros(confidence.shape, dtype=torch.bool, device=confidence.device)
    kept[confidence.argsort(descending=True, stable=True)[:count]] = True
    return kept


def above(confidence: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which of confidence [n] are at least threshold, and always the surest (Fast-dLLM, arXiv 2505.22618): bool [n]."""
    return (confidence >= threshold) | surest(confidence, 1)
