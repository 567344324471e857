"""A cache coded by its model's own codec: found, used, and asked again when the file comes back."""

import copy

import pytest
import torch

import longwave
from longwave.codec import build
from longwave.codec import kept as kept_module
from longwave.plan import automatic
from longwave.saved import restoring
from tests.codec.conftest import Fitted
from tests.conftest import random_profile
from tests.reading import read


@pytest.fixture(scope="module")
def made(tokenizer):
    return Fitted("llama", tokenizer)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """Where the model's codec is kept."""
    path = tmp_path_factory.mktemp("profiles")
    made.codec.save(path / f"codec-{made.codec.fitted.layers}x2x8-0.safetensors")
    return path


@pytest.fixture(autouse=True)
def kept(folder, monkeypatch):
    """The codecs that are there, by their folder; none is fitted."""
    monkeypatch.setattr(automatic, "_folder", lambda: folder)
    monkeypatch.setattr(kept_module, "fit", lambda *_, **__: pytest.fail("a codec is fitted"))


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


# where the codec is not there


@pytest.fixture
def coded(made, tmp_path):
    """A file, and its exact cache."""
    cache = longwave.cache(made.model, "dense")
    read(made.model, cache, made.ids[None])
    longwave.save(cache, made.ids[None], tmp_path / "kept.lw", size=0.9 * made.codec.sizes[1])
    return tmp_path / "kept.lw", cache


@pytest.fixture
def fits(made, tmp_path, monkeypatch):
    """No codec is kept any more. A list of the models that one was fitted to since."""
    fitted = []

    def fit(model, tokenizer):
        fitted.append(model)
        return made.codec

    monkeypatch.setattr(automatic, "_folder", lambda: tmp_path / "none")
    monkeypatch.setattr(restoring, "codec_for", fit)
    return fitted


def test_all_else_is_refused_before_one_is_fitted(made, coded, fits):
    path, cache = coded
    other = copy.deepcopy(made.model)
    other.model.layers[1].self_attn.v_proj.weight.data *= 1.1
    with pytest.raises(longwave.SavedCacheError, match="another model"):
        longwave.restore(other, path)
    with pytest.raises(ValueError, match="attention that each token got"):
        longwave.restore(made.model, path, "h2o", 0.3)
    with pytest.raises(ValueError, match="dense keeps everything"):
        longwave.restore(made.model, path, "dense", 0.5)
    assert not fits
    assert away(longwave.restore(made.model, path)[0], cache) < 0.5
    assert fits == [made.model]


def test_another_codec_that_is_kept(made, coded, fits, tmp_path, monkeypatch):
    """It is what the model's caches are coded by from now on: no other is fitted."""
    other = build(made.read, predict=False)
    (tmp_path / "none").mkdir()
    other.save(tmp_path / "none" / f"codec-{other.fitted.layers}x2x8-0.safetensors")
    with pytest.raises(longwave.SavedCacheError, match="another codec, or one fitted otherwise"):
        longwave.restore(made.model, coded[0])
    assert not fits


def test_one_that_is_fitted_otherwise(made, coded, fits, monkeypatch):
    monkeypatch.setattr(restoring, "codec_for", lambda *_: build(made.read, predict=False))
    with pytest.raises(longwave.SavedCacheError, match="another codec, or one fitted otherwise"):
        longwave.restore(made.model, coded[0])


def test_a_place_where_no_file_can_be_is_refused_first(made, tmp_path, fits):
    cache = longwave.cache(made.model, "dense")
    read(made.model, cache, made.ids[None])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        longwave.save(cache, made.ids[None], tmp_path / "no" / "kept.lw", size=0.1)
