"""The Triton kernel against float64, over what a page can hold, with every output poisoned first.

On a CPU it runs in Triton's interpreter (tests/conftest.py switches it on), on a GPU for real.
"""

import math

import pytest
import torch

from longwave.ops.spectral import reference
from longwave.ops.spectral.basis import table
from longwave.ops.spectral.layout import OWN, Code, Layout

triton = pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
kernel = pytest.importorskip("longwave.ops.spectral.triton")
NEAR = {
    torch.float16: 3e-3,
    torch.bfloat16: 3e-3 if torch.cuda.is_available() else 1e-2,
}  # the interpreter cuts bits off
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

V2 = Code(((2, 64),), 1, axis="token", residual=True, state_bits=8, zero=False)
PLANNED_K = Code(((4, 5), (3, 7), (2, 24), (1, 9)), 1, state_bits=8)
MERGED = Code((), 1, state_bits=8, merged=True)
# name -> K's and V's codes by head, segment, channels
LAYOUTS = {
    "planned": ([PLANNED_K, Code(((8, 33),), 1, state_bits=8)], [V2, Code((), 1, state_bits=8)], 128, 64),
    "every width of V": (
        [Code((), 1, state_bits=8)],
        [Code(((b, 64),), 1, axis="token", residual=True, state_bits=8, zero=False) for b in (1, 2, 3, 4, 8)],
        32,
        64,
    ),
    "mixed and all kept": (
        [Code(((16, 64),), 0), Code(((16, 3), (2, 40)), 4), Code(((4, 64),), 0)],
        [Code(((OWN, 64),), 0), Code(((16, 19),), 4), Code((), 3)],
        64,
        64,
    ),
    "paper's rate": ([Code(((OWN, 32),), 4)], [Code(((OWN, 32),), 4)], 128, 128),
    "kivi": (
        [Code(((2, 64),), 0, fit=False)],
        [Code(((2, 64),), 0, axis="token", group=32, fit=False)],
        32,
        64,
    ),
    "with zeros": (
        [Code(((3, 128),), 0)],
        [Code(((4, 128),), 1, axis="token", residual=True, state_bits=8)],
        128,
        128,
    ),
    "some give up everything": ([PLANNED_K, Code((), 1, state_bits=8)], [V2, Code((), 1, state_bits=8)], 128, 64),
    "all give up everything": ([Code((), 1, state_bits=8)], [Code((), 2, state_bits=8)], 64, 64),
    "merged, and codes": (
        [MERGED, PLANNED_K, Code((), 1, state_bits=8)],
        [MERGED, V2, Code((), 1, state_bits=8)],
        128,
        64,
    ),
    "merged alone": ([MERGED], [MERGED], 64, 64),
    "merged beside values": (
        [MERGED, Code(((OWN, 32),), 1, state_bits=8)],
        [MERGED, Code(((OWN, 32),), 1, state_bits=8)],
        32,
        64,
    ),
    "states alone": ([Code((), 3), Code((), 1)], [Code((), 2)], 32, 64),
    "three bits, segments of 32": ([Code(((3, 64),), 0)], [Code((), 1)], 32, 64),
    "three bits, segments of 64": ([Code(((3, 64),), 0)], [Code((), 1)], 64, 64),
    "three bits, segments of 256": ([Code(((3, 64),), 0)], [Code((), 1)], 256, 64),
    "head of 256": (
        [Code(((2, 200),), 1, state_bits=8)],
        [Code(((3, 256),), 1, axis="token", residual=True, state_bits=8, zero=False)],
        128,
        256,
    ),
}


def made(name, dtype, heads=3, batch=2, pages=(3, 1), seed=0):
    """A layout whose heads take its codes in turn, and pages [batch, max(pages), page bytes], unused ones poisoned."""
    k, v, segment, dim = LAYOUTS[name]
    g = torch.Generator().manual_seed(seed)
    heads = max(heads, len(k), len(v))
    order = torch.stack([torch.randperm(dim, generator=g) for _ in range(2 * heads)])
    ks, vs = ([codes[i % len(codes)] for i in range(heads)] for codes in (k, v))
    layout = Layout(ks, vs, order[:heads], order[heads:], segment, dtype)
    x = torch.randn(2, batch, heads, max(pages) * segment, dim, generator=g).add_(0.5).to(dtype)
    held = reference.encode(layout, x[0], x[1], table("dct", 4, segment, torch.float32))
    reference.write_bias(layout, held, 2 * torch.randn(batch, heads, max(pages), generator=g))
    for row, count in enumerate(pages):
        held[row, count:] = 255
    return layout, held, g


