"""Pages made dense again, by each twin, against `decode` in float64: into parts of larger tensors, poisoned first.

On a CPU Triton runs in its interpreter (tests/conftest.py switches it on), on a GPU for real.
"""

import importlib
import math

import pytest
import torch

from longwave.ops.spectral import cpu, reference
from longwave.ops.spectral.basis import table
from longwave.ops.spectral.layout import OWN, Code, Layout
from longwave.store.pages import PageStore
from tests.ops.spectral import test_cpu

try:
    kernel = importlib.import_module("longwave.ops.spectral.triton_expand")
except ImportError:
    kernel = None
needs_triton = pytest.mark.skipif(kernel is None, reason="Triton is for NVIDIA GPUs and Linux; here is none")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, BRAIN = torch.float16, torch.bfloat16
# of the largest value: half a step of the type, a whole one where the interpreter cuts bits off
NEAR = {torch.float32: 2e-6, HALF: 6e-4, BRAIN: 4.5e-3 if torch.cuda.is_available() else 9e-3}


def turned(bits, n=32, **how):
    return Code(((bits, n),), **dict(states=1, axis="token", residual=True, state_bits=8, zero=False) | how)


KIVI = dict(axis="token", group=8, fit=False)
# for Triton: K's and V's codes by head, segment, channels
LAYOUTS = {
    "planned": (
        [Code(((8, 1), (4, 4), (3, 6), (2, 9), (1, 5)), 1, state_bits=8), Code((), 1, state_bits=8)],
        [turned(2), Code((), 1, state_bits=8), turned(3)],
        32,
        32,
    ),
    "every width": ([Code(((b, 32),), 0) for b in (1, 2, 3, 4, 8)], [turned(b) for b in (1, 2, 3, 4, 8)], 32, 32),
    "kivi": ([Code(((2, 32),), 0, fit=False)], [Code(((b, 32),), 0, **KIVI) for b in (1, 2, 3, 4, 8)], 32, 32),
    "groups, zeros, rotated and not": (
        [Code(((4, 32),), 0)],
        [turned(4, zero=True, group=8), turned(3, group=8, states=0), Code(((2, 32),), 0, **KIVI)],
        32,
        32,
    ),
    "mixed and all kept": (
        [Code(((16, 32),), 0), Code(((16, 3), (2, 20)), 4), Code(((4, 32),), 0)],
        [Code(((OWN, 32),), 0), Code(((16, 19),), 4), Code((), 3)],
        32,
        32,
    ),
    "paper's rate": ([Code(((OWN, 8),), 4)], [Code(((OWN, 9),), 4, state_bits=8)], 64, 32),
    "head of 128": ([Code(((3, 100),), 2)], [turned(4, 128, zero=True)], 32, 128),
}


def made(name, dtype, batch, pages, seed=0):
    """A layout whose heads take its codes in turn, and filled pages."""
    ks, vs, segment, dim = LAYOUTS[name]
    g = torch.Generator().manual_seed(seed)
    heads = max(len(ks), len(vs))
    order = torch.stack([torch.randperm(dim, generator=g) for _ in range(2 * heads)])
    sides = ([codes[i % len(codes)] for i in range(heads)] for codes in (ks, vs))
    layout = Layout(*sides, order[:heads], order[heads:], segment, dtype)
    x = torch.randn(2, batch, heads, pages * segment, dim, generator=g).add_(0.5).to(dtype)
    return layout, reference.encode(layout, x[0], x[1], rows(layout))


def rows(layout, dtype=torch.float32, device="cpu"):
    return table("dct", 4, layout.segment, dtype, device)


def poisoned(layout, pages, dtype, device="cpu"):
    """A tensor of NaN, and the parts of it that K and V go to: tokens before heads, some of each."""
    batch, tokens, dim = len(pages), pages.shape[1] * layout.segment, layout.dim
    whole = torch.full((batch, tokens + 5, layout.heads + 1, 2 * dim + 3), math.nan, dtype=dtype, device=device)
    parts = whole.transpose(1, 2)[:, 1:, 2:-3]
    return whole, parts[..., 1 : dim + 1], parts[..., dim + 2 : -1]


def check(layout, pages, dtype, expand, device="cpu"):
    whole, *outs = poisoned(layout, pages, dtype, device)
    expand(*outs)
    for out, want in zip(outs, reference.decode(layout, pages, rows(layout, torch.float64)), strict=True):
        assert (out.cpu().double() - want).abs().max() <= NEAR[dtype] * want.abs().max()
    assert whole.isnan().sum() == whole.numel() - 2 * outs[0].numel()  # and no other number was written


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", test_cpu.LAYOUTS)
def test_numba_is_near_float64(name, batch):
    layout, pages, _ = test_cpu.made(name, batch=batch, pages=(5, 5)[:batch])
    tables = cpu.tables_of(layout)
    assert cpu.can_expand(layout, torch.zeros(0))
    check(layout, pages, torch.float32, lambda *outs: cpu.expand(tables, pages, rows(layout), *outs))


