"""dense(offload="coded"): layers whose middle lies coded, expanded a group at a time in every pass."""

import copy

import pytest
import torch

import longwave
from longwave.codec import build
from longwave.codec.coder import SINKS, WINDOW
from longwave.codec.middle import Middle
from longwave.decode import supports
from longwave.decode.steps import Unsupported
from longwave.evals.fork import fork, prefill
from longwave.frame import cache_argument, storage_bytes
from longwave.saved import read_coded, reading
from tests.coder import Parted, Raw
from tests.conftest import build as model_of
from tests.conftest import tokens
from tests.reading import check_state, read, read_in, state_of

LENGTH = SINKS + WINDOW + 107  # segments of 16: 6 are full
CODED = 96
KINDS = ["llama", "gemma3", "qwen3next"]


@pytest.fixture(scope="module")
def made():
    return {kind: model_of(kind) for kind in KINDS}


def layers_of(model):
    return len(list(longwave.cache(model, "dense").memory_layers()))


def coded(model, dtype=torch.bfloat16, group=2, coder=None):
    """An empty cache, with room for all bits of a number."""
    coder = coder or Parted(layers_of(model), dtype, group=group)
    memory = longwave.cache(model, "dense", offload="coded", size=1.0, coder=coder)
    if coder.lossless:
        for part in memory.method.parts:
            part.room.share *= 2  # 32 bits and a header
    return memory


def check_expanded(memory, dense, rtol=0.0, atol=0.0):
    for ours, theirs in zip(memory.memory_layers(), dense.memory_layers(), strict=True):
        for a, b in zip(ours.materialize(), theirs.materialize(), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.fixture
def plenty(monkeypatch):
    monkeypatch.setattr(reading, "share_of", lambda fraction, tokens, shape: 1 << 30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[LENGTH], [50, 150, 39], [17] * 14 + [1]])
def test_without_a_loss_it_is_a_dense_cache(made, kind, sizes):
    model, ids = made[kind], tokens(1, LENGTH + 5)
    memory, dense = coded(model, torch.float32), longwave.cache(model, "dense")
    next(memory.memory_layers()).middle.ahead = sizes[0] == 50
    sizes = [*sizes, 1, 1, 3]
    logits = read_in(model, memory, ids, sizes)
    torch.testing.assert_close(logits, read_in(model, dense, ids, sizes), rtol=1e-4, atol=1e-4)
    assert [layer.middle.part(layer.position).tokens for layer in memory.memory_layers()] == [112] * layers_of(model)
    assert {layer.dense.lengths[0] for layer in memory.memory_layers()} == {LENGTH + 5 - 112}
    check_expanded(memory, dense, 1e-4, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 2, 5])
def test_what_read_coded_and_restore_make(made, kind, group, plenty, tmp_path):
    """Of the same passes: K and V of all tokens but the last, whose ends files keep in 8 bits."""
    model, ids = made[kind], tokens(1, LENGTH)
    coder = Raw(torch.bfloat16, layers=layers_of(model), group=group)
    read_coded(model, ids, tmp_path / "kept.lw", chunk=60, coder=coder)
    restored, _ = longwave.restore(model, tmp_path / "kept.lw", coder=coder)
    memory = coded(model, coder=coder)  # all layers together, as in files
    for part in ids.split(60, 1):
        read(model, memory, ids[:, : memory.get_seq_length() + part.shape[1]])
    for ours, theirs in zip(memory.memory_layers(), restored.memory_layers(), strict=True):
        for a, b in zip(ours.materialize(), theirs.materialize(), strict=True):
            assert torch.equal(a[:, :, : SINKS + CODED], b[:, :, : SINKS + CODED])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_a_dense_cache_of_what_was_decoded(made, kind):
    """Until the next segment fills."""
    model, ids = made[kind], tokens(1, LENGTH + 4)
    memory, dense = coded(model), longwave.cache(model, "dense")
    read(model, memory, ids[:, :LENGTH])
    read(model, dense, ids[:, :LENGTH])
    for ours, theirs in zip(memory.memory_layers(), dense.memory_layers(), strict=True):
        k, v = ours.materialize()
        assert not torch.equal(k, theirs.dense.view()[0])
        theirs.dense.view()[0].copy_(k)
        theirs.dense.view()[1].copy_(v)
    for end in range(LENGTH + 1, LENGTH + 5):
        ours, theirs = (read(model, one, ids[:, :end]) for one in (memory, dense))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    check_expanded(memory, dense, 1e-5, 1e-5)


