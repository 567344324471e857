"""Attention matching: of the tokens of one head some stay, with a bias and a value each, and answer as all of them did.

Source: attention matching, arXiv 2602.16284. Reference queries q_i see n tokens, of which `middle` may go and `chosen`,
a part of these, stay; with scores s_ij = scaling q_i k_j + bias_j,

    p_ij = exp(s_ij) / sum_n exp(s_in)      and the answers  o_i = sum_j p_ij v_j
    bias: B >= 0 that solves  sum_chosen p_ij B_j = sum_middle p_ij;  bias_j += log B_j, within `MOST` of 0
    values: x_ij, the softmax over what stays, solves  sum_stays x_ij v'_j = o_i  for the v' of the chosen

There rows weigh by the block's own mass, and the block is matched alone; here p has all tokens in it, so that a query
weighs as much as it asks of the middle, and the answer itself is fitted. Both are least squares with a ridge that draws
B to one number for all, the one that fits best, and v' to v: without it the fit follows noise where there are not many
more queries than chosen tokens. In their dual form they take a matrix of queries, however many tokens there are. Right
masses do not mean right answers where the keys that stay stand for few of the others, so biases are left as they were
where that answers better: on its reference queries no head is worse off than if it had dropped tokens alone.
"""

import torch

MOST = 3.0  # of what is added to a bias
ROUNDS = 3  # of the bias: those at their bounds stay there while the others are solved again


def shares(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, scaling: float, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax [R, n] of q [R, D] over k [n, D] with scores raised by bias [n]; seen bool [n], None for all."""
    scores = scaling * q @ k.mT + bias
    return (scores if seen is None else scores.masked_fill(~seen, float("-inf"))).softmax(-1)


def match(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    middle: torch.Tensor,
    chosen: torch.Tensor,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [n, D] and bias [n] of all tokens once those of the middle that are not chosen have gone.

    q [R, D]: reference queries, all of which see all tokens; k, v [n, D], bias [n], all of one type, float32 or
    float64. middle, chosen: bool [n]. ridge > 0: of the mean square of a query's shares. Those that are not chosen keep
    their value and bias.
    """
    p = shares(q, k, bias, scaling)
    answers = p @ v
    found = []
    for raised in (bias, bias + multiples(p * chosen, (p * middle).sum(-1), chosen, ridge).log()):
        x = shares(q, k, raised, scaling, chosen | ~middle)
        values = v + solve(x * chosen, answers - x @ v, ridge)
        found.append((float((x @ values - answers).square().sum()), values, raised))
    _, values, raised = min(found, key=lambda one: one[0])
    return values, raised


def multiples(p: torch.Tensor, total: torch.Tensor, chosen: torch.Tensor, ridge: float) -> torch.Tensor:
    """B [n] with p B near total [R], each within e^-MOST and e^MOST; p [R, n] is 0 but where chosen [n], B then 1."""
    least, most = torch.tensor([-MOST, MOST], dtype=p.dtype, device=p.device).exp()
    own = p.sum(-1)
    even = ((own @ total) / (own @ own).clamp(min=torch.finfo(p.dtype).tiny)).clamp(least, most)
    found = torch.where(chosen, even, torch.ones_like(p[0]))
    free = chosen
    for _ in range(ROUNDS):
        step = solve(p * free, (total - p @ found)[:, None], ridge)[:, 0]
        found = (found + step).clamp(least, most).where(free, found)
        free = free & (found > least) & (found < most)
    return found


def solve(a: torch.Tensor, b: torch.Tensor, ridge: float) -> torch.Tensor:
    """x [n, D] of least |a x - b|^2 + r |x|^2 for a [R, n] and b [R, D], r = ridge times the mean square of a row."""
    gram = a @ a.mT
    ridge = max(ridge, 4 * len(a) * torch.finfo(a.dtype).eps)  # less is lost in rounding, and what is left not definite
    r = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(a.dtype).tiny ** 0.5)  # where nothing is to be solved
    gram.diagonal().add_(r)
    return a.mT @ torch.cholesky_solve(b, torch.linalg.cholesky(gram))
