"""A cache that was saved exactly goes on as the one that it was saved from, bit for bit."""

import pytest
import torch

import longwave
from longwave.frame import storage_bytes
from tests.coder import Raw
from tests.conftest import build, into, left_padded, random_profile, tokens
from tests.evals.hybrids import hybrid
from tests.matrix import IDENTITY, LOSSY
from tests.reading import check_state, read, read_in, state_of

METHODS = {**{f"whole-{name}": make for name, make in IDENTITY.items()}, **LOSSY}
KINDS = ["llama", "gemma3", "qwen3next"]


@pytest.fixture(scope="module")
def made():
    return {kind: build(kind) for kind in KINDS}


@pytest.fixture(params=list(METHODS))
def make(request):
    return METHODS[request.param]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.lw"


def bytes_of(memory):
    return [storage_bytes([x for part in layer.parts().values() for x in part]) for layer in memory.memory_layers()]


@pytest.mark.parametrize(
    ("kind", "pads"),
    [
        pytest.param("llama", [0, 0], id="even", marks=pytest.mark.slow),
        pytest.param("llama", [0, 13], id="llama"),
        pytest.param("gemma3", [0, 13], id="gemma3", marks=pytest.mark.slow),
        pytest.param("qwen3next", [0, 13], id="qwen3next"),
    ],
)
def test_it_goes_on_as_it_was(made, kind, make, pads, path):
    model, memory = made[kind], make(made[kind])
    ids, mask = left_padded(2, 90, pads)
    read_in(model, memory, ids, (50, 1, 1, 7, 1), mask)  # in the middle of a conversation
    before = state_of(memory)
    size = longwave.save(memory, ids[:, :60], path, exact=True)
    assert size == path.stat().st_size
    twin, kept = longwave.restore(model, path)
    check_state(state_of(twin), before)
    check_state(state_of(memory), before)  # which saving left alone
    assert bytes_of(twin) == bytes_of(memory)
    assert (twin.method, str(twin.method)) == (memory.method, str(memory.method))
    assert torch.equal(kept, ids[:, :60])
    assert torch.equal(twin.mask(), mask[:, :60].bool())
    for sizes in ((1,) * 12, (9,), (1,) * 9):
        assert torch.equal(read_in(model, twin, ids, sizes, mask), read_in(model, memory, ids, sizes, mask))


@pytest.mark.parametrize("kind", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_greedy_continuation(made, kind, make, path):
    model, memory = made[kind], make(made[kind])
    first = model.generate(tokens(2, 50), **into(memory), max_new_tokens=6, do_sample=False)
    longwave.save(memory, first, path, exact=True)  # the last token is not read yet
    twin, ids = longwave.restore(model, path)
    assert torch.equal(ids, first)
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(first)}
    assert torch.equal(model.generate(ids, **into(twin), **options), model.generate(first, **into(memory), **options))


def test_rows_move_and_the_past_goes_back(made, make, path):
    """What a restored cache counts is as good as what it holds: rows, crops, and a guess that waits for its crop."""
    model, memory = made["llama"], make(made["llama"])
    ids = tokens(2, 80)
    read(model, memory, ids[:, :60])
    memory.activate_past_recording()
    read(model, memory, ids[:, :66])
    longwave.save(memory, ids[:, :66], path, exact=True)
    twin, _ = longwave.restore(model, path)
    for held in (memory, twin):
        held.crop(-4)
        held.reorder_cache(torch.tensor([1, 0]))
    check_state(state_of(twin), state_of(memory))
    ids = ids[[1, 0]]
    assert torch.equal(read(model, twin, ids[:, : 62 + 3]), read(model, memory, ids[:, : 62 + 3]))


def test_a_size_still_bounds_it(made, path):
    model = made["llama"]
    memory = longwave.cache(model, longwave.Kivi(group=8, window=8), "45KB", max_tokens=70, batch=1)
    ids = tokens(1, 80)
    read(model, memory, ids[:, :60])
    longwave.save(memory, ids[:, :60], path, exact=True)
    twin, _ = longwave.restore(model, path)
    assert twin.method == memory.method
    with pytest.raises(ValueError, match="computed for 70 tokens"):
        read(model, twin, ids)


