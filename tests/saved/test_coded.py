"""K and V that a coder gives back: dense, or settled into any method as if the text had been read."""

import pytest
import torch

import longwave
from longwave.codec.coder import SINKS, WINDOW
from longwave.evals.fork import fork, needs_of, prefill
from longwave.frame import Needs, observing
from longwave.saved.coded import encode
from tests.coder import Raw, Several
from tests.conftest import build, left_padded, merging_profile, random_profile, tokens
from tests.matrix import ENDS, Often
from tests.reading import check_state, read, state_of

LENGTH = SINKS + WINDOW + 75  # segments of 16: the last one is short
PADS = [0, 13, LENGTH - 40]  # of the last row everything is exact


@pytest.fixture(scope="module")
def made():
    return {kind: build(kind) for kind in ("llama", "gemma3", "qwen3next")}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.lw"


@pytest.fixture(params=["llama", "gemma3", "qwen3next"])
def model(request, made):
    return made[request.param]


@pytest.fixture
def text():
    return left_padded(3, LENGTH + 20, PADS)


def dense(model, text, needs=None):
    ids, mask = text
    memory = longwave.cache(model, "dense") if needs is None else observing(model, needs)
    read(model, memory, ids[:, :LENGTH], mask)
    return memory


def save(memory, text, path, coder, size=1.0):
    return longwave.save(memory, text[0][:, :LENGTH], path, size=size, coder=coder)


def test_dense_again(model, text, path):
    """Without a loss nothing differs: K and V, logits, counts, sliding and linear layers."""
    memory = dense(model, text)
    save(memory, text, path, coder := Raw(), "1MB")
    twin, ids = longwave.restore(model, path, coder=coder)
    check_state(state_of(twin), state_of(memory))
    assert torch.equal(ids, text[0][:, :LENGTH])
    assert torch.equal(twin.mask(), text[1][:, :LENGTH].bool())
    assert torch.equal(read(model, twin, *text), read(model, memory, *text))
    assert {layers for _, layers in coder.calls} == {(i,) for i in range(len(list(memory.memory_layers())))}


def test_segments_side_by_side_make_the_same_file(made, text, path):
    memory, other = dense(made["llama"], text), path.with_name("other")
    save(memory, text, path, Raw(), "1MB")
    save(memory, text, other, coder := Several(), "1MB")
    assert path.read_bytes() == other.read_bytes()
    assert coder.many == (3, 2, 3)  # 75 and 62 tokens by 16; what is left of a row goes as one


class Greedy(Several):
    """Takes all that it may."""

    def encode(self, k, v, *, ids=None, start=None, out=None, max_bytes=None):
        return bytes(max_bytes)


@pytest.mark.parametrize("coder", [Greedy(), Greedy(tokens=7)])
def test_segments_side_by_side_stay_within_their_room(made, text, coder):
    room = 3000
    found = [len(blob) for blob in encode(dense(made["llama"], text), text[0], coder, room).values()]
    assert 0.7 * room < sum(found) <= room
    assert max(found) <= 2 * room * coder.tokens / 137  # twice its share, of 75 and 62 tokens