@pytest.mark.parametrize("ahead", [None, True])
def test_never_more_than_a_group_and_the_next_are_expanded(made, ahead, monkeypatch):
    """A group is let go before another is made, or, ahead, the one after the next; none stays behind a pass. On a CPU
    nothing is made ahead unless it is asked for."""
    model, ids = made["llama"], tokens(1, LENGTH + 3)
    alive, most, expand = [], [], Middle._expanded

    def expanding(self, key):
        found = expand(self, key)
        alive.append([x.untyped_storage()._weak_ref() for x in found])
        most.append(sum(any(not torch.UntypedStorage._expired(x) for x in pair) for pair in alive))
        return found

    monkeypatch.setattr(Middle, "_expanded", expanding)
    memory = coded(model, group=1)
    next(memory.memory_layers()).middle.ahead = ahead
    read(model, memory, ids[:, :LENGTH])
    for end in (LENGTH + 1, LENGTH + 3):
        read(model, memory, ids[:, :end])
    count = layers_of(model)
    assert len(alive) == 2 * count > 4
    assert max(most) <= 1 + bool(ahead)
    assert all(torch.UntypedStorage._expired(x) for pair in alive for x in pair)
    for pair in alive:
        for x in pair:
            torch.UntypedStorage._free_weak_ref(x)
    report = memory.report()
    each = 2 * 2 * 8 * 4  # K and V of a token
    assert report.scratch == ((1 + bool(ahead)) * CODED + LENGTH + 3) * each
    assert report.parts["coded"] == sum(
        x.nbytes for layer in memory.memory_layers() for x in layer.parts().get("coded", [])
    )
    assert 0 < report.parts["coded"] < CODED * count * each
    assert report.parts["dense"] == 192 * count * each  # 146 tokens, in blocks of 64
    assert not report.parts["expanded"]
    assert memory.nbytes <= memory.method.nbytes(LENGTH + 3)
    assert memory.method.peak_bytes(LENGTH) > memory.method.nbytes(LENGTH)


def test_a_prompt_is_coded_group_by_group_while_it_is_read(made, monkeypatch):
    """When a layer attends, those of groups before its own hold no more than their ends."""
    model, held = made["llama"], []
    memory = coded(model, group=1)
    attend = type(next(memory.memory_layers())).attend

    def attending(self, p):
        held.append([layer.dense.lengths[0] for layer in memory.memory_layers() if layer.position < self.position])
        return attend(self, p)

    monkeypatch.setattr(type(next(memory.memory_layers())), "attend", attending)
    read(model, memory, tokens(1, LENGTH))
    assert held == [[LENGTH - CODED] * n for n in range(layers_of(model))]


def test_its_ids_are_told(made):
    model, ids = made["llama"], tokens(1, LENGTH)
    coder = Parted(layers_of(model), group=2)
    read_in(model, coded(model, coder=coder), ids, [100, LENGTH - 100])
    for own in coder.own:
        assert [start for start, *_ in own.asked] == list(range(SINKS, SINKS + CODED, 16))
        assert [i for _, some, _ in own.asked for i in some] == ids[0, SINKS : SINKS + CODED].tolist()


