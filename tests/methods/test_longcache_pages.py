"""longcache over pages: chosen and read is what pages give back, turned anew, and bytes are those of pages."""

from dataclasses import replace

import pytest
import torch

import longwave
from longwave.frame.attention import StepMask
from tests.conftest import random_profile, tokens
from tests.methods import naive
from tests.methods.naive import SCALE, draw
from tests.methods.test_longcache import COMINGS, MODULE, SMALL, Turning, answers, tell, twin
from tests.reading import read, read_in

METHOD = longwave.ReAttention(**SMALL)
EXACT = longwave.ReAttention(**SMALL, store=longwave.Kivi(group=8))
ROUGH = longwave.ReAttention(**SMALL, store=longwave.Kivi(group=8, bits=4))


def new_layer(method, budget=None):
    layer = method.bind(naive.shape(torch.float32), None, budget).layer(0)
    layer.progress.rotary = Turning()
    return layer


def drawn(*sizes, seed):
    return [x.float() for x in draw(*sizes, seed=seed)]


@pytest.mark.parametrize("coming", list(COMINGS))
@pytest.mark.parametrize("pads", [[0], [0, 11, 45]], ids=["alone", "padded"])
def test_over_pages_that_lose_nothing_the_same_is_read(coming, pads):
    sizes = COMINGS[coming]
    total = sum(sizes)
    given = drawn(len(pads), total, seed=4)
    valid = naive.coming_with(pads, total)
    paged = new_layer(EXACT, 1.0)
    found = answers(paged, *given, sizes, valid)
    want = answers(new_layer(METHOD), *given, sizes, valid)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    assert (paged.store is not None) == (total > SMALL["sinks"] + SMALL["window"] + 8)


@pytest.mark.parametrize("options", [dict(), dict(scan=False), dict(scan=False, before=2)], ids=str)
def test_looking_over_pages_that_lose_nothing_finds_the_same(llama, options):
    ids, question, step = tokens(2, 90), tokens(2, 6, seed=7), tokens(2, 1, seed=8)
    found = []
    for method, budget in ((METHOD, None), (EXACT, 1.0)):
        memory = longwave.cache(llama, replace(method, look=7, **options), budget=budget)
        logits = [read(llama, memory, ids) for ids in (ids, torch.cat([ids, question], 1))]
        logits.append(read(llama, memory, torch.cat([ids, question, step], 1)))
        found.append((torch.cat(logits, 1), [layer.told.found for layer in memory.memory_layers()]))
    (one, spans), (other, same) = found
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert all(map(torch.equal, spans, same))


def test_the_first_reading_makes_no_pages(llama):
    """Codes of the second are those of tokens read once."""
    ids, question = tokens(1, 87), tokens(1, 6, seed=7)
    memory, once = (longwave.cache(llama, replace(ROUGH, look=look)) for look in (7, 0))
    for cache in (memory, once):
        read(llama, cache, ids)
    for layer, other in zip(memory.memory_layers(), once.memory_layers(), strict=True):
        torch.testing.assert_close(layer.materialize(), other.materialize())
    read(llama, memory, torch.cat([ids, question], 1))
    tell(once, memory)
    read(llama, once, torch.cat([ids, question], 1))
    for layer, other in zip(memory.memory_layers(), once.memory_layers(), strict=True):
        torch.testing.assert_close(layer.materialize(), other.materialize(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("store", ["kivi", "fourier"])
def test_a_step_reads_what_pages_give_back(store):
    method = longwave.ReAttention(**SMALL, store=longwave.Fourier(segment=8) if store == "fourier" else ROUGH.store)
    layer = new_layer(method, 0.25 if store == "fourier" else None)
    given = drawn(1, 71, seed=6)
    answers(layer, *(x[:, :, :70] for x in given), [70])
    k, v = layer.materialize()
    assert (k - given[0][:, :, :70]).abs().max() > 0.001
    k, v = (torch.cat([a, b[:, :, 70:]], 2) for a, b in zip((k, v), given[:2], strict=True))
    at = torch.tensor([[70]])
    q, new = (Turning()._by(x[:, :, 70:], at) for x in (given[2], given[0]))
    layer.update(new, given[1][:, :, 70:])
    found = layer.forward(q, SCALE, StepMask(None, True), MODULE, at)
    want = twin(METHOD, k[0], v[0], given[2][0], [70, 1])[:, 70:]
    torch.testing.assert_close(found[0], want, rtol=0, atol=1e-5)


def test_bytes_and_words(llama):
    method = longwave.ReAttention(**SMALL, store=longwave.Kivi(group=8))
    memory = longwave.cache(llama, method, 0.4)
    read_in(llama, memory, tokens(2, 200), (150, 50))
    report, bound = memory.report(), memory.method
    assert memory.nbytes == bound.nbytes(200, 2)
    assert report.parts["pages"] == pytest.approx(bound.page_fraction() * 184 * 2 * 3 * bound.shape.token_bytes)
    assert str(bound).startswith("longcache(reads 23 tokens: 3 spans of 4, window=9, in kivi(K ")
    assert next(memory.memory_layers()).unsteady() == "the host finds what it reads in pages"
    size = longwave.cache(llama, method, "64KiB", max_tokens=200)
    assert size.method.nbytes(200) <= 64 * 1024 < longwave.cache(llama, "dense").method.nbytes(200)


def test_what_is_refused(llama, tmp_path):
    make = longwave.ReAttention
    with pytest.raises(ValueError, match='store is a method of pages such as "kivi" or "fourier", got'):
        make(**SMALL, store="quest")
    with pytest.raises(ValueError, match="window is longcache's to say"):
        make(**SMALL, store=longwave.Kivi(window=7))
    with pytest.raises(ValueError, match=r"pages lie on the device: leave store or host=.* out"):
        make(**SMALL, store="kivi", host=str(tmp_path))
    with pytest.raises(ValueError, match="think watches what is asked of keys as they are turned"):
        longwave.cache(llama, make(**SMALL, store="think"), 0.8)
    with pytest.raises(ValueError, match="before rotation, which no profile has measured, and without one fourier"):
        longwave.cache(llama, make(**SMALL, store="fourier"), 0.05)
    with pytest.raises(ValueError, match="profile"):
        longwave.cache(llama, make(**SMALL, store="fourier"), 0.4, profile=random_profile(llama))
