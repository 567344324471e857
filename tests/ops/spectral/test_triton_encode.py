"""Pages made in Triton against those of the reference, byte by byte, into memory poisoned first.

On a CPU it runs in Triton's interpreter (tests/conftest.py switches it on), on a GPU for real.
"""

import pytest
import torch

from longwave.ops.spectral import reference
from longwave.ops.spectral.basis import table
from longwave.ops.spectral.layout import OWN, Code, Layout
from longwave.store.pages import PageStore

triton = pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
kernel = pytest.importorskip("longwave.ops.spectral.triton_encode")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy of the interpreter, over infinities
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, BRAIN = torch.float16, torch.bfloat16


def turned(bits, n=64, **how):
    return Code(((bits, n),), **dict(states=1, axis="token", residual=True, state_bits=8, zero=False) | how)


KIVI = dict(axis="token", group=32, fit=False)
# name -> K's and V's codes by head, segment, channels
LAYOUTS = {
    "planned": (
        [Code(((4, 5), (3, 7), (2, 24), (1, 9)), 1, state_bits=8), Code(((8, 33),), 1, state_bits=8)],
        [turned(2), Code((), 1, state_bits=8)],
        128,
        64,
    ),
    "every width": (
        [Code(((b, 64),), 0) for b in (1, 2, 3, 4, 8)],
        [turned(b, states=b) for b in (1, 2, 3, 4, 8)],
        32,
        64,
    ),
    "every width, not fitted": (
        [Code(((b, 32),), 0, fit=False) for b in (1, 2, 3, 4, 8)],
        [turned(b, 32, fit=False, zero=b % 2 == 0) for b in (1, 2, 3, 4, 8)],
        16,
        32,
    ),
    "mixed and all kept": (
        [Code(((16, 64),), 0), Code(((16, 3), (2, 40)), 4), Code(((4, 64),), 0)],
        [Code(((OWN, 64),), 0), Code(((16, 19),), 4, state_bits=16), Code((), 3)],
        64,
        64,
    ),
    "paper's rate": ([Code(((OWN, 32),), 4)], [Code(((OWN, 33),), 4, state_bits=8)], 128, 128),
    "kivi": ([Code(((2, 64),), 0, fit=False)], [Code(((b, 64),), 0, **KIVI) for b in (1, 2, 3, 4, 8)], 32, 64),
    "what few and many states leave": (
        [Code((), 64)],
        [turned(3, state_bits=16), turned(4, states=9), turned(1, states=0), turned(2, group=16)],
        64,
        64,
    ),
    "axes changed over": ([turned(2), Code(((3, 64),), 0, **KIVI)], [Code(((3, 17), (1, 1)), 2)], 16, 64),
    "head of 128": ([Code(((3, 128),), 0)], [turned(4, 128, zero=True)], 128, 128),
    "head of 256": ([Code(((2, 200),), 1, state_bits=8)], [turned(3, 256)], 256, 256),
}


def made(name, dtype, batch=1, segments=1, seed=0):
    """A layout whose heads take its codes in turn, K and V that suit it, and the basis."""
    ks, vs, segment, dim = LAYOUTS[name]
    g = torch.Generator().manual_seed(seed)
    heads = max(len(ks), len(vs))
    order = torch.stack([torch.randperm(dim, generator=g) for _ in range(2 * heads)])
    sides = ([codes[i % len(codes)] for i in range(heads)] for codes in (ks, vs))
    layout = Layout(*sides, order[:heads], order[heads:], segment, dtype)
    k, v = torch.randn(2, batch, heads, segments * segment, dim, generator=g).add_(0.5).to(dtype)
    most = max(code.states for code in (*ks, *vs))
    return layout, k, v, table("dct", max(1, most), segment, torch.float32)


def run(layout, k, v, basis):
    """Pages, made on the device."""
    tables = kernel.tables_of(layout.on(torch.device(DEVICE)))
    return kernel.encode(tables, k.to(DEVICE), v.to(DEVICE), basis.to(DEVICE)).cpu()


def poisoned(monkeypatch):
    """Memory that is asked to be zero holds ones instead, where it is bytes."""
    zeros = torch.zeros

    def filled(*shape, **how):
        made = zeros(*shape, **how)
        return made.fill_(255) if made.dtype == torch.uint8 else made

    monkeypatch.setattr(kernel.torch, "zeros", filled)


def holes(layout):
    """Which bytes of a page belong to no field."""
    free = torch.ones(layout.page_bytes, dtype=torch.bool)
    for field in (*layout.fields()["kept"], *layout.fields()["coefficients"]):
        free[field.offset : field.offset + field.nbytes] = False
    return free