def test_what_was_read_elsewhere(made, plenty, tmp_path):
    """A fork, and a file: as if it had read itself."""
    model, ids = made["llama"], tokens(1, LENGTH)
    own = coded(model)
    read(model, own, ids)
    source = prefill(model, ids, needs=own.method.needs)
    forked = fork(source, coded(model))
    check_state(state_of(forked), state_of(own), but=("_run",))
    longwave.save(source, ids, tmp_path / "kept.lw", size="10MB", coder=Raw())
    restored, _ = longwave.restore(model, tmp_path / "kept.lw", coded(model), coder=Raw())
    check_state(state_of(restored), state_of(own))
    with pytest.raises(ValueError, match="token"):
        fork(prefill(model, ids), coded(model))


def test_saved_coded_it_is_what_it_was(made, plenty, tmp_path):
    model, ids = made["llama"], tokens(1, LENGTH)
    memory = coded(model)
    read(model, memory, ids)
    longwave.save(memory, ids, tmp_path / "kept.lw", size="10MB", coder=(coder := Raw()))
    restored, _ = longwave.restore(model, tmp_path / "kept.lw", coder=coder)
    check_expanded(restored, memory)
    assert not memory.report().parts["expanded"]
    with pytest.raises(NotImplementedError, match="save K and V with size="):
        longwave.save(memory, ids, tmp_path / "kept.lw", exact=True)


def test_parked_copied_cropped_and_reset(made):
    model, ids = made["llama"], tokens(1, LENGTH + 4)
    memory = coded(model)
    read(model, memory, ids[:, :LENGTH])
    twin = copy.deepcopy(memory)
    memory.park()
    assert memory.report().host == memory.nbytes
    with pytest.raises(RuntimeError, match="parked"):
        read(model, memory, ids[:, : LENGTH + 1])
    memory.wake()
    want = read(model, twin, ids)
    assert torch.equal(read(model, memory, ids), want)
    memory.crop(-4)
    assert torch.equal(read(model, memory, ids), want)
    memory.crop(-WINDOW)
    assert memory.get_seq_length() == LENGTH + 4 - WINDOW
    before = state_of(memory)
    with pytest.raises(ValueError, match="those before the last 15 lie coded"):
        memory.crop(-16)
    check_state(state_of(memory), before)
    memory.reset()
    read(model, memory, ids[:, :40])
    memory.crop(-39)
    assert memory.get_seq_length() == 1
    assert not memory.report().parts["coded"]


def test_generate(made):
    model, ids = made["llama"], tokens(1, LENGTH)
    options = dict(max_new_tokens=20, do_sample=False)
    dense = longwave.cache(model, "dense")
    want = model.generate(ids, **cache_argument(model, dense), **options)
    memory = coded(model, torch.float32)
    with pytest.raises(Unsupported, match="expanded by the host"):
        longwave.generate(model, ids, cache=memory, **options)
    assert torch.equal(model.generate(ids, **cache_argument(model, memory), **options), want)
    assert memory.report().answers == ("plain torch (what lies coded is expanded in every pass)",)


def test_what_it_cannot_do(made):
    model, ids = made["llama"], tokens(2, 30)
    memory = coded(model)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="one row, not 2"):
            read(model, memory, ids)
    assert memory.get_seq_length() == 0
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(NotImplementedError, match="without padding"):
        read(model, memory, ids[:1], mask)
    lower = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    lower[..., 5, 2] = False
    with pytest.raises(NotImplementedError, match="4D mask"):
        model(ids[:1], attention_mask=lower, **cache_argument(model, memory), use_cache=True)
    with pytest.raises(ValueError, match="pass input_ids, not embeddings"):
        model(inputs_embeds=model.get_input_embeddings()(ids[:1]), **cache_argument(model, memory), use_cache=True)
    read(model, memory, ids[:1])
    before = state_of(memory)
    with pytest.raises(NotImplementedError, match="one row, not 2"):
        memory.batch_repeat_interleave(2)
    check_state(state_of(memory), before)
    assert "expanded by the host" in supports(model, memory)


