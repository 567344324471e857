"""park and wake: everything in host memory and back, and nothing in between."""

import copy
import pickle

import pytest
import torch

import longwave
from longwave.frame import parked
from tests.conftest import build, into, left_padded, tokens
from tests.matrix import LOSSY
from tests.reading import check_state, read, state_of


@pytest.fixture(scope="module")
def made():
    return {kind: build(kind) for kind in ("llama", "gemma3", "qwen3next")}


@pytest.fixture(params=["llama", "gemma3", "qwen3next"])
def model(request, made):
    return made[request.param]


@pytest.fixture(params=[*LOSSY, "dense"])
def make(request):
    return LOSSY.get(request.param, lambda model: longwave.cache(model, "dense"))


def filled(model, make):
    memory = make(model)
    ids, mask = left_padded(2, 90, [0, 13])
    read(model, memory, ids[:, :60], mask)
    return memory, ids, mask


def test_there_and_back(model, make):
    memory, ids, mask = filled(model, make)
    before, held, twin = state_of(memory), memory.report(), copy.deepcopy(memory)
    memory.park()
    memory.park()  # says nothing the second time
    report = memory.report()
    assert (report.nbytes, report.host + report.mapped, report.tokens) == (held.nbytes, held.nbytes, 60)
    assert report.mapped == held.mapped  # what lies in files stays there
    assert not report.host or f"{report.host:,} of the bytes in host memory" in str(report)
    memory.wake()
    memory.wake()
    assert memory.report().host == 0
    check_state(state_of(memory), before)
    assert torch.equal(read(model, memory, ids, mask), read(model, twin, ids, mask))


def test_parked_it_takes_nothing(model, make):
    memory, ids, mask = filled(model, make)
    memory.park()
    layer = next(memory.memory_layers())
    for use in (
        lambda: read(model, memory, ids, mask),
        lambda: model.generate(ids, attention_mask=mask, **into(memory), max_new_tokens=2),
        lambda: longwave.StaticDecoder(model, memory, new_tokens=2),
        lambda: memory.crop(-1),
        lambda: memory.reorder_cache(torch.tensor([1, 0])),
        layer.materialize,
        layer.offload,
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"parked in host memory|cannot decode in steps"):
            use()
    memory.wake()
    assert torch.isfinite(read(model, memory, ids, mask)).all()


def test_copies_of_a_parked_cache(made):
    model = made["llama"]
    memory, ids, mask = filled(model, LOSSY["fourier"])
    memory.park()
    twins = [copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))]
    memory.reset()
    assert memory.get_seq_length() == 0
    fresh = filled(model, LOSSY["fourier"])[0]
    want = read(model, fresh, ids, mask)
    for twin in twins:
        twin.wake()
        assert torch.equal(read(model, twin, ids, mask), want)
    read(model, memory, ids, mask)  # it was reset


class Fails:
    """A function that fails at its call number `at`, once."""

    def __init__(self, real, at):
        self.real, self.left = real, at

    def __call__(self, *given):
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no room")
        return self.real(*given)


@pytest.mark.parametrize("way", ["park", "wake"])
@pytest.mark.parametrize("when", ["moving", "exchanging"])
def test_nothing_is_lost_when_it_fails(model, make, way, when, monkeypatch):
    """On the way to the last layer, while copies are made, or while layers take them."""
    memory, ids, mask = filled(model, make)
    twin = copy.deepcopy(memory)
    if way == "wake":
        memory.park()
    held = memory.report()
    layers = list(memory.memory_layers())
    with monkeypatch.context() as patch:
        if when == "moving":
            patch.setattr(parked, "_moved", Fails(parked._moved, len(memory.layers)))
        else:
            patch.setattr(layers[-1], "load_state", Fails(layers[-1].load_state, 1))
        with pytest.raises(MemoryError):
            getattr(memory, way)()
    assert memory.report() == held  # the same bytes in the same place
    memory.wake()
    assert torch.equal(read(model, memory, ids, mask), read(model, twin, ids, mask))


def test_an_empty_cache(made):
    memory = longwave.cache(made["llama"], longwave.Streaming(), 0.5)
    memory.park()
    memory.wake()
    assert torch.isfinite(read(made["llama"], memory, tokens(1, 9))).all()
