"""Fitting: the same for the same seed, sizes that hold on other text, refusals; the file; what is kept."""

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from longwave.codec import Codec, CodecError, Effort, build, calibrate, codec_for, fit, kept
from longwave.codec.calibrate import grouped
from longwave.plan import automatic
from longwave.plan.automatic import own_texts
from tests.codec.conftest import EFFORT
from tests.conftest import build as model_of
from tests.conftest import shape_of


def test_it_is_the_same_for_the_same_seed(small, tokenizer):
    again = fit(model_of("llama"), tokenizer, effort=EFFORT)
    assert again.fitted.fingerprint == small.codec.fitted.fingerprint
    assert again.curve == small.codec.curve
    other = fit(model_of("llama"), tokenizer, seed=1, effort=EFFORT)
    assert other.fitted.fingerprint != again.fitted.fingerprint


def test_steps_are_found_for_sizes(small):
    codec, last = small.codec, -(10**6)
    least, most = codec.sizes
    assert least < 0.05
    assert most > 0.15
    for size in (most, 0.15, 0.1, 0.07, 0.05, least):
        step = codec.step(size)
        assert step > last
        last = step
    for step, size in codec.curve:
        assert codec.step(size) == step
    for size in (0, 1, most * 1.01, least * 0.99):
        with pytest.raises(ValueError, match=r"size is a fraction of the bytes in 16 bits, 0\.\d+ to 0\.\d+ here; got"):
            codec.at(size)


def test_sizes_hold_on_other_text(small):
    codec = small.codec.at(0.1)
    taken = [len(codec.encode(*small.part(s, s + 128)[:2], ids=small.ids[s : s + 128], start=s)) for s in (4, 132)]
    assert 0.7 < sum(taken) / 2 / codec.typical(128) < 1.3


def test_axes_and_weights(small):
    fitted = small.codec.fitted
    for side, weights in zip((fitted.k, fitted.v), small.read.weights, strict=True):
        (basis,) = side.bases
        axes = basis.axes.double()
        assert torch.allclose(axes.mT @ axes, torch.eye(axes.shape[1]).double(), atol=4e-3)
        axes = basis.orthonormal.double()
        assert torch.allclose(axes.mT @ axes, torch.eye(axes.shape[1]).double(), atol=2e-6)
        ratio = side.weight.double() / weights.flatten()
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-5)
    alone = build(small.read, weigh=False).fitted
    assert len(set(alone.k.weight.tolist())) == 1
    assert len(build(small.read, predict=False).fitted.k.predictor) == 0


def test_each_layer_alone_is_the_same_as_read_alone(small, tokenizer):
    alone = calibrate(small.model, tokenizer, own_texts(), Effort(**{**vars(EFFORT), "channels": 16}))
    assert alone.groups == ((0, 1), (1, 2), (2, 3))
    ours, theirs = build(small.read, groups=alone.groups), build(alone)
    assert ours.fitted.groups == theirs.fitted.groups
    for a, b in zip(ours.fitted.k.bases, theirs.fitted.k.bases, strict=True):
        assert torch.allclose(a.known.spread.double(), b.known.spread.double(), atol=2)


@pytest.mark.parametrize(
    ("layers", "width", "channels", "expected"),
    [(30, 192, 2048, 3), (30, 192, 6144, 1), (32, 1024, 6144, 6), (3, 256, 100, 3), (1, 512, 2048, 1)],
)
def test_groups(layers, width, channels, expected):
    groups = grouped(layers, width, channels)
    assert len(groups) == expected
    assert [i for first, last in groups for i in range(first, last)] == list(range(layers))
    assert max(b - a for a, b in groups) - min(b - a for a, b in groups) <= 1


def test_what_cannot_be_fitted_says_why(tokenizer, llama):
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=512)).eval()
    with pytest.raises(NotImplementedError, match="learned positions"):
        fit(gpt2, tokenizer, effort=EFFORT)
    with pytest.raises(ValueError, match="no text"):
        fit(llama, tokenizer, ["  "], effort=EFFORT)
    with pytest.raises(ValueError, match="at least 384 are needed"):
        fit(llama, tokenizer, ["a few words"], effort=EFFORT)
    short = copy.deepcopy(llama)
    short.config.max_position_embeddings = 300
    with pytest.raises(ValueError, match="context of 300 tokens is too short"):
        Effort.of(short)


def test_a_first_token_that_a_model_expects_is_read(tokenizer):
    from longwave.codec.calibrate import _windows, opened

    class Opening:
        bos_token_id = 5

        def __call__(self, text, add_special_tokens=True, **options):
            made = tokenizer(text, add_special_tokens=False, **options)
            if add_special_tokens:
                made["input_ids"] = [5, *made["input_ids"]]
            return made

    assert opened(Opening(), torch.ones(2, 3, dtype=torch.long)).tolist() == [[5, 1, 1]] * 2
    assert opened(tokenizer, torch.ones(1, 3, dtype=torch.long)).tolist() == [[1, 1, 1]]
    rows, ends, _ = _windows(Opening(), own_texts(), EFFORT, 0)
    assert bool((rows.ids[:, 0] == 5).all())
    assert all(int(ids[0]) == 5 for ids in ends)


