"""Steps of every method that can be stepped: layers that evict at every step, that choose what they read, and that
differ from each other. The same tokens and the same cache afterwards as by transformers' own loop.
"""

import copy
import functools
import operator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import longwave
from longwave.decode import StaticDecoder, supports
from longwave.frame import MemoryLayer, assemble
from longwave.methods.base import Bound, Method
from tests.conftest import build, into, left_padded, tokens
from tests.decode.test_steps import Played
from tests.frame.spy import Spy, Truth
from tests.matrix import ENDS, LOSSY, Often
from tests.reading import check_state, positions_of, read, read_in, state_of

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
LENGTH, NEW = 40, 40
PADS = {"alike": [0, 0], "ragged": [0, 3, 11, 38]}  # the last row has yet to fill sinks and window


@dataclass(frozen=True)
class Mixed(Method):
    """Layers by turns of several methods."""

    name: ClassVar[str] = "mixed"
    methods: tuple = ()
    budgets: tuple = ()

    def bind(self, shape, profile, budget):
        pairs = zip(self.methods, self.budgets, strict=True)
        return MixedBound(self, shape, inner=tuple(method.bind(shape, None, one) for method, one in pairs))


@dataclass(frozen=True, eq=False)
class MixedBound(Bound):
    inner: tuple = ()

    @property
    def needs(self):
        return functools.reduce(operator.or_, (bound.needs for bound in self.inner))

    def layer(self, index):
        return self.inner[index % len(self.inner)].layer(index)

    def layer_bytes(self, index, tokens):
        return self.inner[index % len(self.inner)].layer_bytes(index, tokens)


def mixed(*pairs):
    methods, budgets = zip(*pairs, strict=True)
    return lambda model: longwave.cache(model, Mixed(methods=methods, budgets=budgets))


DENSE = (longwave.Dense(), None)
UNSTEPPED = {"fourier-paper", "sirllm", "sirllm-slots", "longcache-pages", "longcache-mapped"}
STEPPED = {name: make for name, make in LOSSY.items() if name not in UNSTEPPED}
MIXED = {
    "dense and h2o": mixed(DENSE, (longwave.H2O(**ENDS), 0.3)),
    "h2o and dense": mixed((longwave.H2O(**ENDS), 0.3), DENSE),
    "two budgets": mixed((longwave.H2O(**ENDS), 0.5), (longwave.H2O(**ENDS), 0.2)),
    "chosen, pages, dense": mixed((Often(**ENDS), 0.3), (longwave.Kivi(bits=4, group=8, **ENDS), None), DENSE),
    "two segments": mixed(
        (longwave.Kivi(bits=4, group=16, **ENDS), None), (longwave.Kivi(bits=4, group=8, **ENDS), None)
    ),
    "slots, quest": mixed(
        (longwave.Streaming(tokens=24, positions="slots", **ENDS), None),
        (longwave.Quest(full_layers=0, chunk=4, **ENDS), 0.3),
    ),
}
EVERY = STEPPED | MIXED


@pytest.fixture(scope="module")
def pair():
    """float64: rounding decides nothing. (The model, its twin that attends eagerly.)"""
    model = build("llama", torch.float64)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return model, eager


@pytest.fixture
def model(pair):
    return pair[0]


@pytest.fixture(params=list(EVERY))
def make(request):
    return EVERY[request.param]


def both(model, make, pads, **options):
    """(tokens, cache) of transformers' loop and of ours."""
    ids, mask = left_padded(len(pads), LENGTH, pads)
    options = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False) | options
    found = []
    for loop in (model.generate, lambda *a, **k: longwave.generate(model, *a, **k)):
        memory = make(model)
        found.append((loop(ids, **into(memory), **options), memory))
    return found


def check_same(ours, theirs):
    check_state(state_of(ours), state_of(theirs), rtol=1e-6, atol=1e-6)
    assert ours.nbytes == theirs.nbytes
    for layer in ours.memory_layers():  # what stands behind a row's end is nothing again
        for name, held in {"k": layer.dense.k, "v": layer.dense.v, **layer.dense.columns}.items():
            for row, length in enumerate(layer.dense.lengths):
                assert not held[row, :, length:].any(), name