def compare(layout, got, want, k, v, basis):
    """Nearly every byte is the reference's; none is far."""
    interpreted = DEVICE == "cpu"
    wrong = 0
    for group in (*layout.k, *layout.v):
        for held, scales in zip(group.values, group.scales, strict=True):
            a, b = held.view(got), held.view(want)
            wrong += int((a != b).sum())
            if scales is None:
                assert torch.equal(a, b)
            else:
                a, b = (scales.view(x).contiguous().view(torch.int16).int() for x in (got, want))
                assert (a - b).abs().max() <= 1
                wrong += 2 * int((a != b).sum())
        if group.gains is not None:
            a, b = group.states.view(got).int(), group.states.view(want).int()
            assert (a - b).abs().max() <= 1
            wrong += int((a != b).sum())
        elif group.states is not None:  # sums that cancel leave other digits; the interpreter cuts bits of bfloat16 off
            a, b = group.states.view(got).float(), group.states.view(want).float()
            slack, cut = 1e-6 * b.abs().max(), interpreted and layout.dtype == BRAIN
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(layout.dtype).eps, atol=slack.item())
            wrong += 0 if cut else 2 * int(((a - b).abs() > slack).sum())
        if group.gains is not None:
            a, b = (group.gains.view(x).contiguous().view(torch.int16).int() for x in (got, want))
            assert (a - b).abs().max() <= 1
            wrong += 2 * int((a != b).sum())
    assert wrong <= want.numel() / 1000, f"{wrong} bytes of {want.numel()} differ"
    near = 4e-3 if layout.dtype == BRAIN and interpreted else 1e-2 if wrong else 1e-5
    sides = (reference.decode(layout, pages, basis) for pages in (got, want))
    for x, a, b in zip((k, v), *sides, strict=True):
        assert (a - b).norm() <= near * b.norm()
        assert (a - x.float()).norm() <= 1.002 * (b - x.float()).norm() + 1e-5 * b.norm()


def check(layout, k, v, basis, monkeypatch):
    want = reference.encode(layout, k, v, basis)
    assert kernel.fits(layout) is None
    with monkeypatch.context() as patch:
        poisoned(patch)
        got = run(layout, k, v, basis)
    assert got.shape == want.shape
    compare(layout, got, want, k, v, basis)


