"""The compiled kernel against the reference, in float64, over every way a page can hold numbers."""

import threading

import pytest
import torch

from longwave.ops.spectral import cpu, reference
from longwave.ops.spectral.basis import table
from longwave.ops.spectral.layout import OWN, Code, Layout

EVERY = ((8, 3), (4, 5), (3, 7), (2, 9), (1, 1), (16, 2), (OWN, 3))
BY_EIGHT = ((8, 8), (4, 8), (3, 16), (2, 24), (1, 8), (16, 2), (OWN, 1))

# name -> K's and V's codes by head, segment, channels, type
LAYOUTS = {
    "time, every width": ([Code(EVERY, 4, state_bits=8)], 64, 41, torch.float32),
    "token, every width": ([Code(BY_EIGHT, 4, axis="token", state_bits=16)], 24, 70, torch.float32),
    "token, no zero": ([Code(BY_EIGHT, 1, axis="token", zero=False, state_bits=8)], 24, 70, torch.float32),
    "token, groups": ([Code(((3, 16), (2, 32)), 1, axis="token", group=8)], 40, 49, torch.float32),
    "token, groups, no zero": ([Code(((2, 48),), 0, axis="token", group=16, zero=False)], 40, 48, torch.float32),
    "residual": ([Code(((2, 32),), 1, axis="token", residual=True, state_bits=8, zero=False)], 40, 32, torch.float32),
    "residual, 3 bits, dct": ([Code(((3, 24),), 4, axis="token", residual=True)], 16, 24, torch.float32),
    "residual along time": ([Code(((4, 12),), 1, residual=True, state_bits=8)], 16, 12, torch.float32),
    "states alone": ([Code((), 4, state_bits=8), Code((), 1), Code((), 4, state_bits=16)], 13, 9, torch.float32),
    "merged": (
        [Code((), 1, state_bits=8, merged=True), Code(((4, 9),), 0), Code((), 1, merged=True)],
        16,
        9,
        torch.float32,
    ),
    "values alone, odd": ([Code(((OWN, 9),), 0), Code(((16, 9),), 0)], 13, 9, torch.float32),
    "bfloat16": ([Code(((4, 8), (OWN, 3)), 1), Code((), 4)], 16, 13, torch.bfloat16),
    "float16": ([Code(((2, 8), (16, 3)), 4), Code(((OWN, 13),), 0)], 16, 13, torch.float16),
    "heads differ": (
        [
            Code(((4, 8), (2, 8)), 1, state_bits=8),
            Code(((2, 32),), 4, axis="token", residual=True, state_bits=8, zero=False),
            Code((), 1, state_bits=8),
            Code(((OWN, 32),), 0),
        ],
        40,
        32,
        torch.float32,
    ),
}


def made(name, heads=3, batch=2, pages=(6, 3), seed=0):
    """A layout whose heads take its codes in turn, and filled pages [batch, max(pages), page bytes]."""
    codes, segment, dim, dtype = LAYOUTS[name]
    g = torch.Generator().manual_seed(seed)
    heads = max(heads, len(codes))
    order = torch.stack([torch.randperm(dim, generator=g) for _ in range(2 * heads)])
    k, v = ([codes[(i + shift) % len(codes)] for i in range(heads)] for shift in (0, 1))
    layout = Layout(k, v, order[:heads], order[heads:], segment, dtype)
    x = torch.randn(2, batch, heads, max(pages) * segment, dim, generator=g).add_(0.5).to(dtype)
    held = reference.encode(layout, x[0], x[1], rows(layout))
    reference.write_bias(layout, held, torch.randn(batch, heads, max(pages), generator=g))
    for row, count in enumerate(pages):
        held[row, count:] = 0
    return layout, held, g