def test_what_cannot_be_stepped_says_so(model):
    for name, make in LOSSY.items():
        assert (supports(model, make(model)) is None) == (name in STEPPED), name
    pages = longwave.H2O(store=longwave.Kivi(bits=4, group=8), **ENDS)
    assert "takes part" not in (supports(model, longwave.cache(model, "h2o", 0.3)) or "")
    assert "pages take part in the attention" in supports(model, longwave.cache(model, pages, budget=0.06))
    far = longwave.Quest(host=True).bind(longwave.cache(model, "quest").method.shape, None, 0.3)  # refused on a CPU
    assert "host memory" in supports(model, assemble(model, far.layer, far.needs, far))


@pytest.mark.parametrize(
    "pads", [pytest.param(PADS["alike"], id="alike", marks=pytest.mark.slow), pytest.param(PADS["ragged"], id="ragged")]
)
def test_tokens_and_cache_are_those_of_transformers_loop(model, make, pads):
    (want, theirs), (got, ours) = both(model, make, pads)
    assert len(set(want[:, LENGTH:].flatten().tolist())) > 5
    assert torch.equal(got, want)
    check_same(ours, theirs)


def test_a_replayed_step_reads_nothing_of_python(model, make, monkeypatch):
    """One step recorded, replayed over evictions and borders of segments: what a captured graph does."""
    monkeypatch.setenv("LONGWAVE_KERNELS", "reference")
    monkeypatch.setattr(longwave.MemoryLayer, "check_finite", lambda *_: None)
    (want, theirs), _ = both(model, make, PADS["ragged"])
    monkeypatch.setattr(longwave.decode.steps, "Graph", Played)
    monkeypatch.setattr(StaticDecoder, "captures", property(lambda _: True, lambda *_: None), raising=False)
    _, (got, ours) = both(model, make, PADS["ragged"])
    assert torch.equal(got, want)
    check_same(ours, theirs)


def test_steps_and_passes_by_turns(model, make):
    """A decoder takes over in the middle, hands back between two borders, and again: logits are those of passes."""
    ids, mask = left_padded(3, LENGTH + 60, PADS["ragged"][:3])
    memory, other = make(model), make(model)
    found, wanted = [], []
    end = LENGTH
    for cache, logits in ((memory, found), (other, wanted)):
        logits.append(read(model, cache, ids[:, :end], mask))
    for kind, size in (("steps", 5), ("passes", 3), ("steps", 13), ("chunk", 5), ("steps", 1), ("steps", 20)):
        if kind == "steps":
            positions = positions_of(mask[:, : end + 1], 1)
            with StaticDecoder(model, memory, new_tokens=size + 7, positions=positions) as decoder:
                found.append(torch.stack([decoder.step(ids[:, end + i]).clone() for i in range(size)], 1))
        else:
            sizes = (size,) if kind == "chunk" else (1,) * size
            found.append(read_in(model, memory, ids, sizes, mask))
        sizes = (size,) if kind == "chunk" else (1,) * size
        wanted.append(read_in(model, other, ids, sizes, mask))
        end += size
        check_same(memory, other)
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(wanted, 1), rtol=1e-6, atol=1e-6)


def test_the_cache_goes_on_in_rows_and_copies(model, make):
    (ids, theirs), (_, ours) = both(model, make, [0, 9])
    rows = torch.tensor([1, 0, 1])
    mask = torch.cat([left_padded(2, LENGTH, [0, 9])[1], torch.ones(2, NEW + 4, dtype=torch.long)], 1)[rows]
    ids = torch.cat([ids, tokens(2, 4, seed=9)], 1)[rows]
    for memory in (ours, theirs):
        memory.reorder_cache(rows)
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    want = model.generate(ids, **into(theirs), **options)
    assert torch.equal(longwave.generate(model, ids, **into(copy.deepcopy(ours)), **options), want)
    assert torch.equal(longwave.generate(model, ids, **into(ours), **options), want)
    check_same(ours, theirs)


def test_storage_lasts_and_stays(model, make):
    """Nothing is reserved beyond what may be held, and no address that a graph knows changes."""
    memory = make(model)
    read(model, memory, tokens(2, LENGTH))
    with StaticDecoder(model, memory, new_tokens=NEW) as decoder:
        where, held = decoder._addresses(), memory.nbytes
        for _ in range(NEW):
            decoder.step(tokens(2, 1))
            assert memory.nbytes == held
        assert decoder._addresses() == where
    assert memory.get_seq_length() == LENGTH + NEW