def test_options_that_mean_nothing(made):
    for given, words in (
        ({"offload": "host"}, "offload is"),
        ({"size": 0.1}, "decide nothing without offload"),
        ({"coder": Raw()}, "decide nothing without offload"),
        ({"offload": "coded", "coder": "mine"}, "coder is what codes segments"),
        ({"offload": "coded", "size": 0}, "size is a fraction"),
        ({"offload": "coded", "size": True}, "size is a fraction"),
        ({"offload": "coded", "size": "5%"}, "size is a fraction"),
    ):
        with pytest.raises(ValueError, match=words):
            longwave.Dense(**given)
    with pytest.raises(ValueError, match=r"leave budget=0\.3 out"):
        longwave.cache(made["llama"], "dense", 0.3, offload="coded", coder=Raw())
    with pytest.raises(ValueError, match="cannot hold"):
        longwave.cache(made["llama"], "dense", "4KiB", offload="coded", coder=Raw(), max_tokens=LENGTH)
    small = longwave.cache(made["llama"], "dense", offload="coded", size=0.001, coder=Raw())
    with pytest.raises(ValueError, match="the codec takes"):
        read(made["llama"], small, tokens(1, LENGTH))


@pytest.mark.parametrize("around", ["inference", "bfloat16", "autocast"])
def test_modes_and_types(made, around):
    """A half is read under inference_mode, or all in 16 bits, or under autocast."""
    model, ids = made["llama"], tokens(1, LENGTH + 2)
    if around == "bfloat16":
        model = copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", enabled=around == "autocast"):
        memory, dense = coded(model), longwave.cache(model, "dense")  # bfloat16 loses nothing of bfloat16
        with torch.inference_mode(around == "inference"):
            for cache in (memory, dense):
                read(model, cache, ids[:, :LENGTH])
        ours, theirs = (read(model, cache, ids) for cache in (memory, dense))
        assert not memory.report().parts["expanded"]
    loose = 0.1 if around == "inference" else 0.02
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=loose, atol=loose)


def test_what_fails_ahead_fails_the_pass(made, monkeypatch):
    model, ids = made["llama"], tokens(1, LENGTH + 1)
    memory = coded(model, group=1)
    read(model, memory, ids[:, :LENGTH])
    middle = next(memory.memory_layers()).middle
    middle.ahead, coder = True, middle.parts[1].coder
    monkeypatch.setattr(coder, "decode", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        read(model, memory, ids)
    with pytest.raises(ValueError, match="failed half-way"):
        read(model, memory, ids)
    monkeypatch.undo()
    memory.reset()
    read(model, memory, ids)
    assert memory.report().parts["coded"] > 0


def test_by_the_models_own_codec(small, monkeypatch):
    """Its groups apart give what they give together; the bytes are those that were asked for."""
    from longwave.methods import dense as module

    asked = 0.8 * small.codec.sizes[1]
    codec = build(small.read, groups=((0, 1), (1, 3)))
    whole = codec.at(asked)
    n = SINKS + WINDOW + whole.tokens
    memory = longwave.cache(small.model, "dense", offload="coded", coder=whole, size=asked)
    monkeypatch.setattr(module, "codec_for", lambda model, tokenizer: codec)
    found = longwave.cache(small.model, "dense", offload="coded", size=asked)
    for cache in (memory, found):
        read(small.model, cache, small.ids[None, :n])
    assert memory.method == found.method
    cut = slice(SINKS, SINKS + whole.tokens)
    k, v = (torch.empty_like(small.k[:, cut]) for _ in "kv")
    blob = whole.encode(*small.part(cut.start, cut.stop)[:2], ids=small.ids[cut], start=SINKS)
    whole.decode(blob, k, v)
    for cache in (memory, found):
        for layer, own_k, own_v in zip(cache.memory_layers(), k, v, strict=True):
            for got, want in zip(layer.materialize(), (own_k, own_v), strict=True):
                torch.testing.assert_close(got[0, :, cut].transpose(0, 1), want, rtol=1e-3, atol=1e-3)
        blobs = [x for layer in cache.memory_layers() for x in layer.parts()["coded"]]
        assert len(blobs) == len(whole.groups)
        assert abs(storage_bytes(blobs) - len(blob)) < 400 * len(blobs)  # a header and the ids for each