@pytest.mark.parametrize(
    ("name", "dtype", "batch", "segments"),
    [
        ("planned", HALF, 2, 3),
        ("planned", BRAIN, 1, 1),
        ("every width", HALF, 1, 2),
        ("every width, not fitted", HALF, 1, 1),
        ("mixed and all kept", HALF, 3, 1),
        ("mixed and all kept", BRAIN, 1, 2),
        ("paper's rate", HALF, 2, 2),
        ("kivi", HALF, 2, 2),
        ("kivi", BRAIN, 1, 1),
        ("what few and many states leave", HALF, 1, 2),
        ("axes changed over", HALF, 2, 2),
        ("head of 128", HALF, 1, 2),
        ("head of 128", BRAIN, 1, 1),
        ("head of 256", HALF, 1, 1),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_pages_are_the_references(name, dtype, batch, segments, monkeypatch):
    check(*made(name, dtype, batch, segments), monkeypatch)


def test_holes_are_zero():
    layout, k, v, basis = made("planned", HALF, 2, 2)
    free = holes(layout)
    assert free.any()
    assert not run(layout, k, v, basis)[..., free].any()


def test_rows_and_segments_do_not_touch_each_other():
    layout, k, v, basis = made("every width, not fitted", HALF, 2, 2)
    whole = run(layout, k, v, basis)
    for b in range(2):
        for n in range(2):
            part = slice(b, b + 1), slice(None), slice(16 * n, 16 * (n + 1))
            assert torch.equal(run(layout, k[part], v[part], basis)[0, 0], whole[b, n])


@pytest.mark.parametrize("how", ["tokens before heads", "a slice of tokens", "channels apart", "one row for all"])
def test_strided_inputs(how, monkeypatch):
    layout, k, v, basis = made("axes changed over", HALF, 2, 3)
    if how == "tokens before heads":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif how == "a slice of tokens":
        k, v = k[..., 5:37, :], v[..., 15:47, :]
    elif how == "channels apart":
        k, v = (x.mT.contiguous().mT for x in (k, v))
    else:
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    check(layout, k, v, basis, monkeypatch)


@pytest.mark.parametrize("name", ["planned", "kivi", "mixed and all kept"])
def test_constant_and_empty_channels(name, monkeypatch):
    layout, k, v, basis = made(name, HALF, 1, 2)
    k[:, 0], v[:, 0] = 0.0, 0.0
    k[:, 1:], v[:, 1:] = k[:, 1:, :1], v[:, 1:, :1]
    k[..., 3], v[..., 3] = 3000.0, 6e-8
    check(layout, k, v, basis, monkeypatch)


@pytest.mark.parametrize("value", [1e38, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("side", ["k", "v"])
def test_what_float16_scales_cannot_hold_is_refused(side, value):
    layout, k, v, basis = made("every width, not fitted", BRAIN, 1, 2)
    run(layout, k, v, basis)
    (k if side == "k" else v)[0, 2, 20, 5] = value
    for encode in (reference.encode, run):
        with pytest.raises(ValueError, match="exceed what float16 scales can hold"):
            encode(layout, k, v, basis)


def test_what_is_kept_at_16_bits_may_be_large(monkeypatch):
    order = torch.arange(32)[None]
    layout = Layout([Code(((OWN, 32),), 0)], [Code(((16, 32),), 0)], order, order, 16, BRAIN)
    k = torch.full((1, 1, 32, 32), 1e38).to(BRAIN)
    assert torch.equal(run(layout, k, -k, torch.ones(1, 16)), reference.encode(layout, k, -k, torch.ones(1, 16)))


@pytest.mark.parametrize(
    ("k", "v", "segment", "dim", "dtype", "why"),
    [
        (Code(((OWN, 32),), 0), Code(((OWN, 32),), 0), 16, 32, torch.float32, "16 bits"),
        (Code(((OWN, 32),), 0), Code(((OWN, 32),), 0), 24, 32, HALF, "powers of two"),
        (Code(((OWN, 48),), 0), Code(((OWN, 48),), 0), 16, 48, HALF, "powers of two"),
        (Code(((OWN, 32),), 0), Code(((OWN, 32),), 0), 512, 32, HALF, "powers of two"),
        (Code(((2, 32),), 1, residual=True), Code((), 1), 16, 32, HALF, "across channels"),
        (Code((), 1), Code(((16, 32),), 1, axis="token", residual=True), 16, 32, HALF, "1 to 8 bits"),
        (Code((), 1), Code(((4, 8), (2, 8)), 1, axis="token"), 16, 32, HALF, "all of a head's"),
    ],
)
def test_says_what_it_cannot_make(k, v, segment, dim, dtype, why):
    order = torch.arange(dim)[None]
    assert why in kernel.fits(Layout([k], [v], order, order, segment, dtype))


def test_wrong_inputs_are_refused():
    layout, k, v, basis = made("kivi", HALF)
    with pytest.raises(ValueError, match="float32"):
        run(layout, k.float(), v, basis)
    with pytest.raises(ValueError, match=r"N \* 32"):
        run(layout, k[..., :31, :], v[..., :31, :], basis)
    assert run(layout, k[..., :0, :], v[..., :0, :], basis).shape == (1, 0, layout.page_bytes)


# the store asks


def stored(layout, parts, kernels, monkeypatch):
    """Pages of a store that was given parts one after the other, and how often Triton made them."""
    monkeypatch.setenv("LONGWAVE_KERNELS", kernels)
    calls, encode = [], kernel.encode
    monkeypatch.setattr(kernel, "encode", lambda *args: calls.append(1) or encode(*args))
    store = PageStore(2, layout, "dct", 9, torch.device(DEVICE))
    for row, k, v in parts:
        store.append(row, k.to(DEVICE), v.to(DEVICE))
    return store.pages.cpu(), len(calls)


def test_a_store_compresses_with_triton(monkeypatch):
    layout, k, v, _ = made("axes changed over", HALF, 2, 3)
    parts = [(None, k[..., :32, :], v[..., :32, :])]
    parts += [(b, k[b : b + 1, :, 32:], v[b : b + 1, :, 32:]) for b in range(2)]
    want, none = stored(layout, parts, "reference", monkeypatch)
    got, some = stored(layout, parts, "triton", monkeypatch)
    assert (none, some) == (0, 3)
    assert (got != want).sum() <= got.numel() / 1000
    _, by_itself = stored(layout, parts, "auto", monkeypatch)
    assert by_itself == (3 if DEVICE == "cuda" else 0)


def test_a_store_says_why_triton_cannot(monkeypatch):
    order = torch.arange(32)[None].expand(2, -1)
    layout = Layout([Code((), 1)] * 2, [Code((), 1)] * 2, order, order, 24, HALF)
    x = torch.ones(2, 2, 24, 32, dtype=HALF)
    with pytest.raises(RuntimeError, match=r"cannot compress: .*powers of two"):
        stored(layout, [(None, x, x)], "triton", monkeypatch)
    for kernels in ("auto", "reference"):
        assert stored(layout, [(None, x, x)], kernels, monkeypatch)[1] == 0