def test_what_is_coded_and_what_is_not(made, text, path):
    """First tokens as they were, last ones within half a level, the middle by the coder; short rows as they were."""
    model = made["llama"]
    memory = dense(model, text)
    size = save(memory, text, path, coder := Raw(torch.float16), "1MB")
    twin, _ = longwave.restore(model, path, coder=coder)
    for ours, theirs in zip(twin.memory_layers(), memory.memory_layers(), strict=True):
        for got, want in zip(ours.materialize(), theirs.materialize(), strict=True):
            for row, seen in enumerate(ours.rows):
                middle, last = slice(SINKS, max(SINKS, seen - WINDOW)), slice(max(SINKS, seen - WINDOW), seen)
                assert torch.equal(got[row, :, :SINKS], want[row, :, :SINKS])
                assert torch.equal(got[row, :, middle], want[row, :, middle].half().float())
                span = want[row, :, last].amax(1) - want[row, :, last].amin(1)
                away = (got[row, :, last] - want[row, :, last]).abs().amax(1)
                if seen > SINKS + WINDOW:
                    assert away.max() > 0
                    assert (away <= span * (0.5 / 255 + 1e-6)).all()
                else:
                    assert not away.any()
    assert size < memory.nbytes
    asked = [(start, len(ids)) for start, ids, _ in coder.asked]
    starts = [*range(SINKS, LENGTH - WINDOW, 16)]
    assert asked[: len(starts)] == [(at, min(16, LENGTH - WINDOW - at)) for at in starts]
    real = text[0][1][13:LENGTH].tolist()  # the second row's ids, without its padding
    second = [ids for _, ids, _ in coder.asked[len(starts) :]]
    assert [token for ids in second for token in ids] == real[SINKS : len(real) - WINDOW]


def test_ids_that_are_not_read_yet(made, text, path):
    """`generate` gives one more than it read; they are kept, and nothing is coded by them."""
    model, ids = made["llama"], text[0][:, : LENGTH + 1]
    memory = dense(model, text)
    longwave.save(memory, ids, path, size="1MB", coder=(one := Raw()))
    twin, kept = longwave.restore(model, path, coder=one)
    check_state(state_of(twin), state_of(memory))
    assert torch.equal(kept, ids)
    save(memory, text, path, other := Raw(), "1MB")
    assert [asked[:2] for asked in one.asked] == [asked[:2] for asked in other.asked]


def test_layers_that_are_decoded_together(made, text, path):
    model = made["llama"]
    memory = dense(model, text)
    save(memory, text, path, coder := Raw(layers=3, group=2), "1MB")
    twin, _ = longwave.restore(model, path, coder=coder)
    check_state(state_of(twin), state_of(memory))
    assert {layers for _, layers in coder.calls} == {(0, 1), (2,)}


SETTLED = {
    "fourier": lambda model: (longwave.Fourier(segment=8, **ENDS), 0.5, dict(profile=random_profile(model))),
    "kivi": lambda model: (longwave.Kivi(bits=4, group=8, **ENDS), None, {}),
    "streaming": lambda model: (longwave.Streaming(**ENDS), 0.3, {}),
    "streaming-slots": lambda model: (longwave.Streaming(tokens=24, positions="slots", **ENDS), None, {}),
    "quest": lambda model: (longwave.Quest(full_layers=0, chunk=4, **ENDS), 0.3, {}),
}
ASKING = {
    "snapkv": lambda model: (Often(**ENDS), 0.3, {}),
    "snapkv-pages": lambda model: (longwave.SnapKV(store=longwave.Kivi(bits=4, group=8), **ENDS), 0.06, {}),
    "merged": lambda model: (longwave.Fourier(segment=8, **ENDS), 0.3, dict(profile=merging_profile(model))),
}


def forked(model, text, method, budget, options):
    """What reading the text into the method itself gives (tests/evals/test_fork.py)."""
    empty = longwave.cache(model, method, budget, **options)
    ids, mask = (x[:, :LENGTH] for x in text)
    return fork(prefill(model, ids, mask, needs_of([empty])), empty)


