import pytest
import torch

from longwave.ops.attention import reference as attention


def plain(q, k, v, scaling, allowed):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return torch.softmax((q @ k.mT * scaling).masked_fill(~allowed, float("-inf")), -1) @ v


@pytest.mark.parametrize("queries", [1, 17])
@pytest.mark.parametrize("elements", [1 << 25, 40], ids=["whole", "blocks"])
def test_visible_columns(queries, elements, monkeypatch):
    monkeypatch.setattr(attention, "MASK_ELEMENTS", elements)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g, dtype=torch.float64) for h, n in ((4, queries), (2, 30), (2, 30)))
    visible = torch.randint(1, 31, (2, queries), generator=g)
    allowed = (torch.arange(30) < visible[..., None])[:, None]
    torch.testing.assert_close(attention.dense_attention(q, k, v, 0.3, visible), plain(q, k, v, 0.3, allowed))
    torch.testing.assert_close(attention.dense_attention(q, k, v, 0.3, None), plain(q, k, v, 0.3, allowed | True))


def test_a_query_that_sees_nothing_is_finite():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    out = attention.dense_attention(q, k, k, 1.0, torch.tensor([[0, 0, 2]]))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("queries", [1, 7, 30])
def test_the_last_of_several_rows(queries):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g, dtype=torch.float64) for h, n in ((4, queries), (2, 30), (2, 30)))
    allowed = torch.arange(30) <= torch.arange(30 - queries, 30)[:, None]
    torch.testing.assert_close(attention.last_attention(q, k, v, 0.3), plain(q, k, v, 0.3, allowed))
    torch.testing.assert_close(attention.last_attention(q, k, v, 0.3, False), plain(q, k, v, 0.3, allowed | True))
