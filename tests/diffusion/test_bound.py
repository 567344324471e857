from itertools import combinations

import pytest
import torch
from torch.nn.functional import cross_entropy

from longwave.diffusion import loss_bound
from tests.conftest import left_padded, tokens
from tests.diffusion.conftest import MASK

IDS = tokens(1, 12).clamp(max=94)


@torch.no_grad()
def every_mask(model, ids, scored):
    """The expectation itself, over all masks of each number of tokens."""
    start, losses = ids.shape[1] - scored, []
    for k in range(1, scored + 1):
        of_k = []
        for places in combinations(range(start, ids.shape[1]), k):
            text = ids.clone()
            text[0, list(places)] = MASK
            logits = model(text).logits[0]
            at = torch.tensor(places) - int(model.config.logit_shift)
            of_k.append(cross_entropy(logits[at].double(), ids[0, list(places)]))
        losses.append(torch.stack(of_k).mean())
    return torch.stack(losses).mean()


def test_one_token_is_exact(both):
    found = loss_bound(both, IDS, scored=1, samples=1)
    assert torch.allclose(found, every_mask(both, IDS, 1)[None])


def test_many_samples_come_to_the_expectation(both):
    expected = every_mask(both, IDS, 3)
    found = loss_bound(both, IDS.expand(20, -1), scored=3, samples=30)
    assert float((found.mean() - expected).abs() / expected) < 0.1
    assert found.std() > 0


def test_the_numbers_of_masks_lie_evenly(llada, monkeypatch):
    counts, forward = [], llada.forward

    def counted(text, **options):
        counts.append(int((text == MASK).sum()))
        return forward(text, **options)

    monkeypatch.setattr(llada, "forward", counted)
    loss_bound(llada, IDS, scored=8, samples=8)
    assert sorted(counts) == list(range(1, 9))


def test_rows_and_padding(both):
    ids, mask = left_padded(3, 16, [0, 5, 9])
    ids = ids.clamp(max=94)
    found = loss_bound(both, ids, mask, scored=6, samples=4, seed=2)
    for row, pad in enumerate((0, 5, 9)):
        alone = loss_bound(both, ids[row : row + 1, pad:], scored=6, samples=4, seed=2 + row)
        assert torch.allclose(found[row], alone[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scored": 0}, "scored is a whole number of tokens, at least 1; got 0"),
        ({"scored": 12}, "12 tokens are scored after at least one other, and a row has 12"),
        ({"scored": 2, "samples": 0}, "samples is a whole number of passes"),
        ({"scored": 2, "seed": None}, "seed is a whole number"),
    ],
)
def test_wrong_options(llada, options, message):
    with pytest.raises(ValueError, match=message):
        loss_bound(llada, IDS, **options)


def test_a_causal_model(models):
    with pytest.raises(ValueError, match="attention is causal"):
        loss_bound(models["llama"][1], IDS, scored=2)