def goes_on(model, memory, ids, path):
    """A cache that has read 60 of the ids, saved and restored, says of the rest what it says itself."""
    longwave.save(memory, ids[:, :60], path, exact=True)
    twin, _ = longwave.restore(model, path)
    assert torch.equal(read(model, twin, ids), read(model, memory, ids))


def test_types_of_16_bits(path):
    model = build("llama", torch.bfloat16)
    memory = longwave.cache(model, longwave.Fourier(segment=8, window=8), 0.5, random_profile(model))
    ids = tokens(1, 70)
    read(model, memory, ids[:, :60])
    goes_on(model, memory, ids, path)


def test_read_under_inference_mode(made, make, path):
    model, memory = made["llama"], make(made["llama"])
    ids = tokens(2, 70)
    with torch.inference_mode():
        read(model, memory, ids[:, :60])
    goes_on(model, memory, ids, path)


def test_a_parked_cache_is_saved(made, make, path):
    model, memory = made["llama"], make(made["llama"])
    ids = tokens(2, 70)
    read(model, memory, ids[:, :60])
    memory.park()
    longwave.save(memory, ids[:, :60], path, exact=True)
    twin, _ = longwave.restore(model, path)
    memory.wake()
    assert torch.equal(read(model, twin, ids), read(model, memory, ids))


def test_whoever_reads_safetensors_reads_it(made, path):
    from safetensors import safe_open

    memory = longwave.cache(made["llama"], "dense")
    read(made["llama"], memory, tokens(1, 30))
    longwave.save(memory, tokens(1, 30), path, exact=True)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "longwave-cache"
        first = next(memory.memory_layers())
        assert torch.equal(file.get_tensor("layers.0.dense.k"), first.dense.k)


def refused(cache, ids, path, match, **options):
    with pytest.raises((ValueError, TypeError), match=match):
        longwave.save(cache, ids, path, **options)
    assert not path.exists()


def test_what_cannot_be_saved(made, path):
    import pickle

    model, ids = made["llama"], tokens(2, 60)
    memory = longwave.cache(model, "dense")
    refused(memory, ids, path, "no token was read", exact=True)
    read(model, memory, ids)
    refused(memory, ids, path, "say how to save")
    refused(memory, ids, path, "say how to save", exact=True, size=0.5)
    refused(memory, ids[:, :59], path, r"60 columns, and ids are \[2, 59\]", exact=True)
    refused(memory, ids[:1], path, "2 rows", exact=True)
    refused(memory, ids.float(), path, "whole numbers", exact=True)
    refused(None, ids, path, "got NoneType", exact=True)
    copied = pickle.loads(pickle.dumps(memory))
    refused(copied, ids, path, "pass model=", exact=True)
    assert longwave.save(copied, ids, path, exact=True, model=model)
    path.unlink()
    next(memory.memory_layers()).progress.broken = True
    refused(memory, ids, path, "failed half-way", exact=True)


def test_a_decoder_that_holds_it(made, path):
    model, ids = made["llama"], tokens(1, 40)
    memory = longwave.cache(model, "dense")
    read(model, memory, ids)
    with longwave.StaticDecoder(model, memory, new_tokens=4) as decoder:
        decoder.step(ids[:, :1])
        with pytest.raises(RuntimeError, match="a decoder holds this cache"):
            longwave.save(memory, ids, path, exact=True)
        with pytest.raises(RuntimeError, match="a decoder holds this cache"):
            memory.park()
    assert not path.exists()


@pytest.mark.parametrize("kind", ["falcon_h1", "lfm2", "granitemoehybrid"])
@pytest.mark.parametrize("name", ["kivi", "h2o"])
def test_layers_of_other_kinds(kind, name, path):
    """Exactly, there and back from host memory, and coded; Falcon-H1's states lie beside its attention."""
    model, make = hybrid(kind), METHODS[name]
    ids, mask = left_padded(2, 70, [0, 13])
    memory, plain = make(model), longwave.cache(model, "dense")
    for held, options in ((memory, {"exact": True}), (plain, {"size": "9MB", "coder": Raw()})):
        read(model, held, ids[:, :60], mask)
        longwave.save(held, ids[:, :60], path, **options)
        twin, _ = longwave.restore(model, path, coder=options.get("coder"))
        twin.park()
        twin.wake()
        assert torch.equal(read(model, twin, ids, mask), read(model, held, ids, mask))