def test_the_device_counts_as_the_host_does(model, make):
    ids, mask = left_padded(3, LENGTH + NEW, PADS["ragged"][:3])
    memory = make(model)
    read(model, memory, ids[:, :LENGTH], mask)
    with StaticDecoder(model, memory, new_tokens=NEW) as decoder:
        for column in range(LENGTH, LENGTH + NEW):
            decoder.step(ids[:, column])
            for gang in decoder._gangs:
                gang.tell()
            for place, layer in enumerate(decoder._layers):
                assert decoder._at[place].tolist() == layer.dense.lengths
                assert decoder._seen[place, :, 0].tolist() == [n + 1 for n in layer.dense.lengths]
                assert decoder._counts[place].tolist() == layer.page_counts()
            assert decoder._total.tolist() == memory.layers[0].rows


def test_layers_that_hold_alike_are_counted_once(model):
    def gangs(make):
        memory = make(model)
        read(model, memory, tokens(1, LENGTH))
        with StaticDecoder(model, memory, new_tokens=1) as decoder:
            return sorted(sorted(layer.index for layer in gang.layers) for gang in decoder._gangs)

    assert gangs(LOSSY["kivi"]) == [[0, 1, 2]]
    assert gangs(LOSSY["quest"]) == [[0, 1, 2]]
    assert gangs(MIXED["chosen, pages, dense"]) == [[0], [1], [2]]
    assert gangs(MIXED["two segments"]) in ([[0, 2], [1]], [[0, 1, 2]])


def test_the_layer_that_keeps_everything_is_not_disturbed(pair):
    """Beside one that evicts: what the first layer sees depends on the tokens alone."""
    model, eager = pair
    ids = tokens(1, LENGTH + 20)
    memory = mixed((Spy(queries=4, mass=True), None), (longwave.H2O(**ENDS), 0.3))(model)
    assert type(memory.layers[1]) is not MemoryLayer
    read(model, memory, ids[:, :LENGTH])
    with StaticDecoder(model, memory, new_tokens=20) as decoder:
        for column in range(LENGTH, LENGTH + 20):
            decoder.step(ids[:, column])
    truth, layer = Truth(eager, ids[0]), memory.layers[0]
    torch.testing.assert_close(layer.queries.q[0], truth.q[0][:, -4:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.dense.column("mass")[0], truth.mass(0).float(), rtol=1e-5, atol=1e-5)
    assert memory.layers[1].dense.lengths == [memory.method.inner[1].limit(LENGTH + 20)]


def test_steps_over_what_was_filled_in_inference_mode(model, make):
    ids, mask = left_padded(2, LENGTH + 20, [0, 9])
    memory, other = make(model), make(model)
    with torch.inference_mode():
        read_in(model, memory, ids, (LENGTH, 1), mask)
    read_in(model, other, ids, (LENGTH, 1), mask)
    positions = positions_of(mask[:, : LENGTH + 2], 1)
    with StaticDecoder(model, memory, new_tokens=19, positions=positions) as decoder:
        for column in range(LENGTH + 1, LENGTH + 20):
            decoder.step(ids[:, column])
    read_in(model, other, ids, (1,) * 19, mask)
    check_same(memory, other)


def test_a_warm_up_leaves_no_trace(model, make, monkeypatch):
    """Steps that only warm up write and observe, and are put back: as if they had never been."""
    monkeypatch.setenv("LONGWAVE_KERNELS", "reference")
    memory = make(model)
    ids = tokens(2, LENGTH + 2)
    read(model, memory, ids[:, :LENGTH])
    other = copy.deepcopy(memory)

    class Warm:
        def __init__(self, run, states, live):
            before = [state.clone() for state in states]
            for _ in range(3):
                run()
                for state, was in zip(states, before, strict=True):
                    state.copy_(was)
            self.run = run

        def replay(self):
            self.logits = self.run()

    monkeypatch.setattr(longwave.decode.steps, "Graph", Warm)
    with StaticDecoder(model, memory, new_tokens=2) as decoder:
        decoder.captures = True
        found = [decoder.step(ids[:, LENGTH + i]) for i in range(2)]
    wanted = read_in(model, other, ids, (1, 1))
    torch.testing.assert_close(torch.stack(found, 1), wanted, rtol=1e-6, atol=1e-6)
    check_same(memory, other)
