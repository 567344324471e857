"""Methods that keep everything, with keys and values in host memory and in mapped files: what is read, and bytes."""

import copy
from dataclasses import replace

import pytest
import torch

import longwave
from longwave import build, methods
from longwave.methods import longcache
from longwave.ops import select
from longwave.ops.pieces import Coming
from tests.conftest import left_padded, tokens
from tests.reading import read_in

METHODS = {
    "longcache": longwave.ReAttention(sinks=2, window=9, top=2, spans=3, span=4, chunk=8),
    "infllm": longwave.InfLLM(sinks=2, window=13, block=4, blocks=2, representatives=2, chunk=8, cached=1),
    "actqkv": longwave.ActQKV(sinks=2, window=13, block=4, blocks=2, representatives=2, chunk=8, cached=1, warm=2),
    "longheads": longwave.LongHeads(chunk=10, chunks=3),
    "quest": longwave.Quest(full_layers=1, chunk=4, sinks=2, window=8),
}


@pytest.fixture(params=list(METHODS))
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=["memory", "files"])
def host(request, tmp_path, monkeypatch):
    """Where keys and values lie, of a model that is in host memory too."""
    if request.param == "files":
        return str(tmp_path)
    monkeypatch.setattr(methods.host, "check_host", lambda host, device: None)
    return True


def test_the_same_is_read(llama, method, host):
    ids, mask = left_padded(3, 130, [0, 11, 80])
    near, far = longwave.cache(llama, method), longwave.cache(llama, replace(method, host=host))
    for sizes in ((60, 1, 1, 9), (1,) * 12, (20,)):
        assert torch.equal(*(read_in(llama, memory, ids, sizes, mask) for memory in (near, far)))
    for memory in (near, far):
        memory.batch_select_indices(torch.tensor([2, 0]))
        memory.crop(-7)
    kept = copy.deepcopy(far)
    ids, mask = ids[[2, 0]], mask[[2, 0]]
    want = read_in(llama, near, ids, (5, 1, 1), mask)
    assert torch.equal(read_in(llama, far, ids, (5, 1, 1), mask), want)
    assert torch.equal(read_in(llama, kept, ids, (5, 1, 1), mask), want)


