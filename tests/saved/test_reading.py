"""A prompt that is coded while it is read: the file of one that was read at once, never dense as a whole."""

import pytest
import torch

import longwave
from longwave.codec.coder import SINKS, WINDOW
from longwave.codec.layer import CodedLayer
from longwave.codec.middle import Middle
from longwave.frame import Needs, cache_argument, observing
from longwave.saved import look, read_coded, reading
from tests.coder import Raw, Several
from tests.conftest import build, tokens
from tests.reading import check_state, read, state_of

LENGTH = SINKS + WINDOW + 107  # segments of 16: the last one is short
KINDS = ["llama", "gemma3", "qwen3next"]


@pytest.fixture(scope="module")
def made():
    return {kind: build(kind) for kind in KINDS}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "read.lw"


def in_chunks(model, ids, chunk, needs=None):
    """A dense cache that has read ids in chunks."""
    memory = observing(model, needs)
    with torch.no_grad():
        for part in ids.split(chunk, 1):
            model(part, **cache_argument(model, memory), use_cache=True)
    return memory


@pytest.fixture
def plenty(monkeypatch):
    """Room for a coder that takes all 32 bits of a number."""
    monkeypatch.setattr(reading, "share_of", lambda fraction, tokens, shape: 1 << 30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [17, 64, 1000])
def test_the_file_of_a_prompt_that_was_read_in_chunks(made, kind, chunk, plenty, path):
    """Without a loss in the codec: K and V, counts, sliding and linear layers, and what comes after."""
    model, ids = made[kind], tokens(1, LENGTH + 9)
    coder = Raw(layers=len(list(longwave.cache(model, "dense").memory_layers())), group=2)
    size = read_coded(model, ids[:, :LENGTH], path, chunk=chunk, coder=coder, about={"who": "us"})
    assert size == path.stat().st_size
    found = look(path)
    assert (found.kind, found.rows, found.segments, found.about) == ("coded", [LENGTH], 7, {"who": "us"})
    twin, kept = longwave.restore(model, path, coder=coder)
    memory = in_chunks(model, ids[:, :LENGTH], chunk)
    check_state(state_of(twin), state_of(memory), rtol=1e-4, atol=1e-5)
    assert torch.equal(kept, ids[:, :LENGTH])
    torch.testing.assert_close(read(model, twin, ids), read(model, memory, ids), rtol=1e-4, atol=1e-4)


def test_segments_that_are_full_are_coded_side_by_side(made, plenty, path):
    model, ids, other = made["llama"], tokens(1, LENGTH), path.with_name("other")
    read_coded(model, ids, path, chunk=90, coder=Raw())
    read_coded(model, ids, other, chunk=90, coder=(coder := Several()))
    assert coder.many == (3, 3)  # of 7, the last by itself
    assert path.read_bytes() == other.read_bytes()


def test_never_dense_as_a_whole(made, plenty, path, monkeypatch):
    """A layer holds the first tokens, the window, an open segment and a chunk; a pass decodes two layers at a time."""
    model, most, groups = made["llama"], [], []
    attend, of = CodedLayer.attend, Middle.of

    def attending(self, p):
        most.append(self.dense.longest)
        assert self.dense.longest >= min(self.rows[0], SINKS + WINDOW + p.q.shape[2])  # exact before each chunk
        return attend(self, p)

    def decoding(self, *args, **options):
        found = of(self, *args, **options)
        groups.append(self.expanded()[0].shape[0])
        return found

    monkeypatch.setattr(CodedLayer, "attend", attending)
    monkeypatch.setattr(Middle, "of", decoding)
    ids = tokens(1, 490)
    read_coded(model, ids, path, chunk=20, coder=Raw(layers=3, group=2))
    assert max(most) <= SINKS + WINDOW + 16 + 20
    assert set(groups) == {1, 2}


def test_what_was_coded_is_what_later_chunks_read(made, plenty, path):
    """Another first chunk's loss is felt: with half of the digits the file is another, and near."""
    model, ids = made["llama"], tokens(1, LENGTH)
    read_coded(model, ids, path, chunk=32, coder=(coder := Raw(torch.bfloat16)))
    rough = longwave.restore(model, path, coder=coder)[0]
    exact = in_chunks(model, ids, 32)
    last = slice(LENGTH - WINDOW, None)
    errors = [
        float((a.materialize()[0] - b.materialize()[0])[:, :, last].abs().max())
        for a, b in zip(rough.memory_layers(), exact.memory_layers(), strict=True)
    ]
    assert 0 < errors[-1] < 0.1


def test_queries_are_remembered_for_a_method_that_asks(made, plenty, path):
    model, ids = made["llama"], tokens(1, LENGTH)
    method = longwave.SnapKV(sinks=2, window=16)
    needs = method.needs()
    read_coded(model, ids, path, chunk=64, coder=(coder := Raw()), needs=needs)
    twin, _ = longwave.restore(model, path, method, 0.3, coder=coder)
    memory = in_chunks(model, ids, 64, Needs(queries=needs.queries, every=needs.every))
    other = path.with_name("other")
    longwave.save(memory, ids, other, size="1MB", coder=Raw())
    want, _ = longwave.restore(model, other, method, 0.3, coder=Raw())
    check_state(state_of(twin), state_of(want), rtol=1e-3, atol=1e-3, share=0.98)


def test_short_prompts_are_exact(made, path):
    model, ids = made["llama"], tokens(1, 100)
    read_coded(model, ids, path, chunk=30, coder=(coder := Raw(torch.float16)))
    check_state(state_of(longwave.restore(model, path, coder=coder)[0]), state_of(in_chunks(model, ids, 30)))
    assert look(path).segments == 0


def test_what_does_not_fit(made, path):
    model, ids = made["llama"], tokens(1, LENGTH)
    for given, more, words in (
        (tokens(2, 9), {}, "one row without padding"),
        (ids.float(), {}, "one row without padding"),
        (ids, {"size": "1MB"}, "size is a fraction here"),
        (ids, {"chunk": 0}, "chunk is a whole number of tokens, at least 1"),
        (ids, {"needs": Needs(mass=True)}, "nothing but queries"),
        (ids, {"needs": Needs(votes=(8,))}, "nothing but queries"),
        (ids, {"needs": longwave.SirLLM().needs()}, "nothing but queries"),
        (ids, {"needs": longwave.KVzip().needs()}, "nothing but queries"),
        (ids, {"size": 0.01}, "the codec takes"),
    ):
        with pytest.raises(ValueError, match=words):
            read_coded(model, given, path, **{"coder": Raw(), **more})
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_coded(model, ids, path / "no" / "folder", coder=Raw())
    assert not path.exists()
