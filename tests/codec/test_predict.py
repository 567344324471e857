"""What a token is says what layer 0 keeps of it, and something of the others."""

import pytest
import torch

from longwave.codec.predict import Moments, Tokens, embedding, features
from tests.codec.conftest import error, held
from tests.conftest import build, tokens


def test_layer_0_is_predicted_exactly(small):
    ids = tokens(1, 400, seed=3)[0]
    k, v = held(small.model, ids)
    k = small.read.rotation.unrotate(k, torch.arange(400))
    table = embedding(small.model)
    f = features(table, ids)
    for x in (k, v):
        moments = Moments([slice(0, 16), slice(16, 32), slice(32, 48)])
        moments.add(f[:300], x.transpose(0, 1).flatten(1)[:300])
        made = f.double() @ next(moments.predictors([1e-9]))
        left = [error(made[300:, s], x.transpose(0, 1).flatten(1)[300:, s]) for s in moments.groups]
        assert left[0] < 1e-3  # float16's rounding of the embedding is all that is left, on tokens not fitted on
        assert left[2] > 0.05


def test_features_are_the_token_the_one_before_and_a_constant():
    table = torch.arange(12.0).view(4, 3)
    made = features(table, torch.tensor([2, 0, 3]))
    assert made.tolist() == [[6, 7, 8, 0, 0, 0, 1], [0, 1, 2, 6, 7, 8, 1], [9, 10, 11, 0, 1, 2, 1]]
    assert features(table, torch.tensor([2]), before=1)[0, 3:6].tolist() == [3, 4, 5]
    assert features(table, torch.tensor([2])).shape == (1, 7)


def test_rows_of_the_embedding_have_mean_square_1_and_a_wide_one_is_reduced():
    model = build("llama")
    whole = embedding(model).double()
    weight = model.get_input_embeddings().weight.detach().double()
    used = weight.abs().amax(-1) > 0
    assert torch.allclose(whole.square().mean(-1)[used], torch.ones(int(used.sum())).double(), atol=2e-3)
    few = embedding(model, width=12).double()
    assert few.shape == (97, 12)
    # the best 12 directions: what is kept is what the largest singular values hold
    expected = torch.linalg.svdvals(whole)[:12].square().sum()
    assert float(few.square().sum()) == pytest.approx(float(expected), rel=1e-3)


def test_moments_in_parts_are_the_residuals_of_a_direct_fit():
    draw = torch.Generator().manual_seed(0)
    f = torch.cat([torch.randn(200, 6, generator=draw), torch.ones(200, 1)], -1).double()
    x = f @ torch.randn(7, 10, generator=draw).double() + torch.randn(200, 10, generator=draw).double() + 1000
    moments = Moments([slice(0, 4), slice(4, 10)])
    for part in (slice(0, 50), slice(50, 200)):
        moments.add(f[part], x[part])
    w, shrunk = moments.predictors([0.0, 10.0])
    assert torch.allclose(w, torch.linalg.lstsq(f, x).solution, atol=1e-8)
    left = x - f @ w
    for number, group in enumerate(moments.groups):
        assert torch.allclose(moments.residual(w, number), left[:, group].mT @ left[:, group] / 200, atol=1e-7)
    assert torch.allclose(moments.mean(), x.mean(0))
    level, eye = f[:, :-1].square().mean() * 10 * 200, torch.eye(7, dtype=torch.float64)
    eye[-1, -1] = 0  # the constant is not shrunk
    assert torch.allclose(shrunk, torch.linalg.solve(f.mT @ f + level * eye, f.mT @ x), atol=1e-8)


@pytest.mark.parametrize("first", [0, 1, 4])
def test_tokens_that_repeat_are_multiplied_once_and_predict_the_same(small, first):
    """Of several segments side by side."""
    ids = tokens(3, 60, seed=3) % 20
    table = embedding(small.model).double()
    w = torch.randn(2 * table.shape[1] + 1, 7, generator=torch.Generator().manual_seed(0)).double()
    found = Tokens.of(table, ids.numpy(), first, torch.float64)
    assert len(found.own) <= 20
    expected = [(features(table, row, dtype=torch.float64) @ w)[first:] for row in ids]
    torch.testing.assert_close(found.times(w), torch.cat(expected))
    alone = Tokens.of(table, ids[:1, :1].numpy(), 0, torch.float64)
    torch.testing.assert_close(alone.times(w), features(table, ids[0, :1], dtype=torch.float64) @ w)