def wanted(layout, pages, counts, q, scaling, k, v, seen):
    """The same in float64, row by row."""
    rows = table("dct", 4, layout.segment, torch.float64)
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // layout.heads
    for b, count in enumerate(counts):
        x = q[b : b + 1].double().reshape(1, layout.heads, -1, layout.dim) * scaling
        held = pages[b : b + 1, :count]
        hidden = torch.arange(k.shape[2]) >= seen[b][:, None]
        s = (x @ k[b : b + 1].double().mT).masked_fill(hidden.repeat(group, 1), -math.inf)
        p = torch.softmax(torch.cat([reference.scores(layout, held, x, rows), s], -1), -1).nan_to_num(0.0)
        middle = count * layout.segment
        mixed = reference.mix(layout, held, p[..., :middle], rows) + p[..., middle:] @ v[b : b + 1].double()
        out[b] = mixed.reshape(q.shape[1:])
    return out


def run(layout, pages, counts, q, scaling, k, v, seen, monkeypatch):
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(math.nan))
        layout.k[0].heads = layout.k[0].heads.to(DEVICE)
        out = kernel.attend(
            kernel.tables_of(layout),
            pages.to(DEVICE),
            torch.tensor(counts, dtype=torch.int32, device=DEVICE),
            table("dct", 4, layout.segment, torch.float32).to(DEVICE),
            *(x.to(DEVICE) if torch.is_tensor(x) else x for x in (q, scaling, k, v, seen)),
        )
    layout.k[0].heads = layout.k[0].heads.cpu()
    return out.cpu()


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_near_float64(name, dtype, monkeypatch):
    layout, pages, g = made(name, dtype)
    assert kernel.fits(layout) is None
    q = torch.randn(2, 3 * layout.heads, 1, layout.dim, generator=g).to(dtype)
    k, v = torch.randn(2, 2, layout.heads, 77, layout.dim, generator=g).to(dtype)
    seen = torch.tensor([[77], [50]], dtype=torch.int32)
    args = (layout, pages, [3, 1], q, layout.dim**-0.5, k, v, seen)
    assert error(run(*args, monkeypatch), wanted(*args)) < NEAR[dtype]


@pytest.mark.parametrize("queries", [5, 16])
def test_query_blocks_see_what_they_may(queries, monkeypatch):
    layout, pages, g = made("planned", torch.float16)
    q = torch.randn(2, layout.heads, queries, layout.dim, generator=g).half()
    k, v = torch.randn(2, 2, layout.heads, 140, layout.dim, generator=g).half()
    seen = torch.stack([torch.arange(queries) + 141 - queries, torch.arange(queries) + 3]).int()
    args = (layout, pages, [3, 1], q, 0.3, k, v, seen)
    assert error(run(*args, monkeypatch), wanted(*args)) < 3e-3


def test_a_row_without_pages_and_a_query_that_sees_nothing(monkeypatch):
    layout, pages, g = made("planned", torch.float16, pages=(2, 0))
    q = torch.randn(2, layout.heads, 1, layout.dim, generator=g).half()
    k, v = torch.randn(2, 2, layout.heads, 1, layout.dim, generator=g).half()
    args = (layout, pages, [2, 0], q, 0.3, k, v, torch.tensor([[1], [0]], dtype=torch.int32))
    got = run(*args, monkeypatch)
    assert error(got, wanted(*args)) < 3e-3
    assert not got[1].any()


def test_small_values_beside_a_token_that_dominates(monkeypatch):
    # products of small probabilities and small scales are float16 on their way
    codes = [Code(((2, 64),), 1, axis="token", residual=True, state_bits=8, zero=False)]
    order = torch.arange(64)[None]
    layout = Layout([Code(((4, 64),), 0)], codes, order, order, 32, torch.float16)
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 1, 96, 64, generator=g)
    q = torch.randn(1, 1, 1, 64, generator=g)
    k[0, 0, 40] = 8 * q[0, 0, 0] / q.norm()
    pages = reference.encode(layout, k.half(), (v * 2**-12).half(), table("dct", 4, 32, torch.float32))
    none = torch.zeros(1, 1, 1, 64).half()
    scaling = 6 / (k[0, 0, 40] @ q[0, 0, 0]).item()
    args = (layout, pages, [3], q.half(), scaling, none, none, torch.zeros(1, 1, dtype=torch.int32))
    assert error(run(*args, monkeypatch), wanted(*args)) < 1e-3