@pytest.mark.parametrize("piece", [16, 1 << 16])
def test_the_next_layers_keys_are_asked_for_before_it_is_reached(llama, host, monkeypatch, piece):
    """As on a GPU: what is fetched while a layer computes is what the next one scores, without what comes with the
    pass."""
    monkeypatch.setattr(select, "PIECE", piece)
    monkeypatch.setattr(longcache, "fetched", lambda x, device: True)
    near, far = (longwave.cache(llama, replace(METHODS["longcache"], host=where)) for where in (False, host))
    events, layer = [], longcache.ReAttentionLayer
    expect, stored_keys = layer.expect, layer.stored_keys

    def asked(self):
        expect(self)
        if self._coming is not None:
            events.append(("asked", self.index, self._coming.key.shape[2]))

    def scored(self, tokens):
        found = stored_keys(self, tokens)
        if self.bound is far.method:
            events.append(("coming" if isinstance(found, Coming) else "stored", self.index, tokens))
        return found

    monkeypatch.setattr(layer, "expect", asked)
    monkeypatch.setattr(layer, "stored_keys", scored)
    ids, mask = left_padded(2, 130, [0, 60])
    sizes = (70, 20, 1, 1, 9)
    assert torch.equal(*(read_in(llama, memory, ids, sizes, mask) for memory in (near, far)))
    last = far.method.shape.memory_layers[-1]
    assert {index for what, index, _ in events if what == "coming"} == set(range(1, last + 1))
    for n, (what, index, _) in enumerate(events):
        if what == "asked":
            assert events[n + 1][:2] == ("coming", index)
    rest = (10, 30, 31, 32)  # what the shorter row had before each pass
    assert {number for what, _, number in events if what == "asked"} == {min(piece, held) for held in rest}
    assert torch.equal(*(read_in(llama, copy.deepcopy(memory), ids, (7,), mask) for memory in (near, far)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nothing is fetched to a CPU")
@pytest.mark.parametrize("piece", [16, 1 << 16])
@pytest.mark.parametrize("pads", [[0, 0], [0, 60]], ids=["even", "padded"])
def test_a_gpu_reads_the_same_from_host_memory(llama, method, monkeypatch, piece, pads):
    monkeypatch.setattr(select, "PIECE", piece)
    model = copy.deepcopy(llama).cuda()
    ids, mask = (x.cuda() for x in left_padded(2, 130, pads))
    near, far = (longwave.cache(model, replace(method, host=host)) for host in (False, True))
    want, got = (read_in(model, memory, ids, (70, 20, 1, 1, 9), mask) for memory in (near, far))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert far.report().host
    assert not near.report().host


def test_bytes_are_told_apart(llama, method, host):
    near, far = longwave.cache(llama, method), longwave.cache(llama, replace(method, host=host))
    for memory in (near, far):
        read_in(llama, memory, tokens(2, 200), (150, 50))
        assert memory.nbytes == memory.method.nbytes(200, 2)
    near, far = near.report(), far.report()
    name = "mapped files" if isinstance(host, str) else "host memory"
    assert far.parts[name] == near.parts["dense"]
    assert far.mapped == (near.parts["dense"] + near.parts.get("columns", 0) if isinstance(host, str) else 0)
    assert (near.mapped, near.device) == (0, near.nbytes)
    assert far.device == far.nbytes - far.mapped
    assert (f"{far.mapped:,} of the bytes in mapped files" in str(far)) == isinstance(host, str)
    assert name in far.method


def test_a_size_is_one_of_the_device(llama, method, tmp_path):
    """What fits stays there; what does not lies elsewhere; and what cannot lie elsewhere is counted to the byte."""
    far = replace(method, host=str(tmp_path))
    shape = longwave.cache(llama, method).method.shape
    whole, least = method.bind(shape, None, None).nbytes(400, 2), far.bind(shape, None, None).device_bytes(400, 2)
    assert least < whole
    for size, where in ((whole, False), (whole - 1, str(tmp_path)), (least, str(tmp_path))):
        memory = longwave.cache(llama, far, f"{size}B", max_tokens=400, batch=2)
        assert memory.method.method.host == where
        read_in(llama, memory, tokens(2, 400), (300, 100))
        brought = 2 * memory.method.brings(400) if where else 0
        assert memory.report().device + brought == (least if where else whole)
    with pytest.raises(ValueError, match=rf"takes .* \({least} bytes\), and its options leave nothing to save"):
        longwave.cache(llama, far, f"{least - 1}B", max_tokens=400, batch=2)


def test_what_is_coming_decides_where_it_lies(llama, tmp_path):
    method = replace(METHODS["longcache"], host=str(tmp_path))
    size = method.near().bind(longwave.cache(llama, method).method.shape, None, None).nbytes(250)
    memory = longwave.cache(llama, method, f"{size}B")  # too little for the model's window
    for coming, where in ((250, False), (400, str(tmp_path)), (100, False)):
        build.expect(llama, memory, coming)
        assert memory.method.method.host == where


def test_steps_are_not_captured(llama, method, host):
    memory = longwave.cache(llama, replace(method, host=host))
    assert next(memory.memory_layers()).unsteady().startswith("keys and values lie in ")


def test_what_is_refused(llama, method, tmp_path):
    with pytest.raises(ValueError, match=r"host=True moves keys .* this model is on the CPU already"):
        longwave.cache(llama, replace(method, host=True))
    with pytest.raises(ValueError, match="nowhere' is to hold files of keys and values, and is no directory"):
        longwave.cache(llama, replace(method, host=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="host is True, False or a directory for files of keys and values, got 7"):
        replace(method, host=7)
    if method.name == "quest":  # its budget says how much is read
        return
    with pytest.raises(ValueError, match=r"leave budget=1 or host=.* out"):
        longwave.cache(llama, replace(method, host=str(tmp_path)), 1.0)
