"""Tokens that lie in a file or in host memory are those of a buffer, and the file is as long as they are."""

import copy
import errno
import os
import pickle

import pytest
import torch

from longwave.frame import storage_bytes
from longwave.store.mapped import MappedTokens
from longwave.store.tokens import TokenBuffer, capacity

COLUMNS = {"mass": torch.float32}


@pytest.fixture(params=["memory", "file"])
def where(request, tmp_path):
    return None if request.param == "memory" else str(tmp_path)


def both(where, batch=2):
    return TokenBuffer(batch, COLUMNS), MappedTokens(batch, COLUMNS, where)


def add(buffers, tokens, valid=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, len(buffers[0].lengths), 3, tokens, 8, generator=g).bfloat16()
    mass = torch.rand(k.shape[0], 1, tokens, generator=g)
    for buffer in buffers:
        buffer.append(k, v, valid, {"mass": mass})
        buffer.fit()


def held(buffer):
    return [*buffer.tensors(), *buffer.columns.values()]


def check(plain, mapped):
    assert mapped.lengths == plain.lengths
    for want, got in zip(held(plain), held(mapped), strict=True):
        assert torch.equal(want, got)
        assert storage_bytes([got]) == storage_bytes([want])
    assert [os.fstat(file.file).st_size for file in mapped.files.values()] == [storage_bytes([x]) for x in held(plain)]


def test_it_holds_what_a_buffer_holds(where):
    buffers = both(where)
    for seed, tokens in enumerate((90, 1, 1, 200)):
        add(buffers, tokens, seed=seed)
        check(*buffers)
    add(buffers, 30, torch.arange(30) >= torch.tensor([[4], [29]]), seed=5)
    add(buffers, 1, seed=6)
    check(*buffers)
    for buffer in buffers:
        buffer.crop([150, 3])
    check(*buffers)
    add(buffers, 70, seed=7)
    for buffer in buffers:
        buffer.select(torch.tensor([1, 1, 0]))
    check(*buffers)
    for buffer in buffers:
        buffer.crop(list(buffer.lengths))
    check(*buffers)
    add(buffers, 3, seed=8)
    check(*buffers)


def test_padding_first(where):
    buffers = both(where)
    add(buffers, 40, torch.arange(40) >= torch.tensor([[0], [33]]))
    check(*buffers)


def test_what_lies_there_is_not_copied_when_it_grows(where, monkeypatch):
    plain, mapped = both(where)
    add((plain, mapped), 64)
    monkeypatch.setattr(TokenBuffer, "_copy", None)
    add((mapped,), 1)
    assert torch.equal(mapped.k[:, :, :64], plain.k)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_a_copy_has_files_of_its_own(where, again):
    plain, mapped = both(where)
    add((plain, mapped), 70)
    other = again(mapped)
    add((mapped,), 9, seed=1)
    check(plain, other)
    add((plain, other), 80, seed=2)
    check(plain, other)


def test_under_inference_mode_and_outside(where):
    buffers = both(where)
    with torch.inference_mode():
        add(buffers, 30)
    add(buffers, 2, seed=1)
    check(*buffers)


def test_no_name_is_left(tmp_path):
    mapped = MappedTokens(1, where=str(tmp_path))
    mapped.append(*torch.zeros(2, 1, 2, 5, 4), None)
    assert list(tmp_path.iterdir()) == []


def test_without_room_all_is_as_it_was(where, monkeypatch):
    plain, mapped = both(where)
    add((plain, mapped), 60)

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    more = 2 * 3 * 2 * 8 * (capacity(160) - capacity(60))
    with pytest.raises(OSError, match=rf"{where or 'host memory'} has no room for {more:,} bytes .*No space left"):
        mapped.append(*torch.zeros(2, 2, 3, 100, 8).bfloat16(), None)
    check(plain, mapped)


def test_the_system_is_told_which_keys_are_read_soon(where, monkeypatch):
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system reads nothing ahead when it is asked to")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: asked.append(given))
    monkeypatch.setattr("longwave.store.mapped.STEP", 1000)
    plain, mapped = both(where)
    add([plain, mapped], 90)
    mapped.expect(70)
    size = 70 * 2 * 3 * 8 * 2  # bytes: tokens, rows, heads, channels
    keys = mapped.files["k"].file
    expected = [(keys, start, 1000, os.POSIX_FADV_WILLNEED) for start in range(0, size, 1000)]
    assert asked == (expected if where else [])  # host memory is there