@pytest.mark.parametrize("dim", [64, 128, 8])
def test_rotations_of_other_sizes(dim):
    order = torch.arange(dim).flip(0)[None]
    layout = Layout([turned(4, dim)], [turned(2, dim)], order, order, 32, torch.float32)
    x = torch.randn(2, 1, 1, 96, dim, generator=torch.Generator().manual_seed(0))
    pages, tables = reference.encode(layout, *x, rows(layout)), cpu.tables_of(layout)
    check(layout, pages, torch.float32, lambda *outs: cpu.expand(tables, pages, rows(layout), *outs))


def test_what_nothing_stores_is_zero():
    order = torch.arange(32)[None].expand(2, -1)
    codes = [Code((), 0, residual=True, axis="token"), turned(2)]
    layout = Layout(codes, codes, order, order, 32, torch.float32)
    x = torch.randn(2, 1, 2, 96, 32, generator=torch.Generator().manual_seed(0))
    pages, tables = reference.encode(layout, *x, rows(layout)), cpu.tables_of(layout)
    check(layout, pages, torch.float32, lambda *outs: cpu.expand(tables, pages, rows(layout), *outs))


@needs_triton
@pytest.mark.parametrize(("dtype", "batch", "pages"), [(HALF, 1, 3), (BRAIN, 2, 1)], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_triton_is_near_float64(name, dtype, batch, pages):
    layout, pages = made(name, dtype, batch, pages)
    assert kernel.fits(layout) is None
    check(layout, pages, dtype, lambda *outs: launched(layout, pages, *outs), DEVICE)


def launched(layout, pages, *outs):
    tables = kernel.tables_of(layout.on(torch.device(DEVICE)))
    kernel.expand(tables, pages.to(DEVICE), rows(layout, device=DEVICE), *outs)


@needs_triton
def test_triton_fills_float32_too():
    layout, pages = made("planned", HALF, 1, 1)
    check(layout, pages, torch.float32, lambda *outs: launched(layout, pages, *outs), DEVICE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, HALF, BRAIN])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_reference_decodes_some_pages_at_a_time(dtype, batch, monkeypatch):
    layout, pages, _ = test_cpu.made("heads differ", batch=batch, pages=(5, 5)[:batch])
    seen, decode = [], reference.decode
    monkeypatch.setattr(reference, "BLOCK", 2 * batch * layout.segment)
    monkeypatch.setattr(reference, "decode", lambda *args: seen.append(args[1].shape[1]) or decode(*args))
    whole, *outs = poisoned(layout, pages, dtype)
    exact = rows(layout, torch.float64 if dtype == torch.float64 else torch.float32)
    reference.expand(layout, pages, exact, *outs)
    assert seen == [2, 2, 1]
    for out, want in zip(outs, decode(layout, pages, exact), strict=True):
        torch.testing.assert_close(out, want.to(dtype), rtol=0, atol=1e-5)  # products of other sizes round otherwise
    assert whole.isnan().sum() == whole.numel() - 2 * outs[0].numel()


def test_neither_rows_nor_threads_change_a_page():
    layout, pages, _ = test_cpu.made("heads differ", pages=(9, 9))
    tables, threads = cpu.tables_of(layout), torch.get_num_threads()

    def filled(part):
        outs = torch.empty(2, len(part), layout.heads, part.shape[1] * layout.segment, layout.dim)
        cpu.expand(tables, part, rows(layout), *outs)
        return outs

    try:
        torch.set_num_threads(1)
        both = filled(pages)
        torch.set_num_threads(2)
        assert torch.equal(both, filled(pages))
        alone = filled(pages[1:, 2:7])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(both[:, 1:, :, 2 * layout.segment : 7 * layout.segment], alone)


def twins():
    """(name, layout, pages, what expands them) of all that can be called here."""
    layout, pages, _ = test_cpu.made("heads differ", batch=1, pages=(2,))
    yield "reference", layout, pages, lambda x, y, *outs: reference.expand(layout, x, y, *outs)
    yield "numba", layout, pages, lambda x, y, *outs: cpu.expand(cpu.tables_of(layout), x, y, *outs)
    if kernel is not None and DEVICE == "cpu":
        half, held = made("mixed and all kept", HALF, 1, 2)
        yield "Triton", half, held, lambda x, y, *outs: kernel.expand(kernel.tables_of(half), x, y, *outs)


