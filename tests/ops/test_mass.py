"""Attention mass in torch and in Triton against an explicit float64 softmax.

On a CPU Triton runs in its interpreter (tests/conftest.py switches it on), on a GPU for real.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longwave.ops.attention import reference as attention
from longwave.ops.mass import add_step, log_sum_exp, mass, peak

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = {torch.float64: dict(rtol=1e-12, atol=1e-13)}  # of others: float32's, whatever the inputs
SINGLE = dict(rtol=2e-5, atol=2e-6)
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
# B, H, G, Q, L, D and what is visible
CASES = [
    (1, 2, 1, 7, 13, 8, "all"),
    (2, 1, 3, 5, 33, 20, "all"),
    (1, 1, 1, 1, 1, 1, "all"),
    (1, 2, 3, 37, 37, 16, "causal"),
    (1, 1, 3, 150, 201, 24, "causal"),  # more than a block of rows and of columns, whatever the dtype
    (2, 2, 1, 17, 45, 80, "chunk"),
    (2, 1, 3, 67, 141, 8, "padded"),
    (2, 2, 3, 19, 35, 8, "any"),
    (2, 1, 2, 3, 5, 8, "nothing"),
    (1, 1, 1, 3, 5, 256, "causal"),
    (2, 1, 3, 5, 1100, 16, "any"),  # few queries, many tokens: these are split
]


def named(case):
    *shape, pattern = case
    return " ".join(f"{name}{n}" for name, n in zip("BHGQLD", shape, strict=True)) + f" {pattern}"


def counts(b, queries, tokens, pattern, g):
    """visible [B, Q] of a pattern."""
    if pattern == "all":
        return None
    own = torch.arange(1, queries + 1)
    if pattern == "nothing":
        seen = torch.zeros(b, queries, dtype=torch.long)
    elif pattern == "any":  # in no order; some see nothing, some are said to see more than there is
        seen = torch.randint(0, tokens + 3, (b, queries), generator=g)
        seen[:, queries // 2] = 0
    elif pattern == "padded":  # on the left, as many as the row's number, and on the right of the last row
        seen = torch.stack([(tokens - queries + own) * (own > 5 * row) for row in range(b)])
        seen[-1, -3:] = 0
    else:  # a chunk over stores that row by row hold fewer tokens
        seen = torch.stack([tokens - queries - 7 * row + own for row in range(b)])
    return seen.to(torch.int32 if pattern == "chunk" else torch.int64).to(DEVICE)


def made(case, dtype, seed=0):
    """q as a model hands it over, k as it lies in storage with room, visible."""
    b, heads, group, queries, tokens, dim, pattern = case
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(b, queries, heads * group, dim, generator=g).to(DEVICE, dtype).transpose(1, 2)
    k = torch.full((b, heads, tokens + 9, dim), float("nan"), device=DEVICE, dtype=dtype)[:, :, :tokens]
    k[:] = torch.randn(b, heads, tokens, dim, generator=g)
    return q, k, counts(b, queries, tokens, pattern, g)


def explicit(q, k, scaling, visible, lse=None):
    """Log-sum-exp [B, Hq, Q] and mass [B, H, L] in float64, with all scores at once."""
    group = q.shape[1] // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(group, 1).mT * scaling
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if visible is not None:
        allowed &= (torch.arange(k.shape[2], device=k.device) < visible[..., None])[:, None]
    scores = scores.masked_fill(~allowed, -float("inf"))
    own = torch.logsumexp(scores, -1)
    p = torch.where(allowed, torch.exp(scores - (own if lse is None else lse.double())[..., None]), 0)
    return own, p.sum(2).unflatten(1, (-1, group)).sum(2)


def check(found, want, dtype):
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, want.to(found.dtype), **NEAR.get(dtype, SINGLE))


@pytest.fixture(params=["reference", "triton"])
def kernels(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    monkeypatch.setenv("LONGWAVE_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_both_are_the_softmax(kernels, case, dtype):
    q, k, visible = made(case, dtype)
    lse, sums = explicit(q, k, 0.3, visible)
    check(log_sum_exp(q, k, 0.3, visible), lse, dtype)
    check(mass(q, k, 0.3, visible), sums, dtype)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_float64_is_exact(case):
    q, k, visible = made(case, torch.float64)
    lse, sums = explicit(q, k, 0.3, visible)
    check(log_sum_exp(q, k, 0.3, visible), lse, q.dtype)
    check(mass(q, k, 0.3, visible), sums, q.dtype)


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 3, 6, 7)], ids=named)
def test_the_sum_is_the_number_of_queries_that_see(kernels, case):
    q, k, visible = made(case, torch.float32)
    pairs = q.shape[1] * (q.shape[0] * q.shape[2] if visible is None else int((visible > 0).sum()))
    torch.testing.assert_close(mass(q, k, 0.3, visible).sum().item(), float(pairs), rtol=1e-5, atol=0)


def test_blocks_of_queries(monkeypatch):
    q, k, visible = made((2, 2, 3, 19, 35, 8, "any"), torch.float64)
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 2 * 6 * 35 * 4)  # four queries at a time
    monkeypatch.setenv("LONGWAVE_KERNELS", "reference")
    lse, sums = explicit(q, k, 0.3, visible)
    check(log_sum_exp(q, k, 0.3, visible), lse, q.dtype)
    check(mass(q, k, 0.3, visible), sums, q.dtype)
    check(mass(q, k, 0.3, visible, lse), sums, q.dtype)


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("case", [case for case in CASES if case[3] < 100], ids=named)
def test_the_most_that_one_query_gives(case, weighted, monkeypatch):
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 4 * 35)  # few queries at a time
    q, k, visible = made(case, torch.float64)
    weight = torch.rand(q.shape[0], q.shape[2], dtype=torch.float64).to(DEVICE) if weighted else None
    # each query alone: what it gives in the sum over a group's heads is what its heads give
    each = [explicit(q[:, head :: q.shape[1]][:, :, [i]], k[:, [head // (q.shape[1] // k.shape[1])]], 0.3,
                     None if visible is None else visible[:, [i]])[1][:, 0]
            for head in range(q.shape[1]) for i in range(q.shape[2])]  # fmt: skip
    most = torch.stack(each, 1).unflatten(1, (k.shape[1], -1, q.shape[2]))
    if weight is not None:
        most = most * weight[:, None, None, :, None]
    check(peak(q, k, 0.3, visible, weight), most.amax((2, 3)), q.dtype)


def test_weights_of_another_shape():
    q, k, visible = made(CASES[1], torch.float32)
    with pytest.raises(ValueError, match=r"weight is \[B, Q\] = \[2, 5\], got \[2, 4\]"):
        peak(q, k, 0.3, visible, torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [case for case in CASES if case[-1] == "all"], ids=named)
def test_the_greatest_share_of_each_token(case, dtype, monkeypatch):
    q, k, _ = made(case, dtype)
    lse = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    shares = torch.exp(q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * 0.3 - lse[..., None])
    want = shares.amax(2).unflatten(1, (k.shape[1], -1)).amax(2)
    lse = lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
    check(peak(q, k, 0.3, None, lse=lse), want, dtype)
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 1)  # a query at a time
    with Sizes() as sizes:
        check(peak(q, k, 0.3, None, lse=lse), want, dtype)
    assert sizes.most <= max(q.numel(), k.numel(), q.shape[0] * q.shape[1] * k.shape[2])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_a_softmax_over_two_stores(kernels, dtype):
    q, k, visible = made((2, 2, 3, 19, 35, 8, "chunk"), dtype)
    here, there = k[:, :, :9], k[:, :, 9:]
    lse = torch.logaddexp(log_sum_exp(q, here, 0.3, None), log_sum_exp(q, there, 0.3, visible - 9))
    found = torch.cat([mass(q, here, 0.3, None, lse), mass(q, there, 0.3, visible - 9, lse)], 2)
    check(found, explicit(q, k, 0.3, visible)[1], dtype)


def test_a_given_lse_is_used_as_it_is(kernels):
    q, k, visible = made(CASES[6], torch.float32)
    lse = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check(mass(q, k, 0.3, visible, lse), explicit(q, k, 0.3, visible, lse)[1], q.dtype)
    lse.fill_(-float("inf"))  # the whole softmax is empty
    assert not mass(q, k, 0.3, visible, lse).any()


def test_large_scores(kernels):
    q, k, visible = made(CASES[3], torch.float32)
    lse, sums = explicit(q, k, 300.0, visible)
    torch.testing.assert_close(log_sum_exp(q, k, 300.0, visible).double(), lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(mass(q, k, 300.0, visible).double(), sums, rtol=0, atol=2e-2)  # scores of 1e3 in float32


def test_what_nobody_sees_may_be_anything(kernels):
    q, k, visible = made((2, 1, 3, 67, 141, 8, "padded"), torch.float32)
    k, hidden = k.clone(), visible == 0
    visible = (visible - 20).clamp(min=0)
    want = explicit(q, k, 0.3, visible)
    q = q.masked_fill(hidden[:, None, :, None], float("nan"))
    k[:, :, -20:] = float("nan")
    lse = log_sum_exp(q, k, 0.3, visible)
    assert (lse[hidden[:, None].expand_as(lse)] == -float("inf")).all()
    check(lse, want[0], q.dtype)
    check(mass(q, k, 0.3, visible), want[1], q.dtype)


class Sizes(TorchDispatchMode):
    """The most elements that a tensor made meanwhile has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return out


