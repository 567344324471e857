"""Attention in parts: a softmax over all keys, wherever they were cut, and the device's kernel beside plain torch."""

import pytest
import torch

from longwave.ops.attention import parts
from tests.ops.test_attention import plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(queries, keys, dtype=torch.float64, heads=4, kv_heads=2):
    g = torch.Generator().manual_seed(0)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return (torch.randn(2, h, n, 8, generator=g, dtype=torch.float64).to(DEVICE, dtype) for h, n in shapes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_is_plain_torchs(dtype, masked):
    q, k, v = drawn(7, 13, dtype, heads=2)
    seen = torch.arange(13, device=DEVICE) <= torch.arange(7, device=DEVICE)[:, None]
    bias = parts.bias_of(seen, 1, dtype) if masked else None
    got, want = parts.part_attention(q, k, v, 0.3, bias), parts.part_reference(q, k, v, 0.3, bias)
    close = 1e-2 if dtype.itemsize == 2 else 1e-5
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=close, atol=close)


def band(width, queries, past):
    at = torch.arange(past, past + queries)
    return (at - width + 1).clamp(min=0), at + 1


INTERVALS = {
    "band": band(5, 40, 0),
    "band over a past": band(9, 23, 17),
    "wide band": band(30, 40, 0),
    "causal": band(100, 40, 0),
    "far": (torch.zeros(40, dtype=torch.long), (torch.arange(40) - 12).clamp(min=0)),
    "chunks": (torch.arange(40) // 7 * 7, torch.arange(40) + 1),
    "chunk before": ((torch.arange(40) // 7 * 7 - 7).clamp(min=0), torch.arange(40) // 7 * 7),
}


@pytest.mark.parametrize("block", [3, 8, 512])
@pytest.mark.parametrize("name", list(INTERVALS))
def test_every_query_sees_its_interval(name, block, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK", block)
    first, last = INTERVALS[name]
    q, k, v = drawn(len(first), 40)
    allowed = ((torch.arange(40) >= first[:, None]) & (torch.arange(40) < last[:, None])).to(DEVICE)
    out, lse = parts.joined(parts.interval_attention(q, k, v, 0.3, first, last))
    some = allowed.any(-1)
    torch.testing.assert_close(out[:, :, some], plain(q, k, v, 0.3, allowed)[:, :, some])
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~allowed, float("-inf"))
    torch.testing.assert_close(lse[:, :, some], scores.logsumexp(-1)[:, :, some])
    assert (lse[:, :, ~some] < parts.UNSEEN / 2).all()
    assert torch.isfinite(out).all()
    given = parts.band_mass(q, k, 0.3, first, last, lse + 1)  # of a softmax over more than these keys
    wanted = torch.exp(scores - lse[..., None] - 1).masked_fill(~allowed, 0).sum(2).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(given, wanted)


def test_parts_that_share_no_keys_are_one_softmax():
    q, k, v = drawn(6, 20, heads=2)
    whole = parts.part_reference(q, k, v, 0.3)
    cut = parts.joined(parts.part_reference(q, k[:, :, a:b], v[:, :, a:b], 0.3) for a, b in ((0, 3), (3, 19), (19, 20)))
    for one, other in zip(cut, whole, strict=True):
        torch.testing.assert_close(one, other)