@pytest.mark.parametrize("name", SETTLED)
def test_settled_as_a_prompt_is(model, text, name, path):
    method, budget, options = SETTLED[name](model)
    save(dense(model, text), text, path, coder := Raw(), "1MB")
    twin, _ = longwave.restore(model, path, method, budget, coder=coder, **options)
    check_state(state_of(twin), state_of(forked(model, text, method, budget, options)), but=["columns", "_run"])
    assert next(twin.memory_layers()).columns == LENGTH
    assert torch.isfinite(read(model, twin, *text)).all()


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize("remembered", [True, False], ids=["in the file", "asked again"])
def test_methods_that_ask_with_queries(made, text, name, remembered, path):
    model = made["llama"]
    method, budget, options = ASKING[name](model)
    needs = longwave.cache(model, method, budget, **options).method.needs
    own = Needs(queries=needs.queries, every=needs.every) if remembered else None
    save(dense(model, text, own), text, path, coder := Raw(), "1MB")
    twin, _ = longwave.restore(model, path, method, budget, coder=coder, **options)
    want = state_of(forked(model, text, method, budget, options))
    but = ["columns", "_run"]
    loose = {} if remembered else dict(rtol=1e-3, atol=1e-3, share=0.98)  # asked again, rounding is another
    check_state(state_of(twin), want, but=but, **loose)


def test_into_an_empty_cache(made, text, path):
    model = made["llama"]
    method, budget, options = SETTLED["fourier"](model)
    save(dense(model, text), text, path, coder := Raw(), "1MB")
    empty = longwave.cache(model, method, budget, **options)
    twin, _ = longwave.restore(model, path, empty, coder=coder)
    assert twin is empty
    check_state(state_of(twin), state_of(longwave.restore(model, path, method, budget, coder=coder, **options)[0]))
    with pytest.raises(ValueError, match="is an empty one of the same model"):
        longwave.restore(model, path, empty, coder=coder)
    with pytest.raises(ValueError, match="is an empty one of the same model"):
        longwave.restore(model, path, longwave.cache(build("llama"), "dense"), coder=coder)
    with pytest.raises(ValueError, match="were decided when the cache was built"):
        longwave.restore(model, path, longwave.cache(model, "dense"), 0.5, coder=coder)


def test_what_fails_leaves_the_cache_empty(made, text, path):
    model = made["llama"]
    save(dense(model, text), text, path, Raw(), "1MB")

    class Failing(Raw):
        def decode(self, blob, k, v, *, layers=None, start=None):
            if layers.start:
                raise ValueError("nothing comes out")
            super().decode(blob, k, v, layers=layers, start=start)

    empty = longwave.cache(model, "dense")
    with pytest.raises(longwave.SavedCacheError, match="nothing comes out"):
        longwave.restore(model, path, empty, coder=Failing())
    assert empty.get_seq_length() == 0
    assert torch.equal(read(model, empty, *text), read(model, longwave.cache(model, "dense"), *text))


def test_sliding_layers_cannot_be_asked_again(made, text, path):
    model = made["gemma3"]
    method, budget, options = ASKING["snapkv"](model)
    save(dense(model, text), text, path, coder := Raw(), "1MB")
    with pytest.raises(ValueError, match="do not go back"):
        longwave.restore(model, path, method, budget, coder=coder, **options)
    save(dense(model, text, method.needs()), text, path, coder, "2MB")
    twin, _ = longwave.restore(model, path, method, budget, coder=coder, **options)
    assert torch.isfinite(read(model, twin, *text)).all()


def test_h2o_needs_what_is_gone(made, text, path):
    model = made["llama"]
    save(dense(model, text), text, path, coder := Raw(), "1MB")
    with pytest.raises(ValueError, match="attention that each token got"):
        longwave.restore(model, path, longwave.H2O(**ENDS), 0.3, coder=coder)


def test_an_exact_file_into_a_method(made, text, path):
    model = made["llama"]
    longwave.save(dense(model, text), text[0][:, :LENGTH], path, exact=True)
    for name in ("kivi", "snapkv"):
        method, budget, options = {**SETTLED, **ASKING}[name](model)
        twin, _ = longwave.restore(model, path, method, budget, **options)
        want = state_of(forked(model, text, method, budget, options))
        check_state(state_of(twin), want, but=["columns", "_run"], rtol=1e-3, atol=1e-3, share=0.98)
    longwave.save(twin, text[0][:, :LENGTH], path, exact=True)
    with pytest.raises(ValueError, match=r"cannot be settled into another method.* dropped"):
        longwave.restore(model, path, "dense")