@pytest.fixture(autouse=True)
def one_thread():
    """numba's first loop in a process sets OpenMP's threads, which torch shares: nobody must see it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 1


def rows(layout, dtype=torch.float32):
    return table("dct", 4, layout.segment, dtype)


def assert_near(got, want):
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("r", [1, 3, 16, 256])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_reference(name, r):
    layout, pages, g = made(name)
    tables = cpu.tables_of(layout)
    q = torch.randn(2, layout.heads, r, layout.dim, generator=g)
    p = torch.rand(2, layout.heads, r, 6 * layout.segment, generator=g)
    p[1, ..., 3 * layout.segment :] = 0
    assert cpu.usable(layout, q)
    exact = rows(layout, torch.float64)
    assert_near(cpu.scores(tables, pages, q, rows(layout)), reference.scores(layout, pages, q.double(), exact))
    assert_near(cpu.mix(tables, pages, p, rows(layout)), reference.mix(layout, pages, p.double(), exact))


def test_every_float16():
    tokens = 1 << 16
    order = torch.zeros(1, 1, dtype=torch.int64)
    layout = Layout([Code(((16, 1),), 0)], [], order, order[:0], tokens, torch.float32)
    pages = torch.zeros(1, 1, layout.page_bytes, dtype=torch.uint8)
    numbers = torch.arange(tokens, dtype=torch.int32).to(torch.int16).view(torch.float16)
    layout.k[0].values[0].view(pages).copy_(numbers[:, None])
    got = cpu.scores(cpu.tables_of(layout), pages, torch.ones(1, 1, 1, 1), torch.zeros(1, tokens))
    assert torch.equal(got.flatten().nan_to_num(7.25), numbers.float().nan_to_num(7.25))
    assert torch.equal(got.flatten().isnan(), numbers.isnan())


@pytest.mark.parametrize("name", ["heads differ", "residual"])
def test_neither_batch_nor_threads_change_a_row(name):
    layout, pages, g = made(name, pages=(9, 5))
    tables = cpu.tables_of(layout)
    q = torch.randn(2, layout.heads, 3, layout.dim, generator=g)
    p = torch.rand(2, layout.heads, 3, 9 * layout.segment, generator=g)
    middle = 5 * layout.segment
    p[1, ..., middle:] = 0

    def answers(x, y, z):
        return cpu.scores(tables, x, y, rows(layout)), cpu.mix(tables, x, z, rows(layout))

    both = answers(pages, q, p)
    torch.set_num_threads(2)
    again = answers(pages, q, p)
    torch.set_num_threads(1)
    alone = answers(pages[1:, :5], q[1:], p[1:, ..., :middle])
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    assert torch.equal(both[0][1:, ..., :middle], alone[0])
    assert torch.equal(both[1][1:], alone[1])


def test_no_pages():
    layout, pages, _ = made("residual")
    tables, empty = cpu.tables_of(layout), pages[:, :0]
    q = torch.ones(2, layout.heads, 3, layout.dim)
    assert cpu.scores(tables, empty, q, rows(layout)).shape == (2, layout.heads, 3, 0)
    assert torch.equal(cpu.mix(tables, empty, q[..., :0], rows(layout)), torch.zeros_like(q))


def test_two_callers_at_once():
    layout, pages, g = made("heads differ")
    tables = cpu.tables_of(layout)
    queries = [torch.randn(2, layout.heads, 3, layout.dim, generator=g) for _ in range(2)]
    alone = [cpu.scores(tables, pages, q, rows(layout)) for q in queries]
    wrong = []

    def work(q, want):
        wrong.extend(i for i in range(50) if not torch.equal(cpu.scores(tables, pages, q, rows(layout)), want))

    callers = [threading.Thread(target=work, args=pair) for pair in zip(queries, alone, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_usable_says_what_is_answered(monkeypatch):
    layout, _, _ = made("residual")
    q = torch.zeros(2, layout.heads, cpu.ROWS, layout.dim)
    assert cpu.usable(layout, q)
    assert not cpu.usable(layout, q.double())
    assert not cpu.usable(layout, torch.cat([q, q], dim=2))
    assert not cpu.usable(layout, q.to("meta"))
    asks = q.clone().requires_grad_()
    assert not cpu.usable(layout, asks)
    with torch.no_grad():
        assert cpu.usable(layout, asks)
    order = torch.arange(8)[None]
    wide = Layout([Code(((OWN, 8),), 0)], [Code(((OWN, 8),), 0)], order, order, 8, torch.float64)
    assert not cpu.usable(wide, q)
    monkeypatch.setattr(cpu, "numba", None)
    assert not cpu.usable(layout, q)


def test_what_does_not_fit_never_reaches_the_kernel():
    layout, pages, _ = made("heads differ")
    tables, right = cpu.tables_of(layout), torch.zeros(2, layout.heads, 3, layout.dim)
    assert cpu.scores(tables, pages, right, rows(layout)).abs().sum() == 0
    for wrong in (
        (pages[..., :-16], right, rows(layout)),
        (pages, right[:1], rows(layout)),
        (pages, right[:, :1], rows(layout)),
        (pages, right[..., 1:], rows(layout)),
        (pages, right, rows(layout)[:, 1:]),
        (pages, right, rows(layout)[:1]),
    ):
        with pytest.raises(ValueError, match="the tables'"):
            cpu.scores(tables, *wrong)
    with pytest.raises(ValueError, match="the tables'"):
        cpu.mix(tables, pages, torch.zeros(2, layout.heads, 3, 5 * layout.segment), rows(layout))
    with pytest.raises(TypeError, match="float64"):
        cpu.scores(tables, pages, right.double(), rows(layout))