def test_no_matrix_of_queries_and_tokens(kernels, monkeypatch):
    q, k, visible = made((1, 1, 3, 300, 300, 4, "causal"), torch.bfloat16)
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 4000)
    with Sizes() as sizes:
        lse = log_sum_exp(q, k, 0.3, visible)
        mass(q, k, 0.3, visible)
        mass(q, k, 0.3, visible, lse)
    assert 0 < sizes.most <= (4000 if kernels == "reference" else 2 * q.numel())  # the interpreter copies q's bytes


def test_no_gradient_holds_the_blocks(kernels):
    q, k, visible = made(CASES[3], torch.float32)
    q.requires_grad_()
    assert not mass(q, k, 0.3, visible).requires_grad
    assert not log_sum_exp(q, k, 0.3, visible).requires_grad


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("group", [1, 3], ids=["G1", "G3"])
def test_steps_add_up(dtype, group, monkeypatch):
    monkeypatch.setenv("LONGWAVE_KERNELS", "reference")
    q, k, _ = made((3, 2, group, 2, 21, 20, "all"), dtype)
    steps = torch.tensor([[0, 0], [13, 14], [20, 21]], device=DEVICE)  # the first row is padding
    total, want = torch.ones(3, 2, 21, device=DEVICE), torch.ones(3, 2, 21, device=DEVICE, dtype=torch.float64)
    for i in range(2):
        seen = steps[:, i : i + 1].to(torch.int32 if i else torch.int64)
        want += mass(q[:, :, i : i + 1], k, 0.3, seen)
        held = k.clone()
        for b, count in enumerate(seen[:, 0].tolist()):
            held[b, :, count:] = float("nan")
        assert add_step(total, q[:, :, i : i + 1], held, 0.3, seen) is None
    check(total, want, torch.float32)
    lse = torch.randn(3, 2 * group, 1, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    add_step(total, q[:, :, 1:], held, 0.3, seen, lse)
    check(total, want + mass(q[:, :, 1:], k, 0.3, seen, lse), torch.float32)


def test_a_step_reads_nothing_back():
    total, q, k = (torch.zeros(size, device="meta") for size in ((2, 2, 9), (2, 6, 1, 8), (2, 2, 9, 8)))
    add_step(total, q, k, 0.3, torch.ones(2, 1, dtype=torch.int64, device="meta"))  # meta tensors hold no numbers


@pytest.mark.parametrize(
    ("q", "k", "visible", "lse", "what"),
    [
        ((1, 3, 4, 8), (1, 2, 5, 8), None, None, "H divides Hq"),
        ((1, 4, 4, 8), (1, 2, 5, 9), None, None, "share B, D and dtype"),
        ((2, 4, 4, 8), (1, 2, 5, 8), None, None, "share B, D and dtype"),
        ((1, 4, 4, 8), (1, 2, 5, 8), (1, 5), None, r"visible is \[B, Q\] = \[1, 4\]"),
        ((1, 4, 4, 8), (1, 2, 5, 8), None, (1, 2, 4), r"lse is \[B, Hq, Q\] = \[1, 4, 4\]"),
    ],
    ids=["heads", "head_dim", "rows", "visible", "lse"],
)
def test_shapes_that_do_not_go_together(q, k, visible, lse, what):
    visible = None if visible is None else torch.ones(visible, dtype=torch.long)
    with pytest.raises(ValueError, match=what):
        mass(torch.zeros(q), torch.zeros(k), 1.0, visible, None if lse is None else torch.zeros(lse))


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 8), (torch.float16, 257)], ids=["float64", "D257"])
def test_triton_says_why_it_cannot(dtype, dim, monkeypatch):
    pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    monkeypatch.setenv("LONGWAVE_KERNELS", "triton")
    q = torch.zeros(1, 2, 3, dim, dtype=dtype, device=DEVICE)
    with pytest.raises(RuntimeError, match="float64" if dim == 8 else "at most 256, not 257"):
        mass(q, q, 1.0, None)
