"""A cache coded by its model's own codec: found, used, and asked again when the file comes back."""

import pytest
import torch

import longwave
from longwave.codec import codec_for
from longwave.saved import saving
from tests.codec.conftest import Fitted
from tests.conftest import random_profile
from tests.reading import read


@pytest.fixture(scope="module")
def made(tokenizer):
    return Fitted("llama", tokenizer)


@pytest.fixture(autouse=True)
def kept(made, monkeypatch):
    """What `codec_for` would find."""

    def found(model):
        made.codec.check(model)
        return made.codec

    assert saving.codec_for is codec_for
    monkeypatch.setattr(saving, "codec_for", found)


def away(restored, exact):
    """Relative error of K and V of each layer, the worst."""
    pairs = zip(restored.memory_layers(), exact.memory_layers(), strict=True)
    sides = (side for one, other in pairs for side in zip(one.materialize(), other.materialize(), strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in sides)


def test_fewer_bytes_are_further_away(made, tmp_path):
    ids = made.ids[None]
    cache = longwave.cache(made.model, "dense")
    read(made.model, cache, ids)
    errors, sizes = [], []
    least, most = made.codec.sizes
    for size in (0.9 * most, (least * most) ** 0.5):
        sizes.append(longwave.save(cache, ids, tmp_path / "kept.lw", size=size))
        back, same = longwave.restore(made.model, tmp_path / "kept.lw")
        assert torch.equal(same, ids)
        errors.append(away(back, cache))
    assert sizes[0] > sizes[1]
    assert 0 < errors[0] < errors[1] < 0.8


def test_a_size_of_the_file_and_another_method(made, tmp_path):
    ids = made.ids[None]
    cache = longwave.cache(made.model, "dense")
    read(made.model, cache, ids)
    whole = longwave.save(cache, ids, tmp_path / "exact.lw", exact=True)
    written = longwave.save(cache, ids, tmp_path / "kept.lw", size=f"{whole * 0.9:.0f}B")
    assert written == (tmp_path / "kept.lw").stat().st_size <= 0.9 * whole
    back, _ = longwave.restore(
        made.model,
        tmp_path / "kept.lw",
        "fourier",
        0.3,
        segment=16,
        sinks=3,
        window=20,
        profile=random_profile(made.model),
    )
    dense, _ = longwave.restore(made.model, tmp_path / "kept.lw")
    assert back.nbytes < dense.nbytes
    settled = longwave.cache(
        made.model, "fourier", budget=0.3, segment=16, sinks=3, window=20, profile=random_profile(made.model)
    )
    read(made.model, settled, ids)
    assert away(back, settled) < 0.5


def test_a_size_that_no_step_reaches(made, tmp_path):
    cache = longwave.cache(made.model, "dense")
    read(made.model, cache, made.ids[None])
    with pytest.raises(ValueError, match="size is a fraction of the bytes in 16 bits"):
        longwave.save(cache, made.ids[None], tmp_path / "kept.lw", size=0.9)
    assert not list(tmp_path.iterdir())