def test_more_pages_than_programs_beside_fewer(monkeypatch):
    layout, pages, g = made("some give up everything", torch.float16, pages=(19, 1))
    q = torch.randn(2, 2 * layout.heads, 1, layout.dim, generator=g).half()
    k, v = torch.randn(2, 2, layout.heads, 3, layout.dim, generator=g).half()
    args = (layout, pages, [19, 1], q, 0.3, k, v, torch.full((2, 1), 3).int())
    assert error(run(*args, monkeypatch), wanted(*args)) < 3e-3


@pytest.mark.parametrize(
    ("costs", "n", "most", "least", "expected"),
    [
        ([100, 100], 1000, 20, 1, [10, 10]),
        ([300, 100], 1000, 20, 1, [15, 5]),
        ([300, 1], 1000, 20, 1, [19, 1]),  # one at least
        ([100, 100], 3, 20, 1, [3, 3]),  # no program without a page
        ([100, 100], 17, 20, 4, [5, 5]),
        ([100, 100], 9, 16, 1, [5, 5]),  # two pages at most, as with eight
        ([100, 100, 100], 1000, 2, 1, [1, 1, 1]),
        ([100, 50], 0, 20, 1, [0, 0]),
    ],
)
def test_heads_share_programs_by_their_cost(costs, n, most, least, expected):
    _, cap, own = kernel._shares(tuple(costs), n, most, least)
    assert list(own) == expected
    assert max(own) <= cap


def test_a_head_that_gives_up_everything_costs_least():
    tables = kernel.tables_of(made("some give up everything", torch.float16)[0])
    for costs in tables.costs:
        assert costs[1] < costs[0] / 10


@pytest.mark.parametrize("which", [0, 1, 2])
def test_numbers_of_another_kind_are_refused(which):
    layout, pages, _ = made("planned", torch.float16)
    q, k, v = (
        torch.zeros(2, layout.heads, 1, 64).to(torch.bfloat16 if i == which else torch.float16) for i in range(3)
    )
    with pytest.raises(ValueError, match=r"pages were made of torch\.float16"):
        kernel.attend(
            kernel.tables_of(layout), pages, torch.zeros(2).int(), torch.zeros(1, 128), q, 1.0, k, v, q[:, 0].int()
        )


def test_strided_inputs(monkeypatch):
    layout, pages, g = made("planned", torch.float16)
    q = torch.randn(2, 1, layout.heads, layout.dim, generator=g).half().transpose(1, 2)
    k, v = torch.randn(2, 2, 90, layout.heads, layout.dim, generator=g).half().transpose(2, 3)
    args = (layout, pages[:, :2], [2, 1], q, 0.3, k[..., 3:, :], v[..., 3:, :], torch.full((2, 1), 87).int())
    assert error(run(*args, monkeypatch), wanted(*args)) < 3e-3


@pytest.mark.parametrize(
    ("k", "v", "segment", "dim", "dtype", "why"),
    [
        (Code(((OWN, 32),), 0), Code(((OWN, 32),), 0), 16, 32, torch.float32, "16 bits"),
        (Code(((OWN, 8), (16, 8)), 1), Code((), 1), 32, 32, torch.float16, "more than one run"),
        (Code(((OWN, 32),), 0), Code(((OWN, 32),), 0), 24, 32, torch.float16, "powers of two"),
        (Code(((2, 32),), 1, residual=True), Code((), 1), 32, 32, torch.float16, "along time"),
        (Code((), 1), Code(((4, 8), (2, 8)), 1, axis="token"), 32, 32, torch.float16, "more than one run"),
        (Code((), 1), Code(((16, 32),), 1, residual=True), 32, 32, torch.float16, "residuals are values"),
        (Code((), 1), Code(((4, 32),), 0, axis="token", group=1), 32, 32, torch.float16, "every channel"),
        (Code((), 1), Code(((2, 32),), 0), 32, 32, torch.float16, "across all channels"),
    ],
)
def test_says_what_it_cannot_read(k, v, segment, dim, dtype, why):
    order = torch.arange(dim)[None]
    assert why in kernel.fits(Layout([k], [v], order, order, segment, dtype))


def test_too_many_query_rows_are_refused():
    layout, pages, _ = made("planned", torch.float16)
    q, k = torch.zeros(2, layout.heads, 65, 64).half(), torch.zeros(2, layout.heads, 1, 64).half()
    with pytest.raises(ValueError, match="takes 64"):
        kernel.attend(
            kernel.tables_of(layout), pages, torch.zeros(2).int(), torch.zeros(1, 128), q, 1.0, k, k, q[:, 0].int()
        )
