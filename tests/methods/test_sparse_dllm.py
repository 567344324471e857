import pytest
import torch
from torch.nn.functional import max_pool1d

import longwave
from longwave.frame.observe import Queries
from longwave.methods.held import Held


def held(b=2, hq=4, h=2, n=20, d=8, asked=(5, 3)):
    torch.manual_seed(0)
    q, k = torch.randn(b, hq, 5, d), torch.randn(b, h, n, d)
    queries = Queries(5, b)
    queries.q, queries.positions, queries.counts = q, torch.zeros(b, 5, dtype=torch.long), list(asked)
    return Held(k, k, torch.tensor([n, n - 4]), {}, queries, 1.0)


def test_the_score_as_written_down():
    """Row by row: the mean of the known queries, products averaged over query heads, the highest of three."""
    has = held()
    found = longwave.SparseDLLM(window=5).score(has)
    assert found.shape == (2, 2, 20)
    assert torch.equal(found[:, 0], found[:, 1])
    for row, (known, length) in enumerate(((5, 20), (3, 16))):
        mean = has.queries.q[row, :, 5 - known :].mean(1)
        products = torch.stack([has.k[row, head // 2] @ mean[head] for head in range(4)]).mean(0)
        free = length - 5
        expected = max_pool1d(products[None, None, :free], 3, 1, 1)[0, 0]
        assert torch.allclose(found[row, 0, :free], expected, atol=1e-6)


@pytest.mark.parametrize("kernel", [0, 2, 1.5])
def test_wrong_kernels(kernel):
    with pytest.raises(ValueError, match="kernel"):
        longwave.SparseDLLM(kernel=kernel)


def test_slots_are_refused():
    with pytest.raises(ValueError, match="asks with queries that it remembers"):
        longwave.SparseDLLM(positions="slots")