# the file


def test_a_file_gives_the_same_codec(small, tmp_path):
    path = tmp_path / "codec.safetensors"
    small.codec.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["codec.safetensors"]
    found = Codec.load(path)
    assert found.curve == small.codec.curve
    assert found.about == small.codec.about
    k, v, ids = small.part(4, 132)
    made = found.at(0.1).encode(k, v, ids=ids, start=4)
    assert made == small.codec.at(0.1).encode(k, v, ids=ids, start=4)
    assert found.at(0.1).find(k[0], v[0]) == (ids.tolist(), 4)
    found.check(small.model)
    found.check(copy.deepcopy(small.model).bfloat16())
    other = copy.deepcopy(small.model)
    other.model.layers[1].self_attn.v_proj.weight.data *= 1.1
    with pytest.raises(ValueError, match="weights differ"):
        found.check(other)
    with pytest.raises(ValueError, match="3x2x8 layers x heads x channels; this model has 2x2x8"):
        found.check(model_of("qwen3"))


def test_damaged_and_foreign_files_are_refused(small, tmp_path):
    path, bad = tmp_path / "codec", tmp_path / "bad"
    small.codec.save(path)
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no codec at"):
        Codec.load(bad)
    for broken in (b"", whole[:100], whole[:-1], b"x" * 500, whole[:-9] + b"x" + whole[-8:]):
        bad.write_bytes(broken)
        with pytest.raises(CodecError):
            Codec.load(bad)
    tensors = load_file(path)
    save_file(tensors, bad)
    with pytest.raises(CodecError, match="is not a longwave codec"):
        Codec.load(bad)
    save_file(tensors, bad, {"format": "longwave-codec", "version": "9"})
    with pytest.raises(CodecError, match="version 9"):
        Codec.load(bad)
    save_file(tensors, bad, {"format": "longwave-codec", "version": "2", "codec": "{}"})
    with pytest.raises(CodecError, match="is damaged"):
        Codec.load(bad)


# what is kept


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(automatic, "_folder", lambda: tmp_path / "profiles")
    monkeypatch.setattr(Effort, "of", classmethod(lambda cls, model: EFFORT))
    return tmp_path / "profiles"


def test_a_model_is_fitted_once_and_says_so(small, tokenizer, home, capsys, monkeypatch):
    first = codec_for(small.model, tokenizer)
    (path,) = home.iterdir()
    said = capsys.readouterr().err
    assert "fitting a codec to LlamaForCausalLM, once" in said
    assert str(path) in said
    counts, found = [], []
    monkeypatch.setattr(kept, "fit", lambda *a, **b: counts.append(1))
    threads = [threading.Thread(target=lambda: found.append(codec_for(small.model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not counts
    assert {c.fitted.fingerprint for c in found} == {first.fitted.fingerprint} == {small.codec.fitted.fingerprint}
    assert capsys.readouterr().err == ""
    half = codec_for(copy.deepcopy(small.model).bfloat16())
    assert half.fitted.fingerprint == first.fitted.fingerprint


def test_another_model_and_a_damaged_file_are_fitted_again(small, tokenizer, home, capsys):
    first = codec_for(small.model, tokenizer)
    other = copy.deepcopy(small.model)
    other.model.layers[1].self_attn.v_proj.weight.data *= 1.1
    assert codec_for(other, tokenizer).fitted.fingerprint != first.fitted.fingerprint
    assert len(list(home.iterdir())) == 2
    for path in home.iterdir():
        path.write_bytes(b"{")
    assert codec_for(small.model, tokenizer).fitted.fingerprint == first.fitted.fingerprint


def test_without_a_tokenizer_or_a_folder(small, tokenizer, home, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="pass tokenizer="):
        codec_for(small.model)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(automatic, "_folder", lambda: tmp_path / "file" / "profiles")
    assert codec_for(small.model, tokenizer).curve == small.codec.curve
    assert "not kept, so the next process fits again" in capsys.readouterr().err


def test_the_tensors_of_a_codec_round_trip(small):
    names = [name for name, _ in small.codec.fitted.tensors()]
    assert len(names) == len(set(names))
    assert small.codec.fitted.entropy.frequency.shape == (49, 256)
    assert shape_of(small.model).memory_layers == (0, 1, 2)


def test_moments_do_not_grow_with_the_tokens_read(small):
    sides = small.read.moments
    assert sides[0].count == small.read.about["read"]
    assert sides[0].ff.shape == (2 * 32 + 1, 2 * 32 + 1)
    assert sides[1].xx[0].shape == (48, 48)
