import pytest
import torch

from longwave.codec.expand import Turn, expand
from longwave.codec.predict import Said, Tokens
from longwave.codec.rotation import Rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LAYERS, HEADS = 2, 3


def partners(kind, size):
    """Which channels turn together: halves, neighbours, or halves of the first few alone, as in partial rotation."""
    turned = {"halves": size, "neighbours": size, "partial": size // 4 * 2}[kind]
    own = torch.arange(size)
    first = own[:turned]
    return torch.cat([first ^ 1 if kind == "neighbours" else first.roll(turned // 2), own[turned:]])


def given(size, tokens, components, known, kind="halves", seed=0):
    """Two segments of `tokens`, the first of which begins a text."""
    draw = torch.Generator().manual_seed(seed)
    channels = LAYERS * HEADS * size

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(DEVICE)

    c, axes, said = normal(2 * tokens, components), normal(channels, components), Said(normal(1, channels))
    if known:
        ids = torch.randint(0, 30, (2, tokens + 2), generator=draw).numpy()
        said = Tokens.of(normal(40, 10), ids, 2, torch.float32).said(normal(21, channels))
        if tokens % 2:
            said = Tokens.of(normal(40, 10), ids[:, 2:], 0, torch.float32).said(normal(21, channels))
    partner = partners(kind, size)
    frequency = torch.randn(LAYERS, size, generator=draw) * (partner != torch.arange(size))
    rotation = Rotation(partner, frequency, 1 + torch.rand(LAYERS, size, generator=draw)).to(DEVICE)
    positions = torch.randint(0, 5000, (2 * tokens,), generator=draw).to(DEVICE)
    return c, axes, said, Turn(rotation, positions)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("turned", ["halves", "neighbours", "partial", None])
@pytest.mark.parametrize(("size", "tokens", "components"), [(16, 40, 70), (24, 7, 5)])
def test_triton_expands_as_the_reference_does(size, tokens, components, turned, known, monkeypatch):
    """On a CPU in the interpreter, on a GPU for real; into storage with gaps, of the types that caches have."""
    pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    c, axes, said, turn = given(size, tokens, components, known, turned or "halves")
    kept = torch.full((LAYERS, HEADS, 2 * tokens + 3, size), 7.0, device=DEVICE)
    for dtype, near in ((torch.float32, 1e-4), (torch.float16, 5e-2), (torch.bfloat16, 0.3)):
        made = []
        for kernels in ("reference", "triton"):
            monkeypatch.setenv("LONGWAVE_KERNELS", kernels)
            storage = kept.to(dtype)
            expand(c, axes, said, turn if turned else None, storage[:, :, 2:-1].transpose(1, 2))
            made.append(storage.float())
        torch.testing.assert_close(made[1], made[0], rtol=near / 10, atol=near)
        assert bool((made[1][:, :, [0, 1, -1]] == 7).all())


def test_what_is_said_of_tokens_is_what_they_are_and_follow():
    """Double precision, spelled out token by token."""
    table, w = torch.randn(30, 4, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    ids = torch.randint(0, 30, (2, 6)).numpy()
    found = Tokens.of(table, ids, 0, torch.float64).said(w).numbers().view(2, 6, 5)
    for row in range(2):
        for t in range(6):
            expected = table[ids[row, t]] @ w[:4] + w[-1]
            if t:
                expected = expected + table[ids[row, t - 1]] @ w[4:8]
            torch.testing.assert_close(found[row, t], expected)