def test_pages_are_coded_as_what_they_stand_for(made, text, path):
    """A cache of pages, in the middle of a conversation, and a period."""
    model = made["llama"]
    for memory in (
        longwave.cache(model, longwave.Kivi(bits=4, group=8, **ENDS)),
        longwave.cache(
            model, longwave.FourierPaper(keep=0.5, states=4, reserve=16, **ENDS), profile=random_profile(model)
        ),
    ):
        read(model, memory, text[0][:, : LENGTH - 3], text[1])
        read(model, memory, text[0][:, :LENGTH], text[1])
        save(memory, text, path, coder := Raw(), "1MB")
        twin, _ = longwave.restore(model, path, coder=coder)
        for ours, theirs in zip(twin.memory_layers(), memory.memory_layers(), strict=True):
            for got, want in zip(ours.materialize(), theirs.materialize(), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "match"), [("h2o", "dropped"), ("slots", "turns keys"), ("merged", "merged tokens")])
def test_what_cannot_give_k_and_v_back(made, text, name, match, path):
    model = made["llama"]
    memory = {
        "h2o": lambda: longwave.cache(model, longwave.H2O(**ENDS), 0.3),
        "slots": lambda: longwave.cache(model, longwave.Streaming(tokens=4096, positions="slots", **ENDS)),
        "merged": lambda: longwave.cache(model, longwave.Fourier(segment=8, **ENDS), 0.3, merging_profile(model)),
    }[name]()
    read(model, memory, text[0][:, :LENGTH], text[1])
    with pytest.raises(ValueError, match=match):
        save(memory, text, path, Raw())
    assert not path.exists()


@pytest.mark.parametrize("size", ["190KB", "250KB", "400KB"])
def test_a_size_of_the_file_is_kept(made, path, size):
    """The coder is told what each segment may take, and all of them together stay within the file's size."""
    model, ids = made["llama"], tokens(1, LENGTH)
    memory = longwave.cache(model, "dense")
    read(model, memory, ids)

    class Greedy(Raw):
        def encode(self, k, v, *, max_bytes, **_):
            assert max_bytes > 0
            return bytes(max_bytes)

    assert longwave.save(memory, ids, path, size=size, coder=Greedy()) <= int(size[:-2]) * 1000


def test_sizes_that_cannot_be(made, path):
    model, ids = made["llama"], tokens(1, LENGTH)
    memory = longwave.cache(model, "dense")
    read(model, memory, ids)
    for size, match in (("10KB", "too little"), (0.05, "the codec takes"), (0, "a budget is"), ("much", "a budget is")):
        with pytest.raises(ValueError, match=match):
            longwave.save(memory, ids, path, size=size, coder=Raw())
    with pytest.raises(ValueError, match="no codec yet, and its tokenizer was not found"):
        longwave.save(memory, ids, path, size=0.5)
    assert not path.exists()


def test_another_codec(made, text, path):
    model = made["llama"]
    save(dense(model, text), text, path, Raw(), "1MB")
    with pytest.raises(longwave.SavedCacheError, match="another codec"):
        longwave.restore(model, path, coder=Raw(name=b"other"))
    with pytest.raises(ValueError, match="budget decides nothing"):
        longwave.restore(model, path, budget=0.5, coder=Raw())


def test_a_refused_restore_leaves_the_model(text, path):
    stock = build("llama")
    model = build("llama")
    save(dense(model, text), text, path, coder := Raw(), "1MB")
    before = stock.config._attn_implementation
    with pytest.raises(ValueError, match="attention that each token got"):
        longwave.restore(stock, path, longwave.H2O(**ENDS), 0.3, coder=coder)
    assert stock.config._attn_implementation == before
    longwave.restore(stock, path, coder=coder)
    assert stock.config._attn_implementation == "longwave"