def test_wrong_outputs_are_refused_before_any_is_written():
    for name, layout, pages, expand in twins():
        right = torch.zeros(1, layout.heads, 2 * layout.segment, layout.dim)
        apart = right.new_zeros(*right.shape[:3], 2 * layout.dim)[..., ::2]
        for wrong in (right[..., 1:], right[:, 1:], right[:, :, 1:], torch.cat([right, right]), apart):
            for outs in ((right, wrong), (wrong, right)):
                with pytest.raises(ValueError, match="pages expand to"):
                    expand(pages, rows(layout), *outs)
        assert not right.any(), name
        expand(pages[:, :0], rows(layout), right[:, :, :0], right[:, :, :0])


def test_what_does_not_fit_never_reaches_the_kernels():
    layout, pages, _ = test_cpu.made("heads differ", batch=1, pages=(2,))
    tables, out = cpu.tables_of(layout), torch.zeros(1, layout.heads, 2 * layout.segment, layout.dim)
    for wrong in ((pages[..., :-16], rows(layout)), (pages, rows(layout)[:, 1:]), (pages, rows(layout)[:1])):
        with pytest.raises(ValueError, match="the tables'"):
            cpu.expand(tables, *wrong, out, out)
    for wrong in ((out.double(), out.double()), (out, out.half())):
        with pytest.raises(TypeError, match="expected uint8 pages and float32"):
            cpu.expand(tables, pages, rows(layout), *wrong)
    assert not out.any()


def test_can_expand_says_what_is_answered(monkeypatch):
    layout, _, _ = test_cpu.made("heads differ")
    out = torch.zeros(1, layout.heads, 2 * cpu.ROWS, layout.dim)
    assert cpu.can_expand(layout, out)
    for wrong in (out.double(), out.half(), out.to("meta"), out.clone().requires_grad_()):
        assert not cpu.can_expand(layout, wrong)
    order = torch.arange(8)[None]
    wide = Layout([Code(((OWN, 8),), 0)], [Code(((OWN, 8),), 0)], order, order, 8, torch.float64)
    assert not cpu.can_expand(wide, out)
    monkeypatch.setattr(cpu, "numba", None)
    assert not cpu.can_expand(layout, out)


# the store asks


def asked(layout, k, v, kernels, dtype, monkeypatch):
    """What rows of a store expand to, and which twin did it."""
    monkeypatch.setenv("LONGWAVE_KERNELS", kernels)
    device, who = (DEVICE if layout.dtype in (HALF, BRAIN) else "cpu"), []
    for name, twin in (("reference", reference), ("numba", cpu), ("Triton", kernel)):
        if twin is not None:
            expand = twin.expand
            monkeypatch.setattr(twin, "expand", lambda *args, f=expand, n=name: who.append(n) or f(*args))
    store = PageStore(2, layout, "dct", 4, torch.device(device))
    store.append(0, k[:1, :, : 3 * layout.segment].to(device), v[:1, :, : 3 * layout.segment].to(device))
    store.append(1, k[1:, :, : layout.segment].to(device), v[1:, :, : layout.segment].to(device))
    held = [x.cpu() for x in store.materialize()]
    for row, tokens in enumerate(store.tokens):
        outs = torch.full((2, 1, layout.heads, tokens, layout.dim), math.nan, dtype=dtype, device=device)
        store.expand(row, *outs)
        for out, want in zip(outs.cpu(), held, strict=True):
            near = NEAR[layout.dtype] * want.abs().max().item()
            torch.testing.assert_close(out.float(), want[row : row + 1, :, :tokens].float(), rtol=0, atol=2 * near)
    monkeypatch.undo()
    return who


def test_a_store_expands_with_the_right_twin(monkeypatch):
    layout, _, g = test_cpu.made("heads differ")
    k, v = torch.randn(2, 2, layout.heads, 3 * layout.segment, layout.dim, generator=g)
    assert asked(layout, k, v, "auto", torch.float32, monkeypatch) == ["numba"] * 2
    assert asked(layout, k, v, "reference", torch.float32, monkeypatch) == ["reference"] * 2
    layout, _ = made("paper's rate", HALF, 1, 1)
    k, v = torch.randn(2, 2, layout.heads, 3 * layout.segment, layout.dim, generator=g).half()
    by_itself = "Triton" if DEVICE == "cuda" else "reference"
    assert asked(layout, k, v, "auto", HALF, monkeypatch) == [by_itself] * 2
    assert asked(layout, k, v, "reference", HALF, monkeypatch) == ["reference"] * 2
    if kernel is not None:
        assert asked(layout, k, v, "triton", HALF, monkeypatch) == ["Triton"] * 2


@needs_triton
def test_a_store_says_why_triton_cannot(monkeypatch):
    order = torch.arange(32)[None]
    store = PageStore(1, Layout([Code((), 1)], [Code((), 1)], order, order, 24, HALF), "dct", 1, torch.device("cpu"))
    x = torch.ones(1, 1, 24, 32, dtype=HALF)
    store.append(None, x, x)
    monkeypatch.setenv("LONGWAVE_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=r"cannot unpack: .*powers of two"):
        store.expand(0, x, x)
