"""A file that is not whole, not ours or not of this model is refused with the reason; whatever it is, never silently
wrong."""

import json
import multiprocessing
import os
import random
import struct

import pytest
import torch

import longwave
from longwave.codec.coder import SINKS, WINDOW
from longwave.saved import container, look
from tests.coder import Raw
from tests.conftest import build, random_profile, tokens
from tests.matrix import ENDS
from tests.reading import read

LENGTH = SINKS + WINDOW + 40


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def other():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.1  # no projection of K or V
    return model


@pytest.fixture(scope="module", params=["exact", "coded"])
def kind(request):
    return request.param


def write(model, path, kind, seed=1):
    ids = tokens(1, LENGTH, seed)
    memory = longwave.cache(model, longwave.Fourier(segment=8, **ENDS), 0.5, random_profile(model))
    read(model, memory, ids)
    longwave.save(memory, ids, path, **({"exact": True} if kind == "exact" else {"size": "1MB", "coder": Raw()}))
    return path


@pytest.fixture(scope="module")
def whole(model, kind, tmp_path_factory):
    """A good file's bytes, another's of another text, and another model's."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(1)
    stranger = build("llama")
    torch.nn.init.normal_(stranger.model.embed_tokens.weight)
    made = [write(model, folder / "a", kind), write(model, folder / "b", kind, 2), write(stranger, folder / "c", kind)]
    return [path.read_bytes() for path in made]


def restore(model, path, kind):
    return longwave.restore(model, path, **({} if kind == "exact" else {"coder": Raw()}))


def parts(raw):
    """(header, where its tensors start, name -> (start, stop) in the file)."""
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return header, 8 + length, {name: (8 + length + a, 8 + length + b) for name, (a, b) in places.items()}


def rebuilt(header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def damages(whole, seed):
    """Endlessly: a good file with something wrong."""
    chance = random.Random(seed)
    good, second, stranger = whole
    header, start, places = parts(good)
    names = [name for name, (a, b) in places.items() if b > a]

    def bits(raw, first, last):
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(first, last)
            raw[at] ^= 1 << chance.randrange(8)
        return raw

    while True:
        way, raw = chance.randrange(9), bytearray(good)
        if way < 2:
            yield bits(raw, 0, len(raw))
        elif way == 2:
            yield bits(raw, 0, start)  # the header
        elif way == 3:
            yield raw[: chance.randrange(len(raw))]
        elif way == 4:
            yield raw + bytes(chance.randrange(1, 99))
        elif way == 5:  # a piece is lost, and what follows moves up
            at = chance.randrange(len(raw))
            yield raw[:at] + raw[at + chance.randrange(1, 99) :]
        elif way == 6:  # two tensors change places, in the header or in the data
            one, two = chance.sample(names, 2)
            (a, b), (c, d) = places[one], places[two]
            if chance.random() < 0.5:
                swapped = {**header, one: header[two], two: header[one]}
                yield bytearray(rebuilt(swapped, good[start:]))
            else:
                n = min(b - a, d - c)
                raw[a : a + n], raw[c : c + n] = raw[c : c + n], raw[a : a + n]
                yield raw
        elif way == 7:  # a tensor of the same name from another text, or another model
            theirs = chance.choice((second, stranger))
            _, _, far = parts(theirs)
            name = chance.choice([name for name in names if name in far])
            (a, b), (c, d) = places[name], far[name]
            raw[a:b] = theirs[c:d]
            yield raw
        else:
            yield bytearray(chance.choice((stranger, os.urandom(64), b"", good[8:], json.dumps(header).encode())))


def check(model, kind, whole, path, count, seed):
    """Refused, or the very same cache; the share of files refused among those that differ from the good one at all."""
    refused = differing = 0
    good = path.with_name("good")
    good.write_bytes(whole[0])
    want = [layer.materialize() for layer in restore(model, good, kind)[0].memory_layers()]
    for _, raw in zip(range(count), damages(whole, seed), strict=False):
        path.write_bytes(raw)
        differing += raw != whole[0]  # tensors that change places may be alike
        try:
            got, ids = restore(model, path, kind)
        except longwave.SavedCacheError as error:
            refused += str(path) in str(error)
            continue
        assert torch.equal(ids, tokens(1, LENGTH))
        for ours, theirs in zip(got.memory_layers(), want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.materialize(), theirs, strict=True))
    assert differing > 0.9 * count
    return refused / differing


def test_damaged_files(model, kind, whole, tmp_path):
    assert check(model, kind, whole, tmp_path / "bad", 400, 1) > 0.99


@pytest.mark.slow
def test_ten_thousand_damaged_files(model, kind, whole, tmp_path):
    assert check(model, kind, whole, tmp_path / "bad", 5000, 2) > 0.99


def test_a_damaged_piece_names_its_tokens(model, whole, kind, tmp_path):
    _, _, places = parts(whole[0])
    said = {
        "exact": {
            "layers.1.store.pages": r"layer 1 \(store.pages\), of tokens 0 to 171",
            "plan.0": "plan of its method",
        },
        "coded": {
            "rows.0.segments.1": "tokens 20 to 35 of row 0",
            "rows.0.v.kept": r"first and last tokens of row 0 \(V\)",
        },
    }
    for name, words in {**said[kind], "ids": "the token ids"}.items():
        raw = bytearray(whole[0])
        raw[places[name][0] + 3] ^= 1
        (tmp_path / "bad").write_bytes(raw)
        with pytest.raises(longwave.SavedCacheError, match=f"damaged in .*{words}"):
            restore(model, tmp_path / "bad", kind)
        with pytest.raises(longwave.SavedCacheError, match=words):
            look(tmp_path / "bad")
        assert look(tmp_path / "bad", whole=False).tokens == LENGTH


def test_a_cut_file_says_where(model, whole, kind, tmp_path):
    _, _, places = parts(whole[0])
    name = "layers.2.dense.k" if kind == "exact" else "rows.0.segments.2"
    (tmp_path / "cut").write_bytes(whole[0][: places[name][0] + 5])
    with pytest.raises(longwave.SavedCacheError, match=r"is cut: .* are there, and (layer 2|tokens 36 to 43)"):
        restore(model, tmp_path / "cut", kind)


def test_another_version(model, whole, kind, tmp_path):
    header, start, _ = parts(whole[0])
    header["__metadata__"]["version"] = "7"
    (tmp_path / "new").write_bytes(rebuilt(header, whole[0][start:]))
    with pytest.raises(longwave.SavedCacheError, match="format '7', and this longwave reads 2"):
        restore(model, tmp_path / "new", kind)


def test_foreign_files(model, tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, tmp_path / "weights")
    (tmp_path / "text").write_text("Once upon a time there was a file. " * 9)
    for name in ("weights", "text"):
        with pytest.raises(longwave.SavedCacheError, match="is not a saved cache"):
            longwave.restore(model, tmp_path / name)
    with pytest.raises(OSError, match="absent"):
        longwave.restore(model, tmp_path / "absent")


def test_other_models(model, other, whole, kind, tmp_path):
    """Weights that make neither K nor V count as well: hidden states are theirs, too."""
    (tmp_path / "a").write_bytes(whole[0])
    for stranger, words in (
        (other, "its weights were others"),
        (build("qwen3"), "its model_type was llama"),
        (build("llama", torch.bfloat16), "in the same type"),
    ):
        with pytest.raises(longwave.SavedCacheError, match=f"another model.*{words}"):
            restore(stranger, tmp_path / "a", kind)


def test_a_method_that_is_not_known_here(model, tmp_path, monkeypatch):
    from longwave.saved import binding

    path = write(model, tmp_path / "a", "exact")
    monkeypatch.setattr(binding, "_below", lambda cls: iter(()))
    with pytest.raises(longwave.SavedCacheError, match=r"longwave\.methods\.fourier\.FourierBound is not known here"):
        longwave.restore(model, path)


# the disk


def test_a_full_disk_leaves_the_old_file(model, kind, tmp_path, monkeypatch):
    path = write(model, tmp_path / "a", kind)
    before = path.read_bytes()
    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(container.os, broken, full)
            with pytest.raises(OSError, match="No space left"):
                write(model, path, kind, 2)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
    real, written = container.os.fdopen, []

    class Full:
        """A file whose disk is full after some writes."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            written.append(len(data))
            if len(written) > 4:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    monkeypatch.setattr(container.os, "fdopen", lambda *given: Full(real(*given)))
    with pytest.raises(OSError, match="No space left"):
        write(model, path, kind, 2)
    assert len(written) == 5
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_folder(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write(model, tmp_path / "no" / "a", "exact")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write(model, tmp_path, "exact")


def _again_and_again(path, value):
    for _ in range(30):
        container.write(path, {"who": value}, {"x": torch.full((1 << 14,), value)})


def test_two_processes_write_one_path(tmp_path):
    path = tmp_path / "a"
    _again_and_again(path, 0)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_again_and_again, args=(path, value)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers) or not seen:
        with open(path, "rb") as file:
            reader = container.Reader(file, path, lambda name, facts: name)
            assert bool((reader.tensor("x") == reader.facts["who"]).all())
            seen.add(reader.facts["who"])
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", container.TYPES.values(), ids=container.TYPES)
def test_every_type_comes_back(dtype, tmp_path):
    made = {
        "some": (torch.rand(3, 5) * 9 - 4).to(dtype),
        "turned": (torch.rand(3, 5) * 9 - 4).to(dtype).T,
        "none": torch.zeros(0, 4, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    container.write(tmp_path / "a", {}, made)
    with open(tmp_path / "a", "rb") as file:
        found = container.Reader(file, tmp_path / "a", lambda name, facts: name).tensors()
    for name, x in made.items():
        assert torch.equal(found[name], x)
        assert (found[name].shape, found[name].dtype) == (x.shape, x.dtype)
        assert found[name].untyped_storage().nbytes() == x.nbytes
