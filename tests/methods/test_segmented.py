"""What pages promise whatever method makes them, on its layer and through small models."""

import copy

import pytest
import torch

import longwave
from longwave.frame import storage_bytes
from longwave.methods.base import CacheShape
from longwave.ops.spectral.basis import BASES
from longwave.store import pages
from tests.conftest import ask, build, into, left_padded, merging_profile, random_profile, tokens
from tests.explicit import Explicit

H, D = 2, 8
OPTIONS = {
    "dct": Explicit(keep=0.25, states=3, segment=16, sinks=3, window=10, basis="dct"),
    "dft": Explicit(keep=(0.0, 0.5), states=4, segment=15, sinks=0, window=1, basis="dft"),
    "legendre": Explicit(keep=0.5, states=2, segment=7, sinks=2, window=9, basis="legendre"),
    "ragged": Explicit(keep=0.3, states=3, segment=16, sinks=3, window=10, quota="layer"),
    "codes": Explicit(keep=1.0, keep_bits=(3, 4), states=2, coef_bits=8, segment=16, sinks=3, window=10),
    "period": longwave.FourierPaper(keep=0.3, states=12, sinks=3, window=10, reserve=20),
}
PAGED = [name for name in OPTIONS if name != "period"]


def bound(options, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    profile = longwave.Profile({}, {}, {}, torch.rand(1, H, D, generator=g), torch.rand(1, H, D, generator=g))
    return options.bind(CacheShape((0,), (), H, D, dtype), profile, None)


def new_layer(options, dtype=torch.float64):
    return bound(options, dtype=dtype).layer(0)


def kept_by(options):
    """Kept channels of K and V: bool [H, D] each."""
    return bound(options).kept[0]


def draw(batch, count, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, H, count, D, generator=g, dtype=dtype) for _ in range(2))


def draw_queries(batch, groups, count):
    g = torch.Generator().manual_seed(2)
    return torch.randn(batch, H * groups, count, D, dtype=torch.float64, generator=g)


def feed(layer, k, v, sizes, valid=None):
    start = 0
    for size in sizes:
        part = None if valid is None else valid[:, start : start + size]
        layer.write(k[:, :, start : start + size], v[:, :, start : start + size], part)
        layer.settle()
        start += size
    assert start == k.shape[2]


@pytest.fixture(params=list(OPTIONS))
def options(request):
    return OPTIONS[request.param]


# attention


@pytest.mark.parametrize("queries", [1, 17, pages.EXPAND + 1])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_attend_is_softmax_over_materialize(options, queries, groups, batch, causal):
    layer = new_layer(options)
    feed(layer, *draw(batch, 101), [50, 51])
    assert min(layer.store.tokens) > 0
    layer.write(*draw(batch, queries, seed=5))
    q = draw_queries(batch, groups, queries)
    got = ask(layer, q, 0.4, causal)
    dense_k, dense_v = (x.repeat_interleave(groups, 1) for x in layer.materialize())
    allowed = torch.ones(queries, 101 + queries, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(101)
    p = torch.softmax((q @ dense_k.mT * 0.4).masked_fill(~allowed, float("-inf")), -1)
    torch.testing.assert_close(got, p @ dense_v, rtol=0, atol=1e-9)


@pytest.mark.parametrize("queries", [3, 30], ids=["pages", "expanded"])
@pytest.mark.parametrize("causal", [True, False])
def test_attend_of_ragged_rows_with_padding_among_the_new_tokens(options, queries, causal):
    """Rows that hold other numbers of pages, one of them none, get the softmax over what they hold."""
    layer, lengths, groups = new_layer(options), [101, 60, 9], 3
    valid = torch.arange(101) >= 101 - torch.tensor(lengths)[:, None]
    feed(layer, *draw(3, 101), [101], valid)
    assert layer.store.tokens[2] == 0 < min(layer.store.tokens[:2])
    new = torch.ones(3, queries, dtype=torch.bool)
    new[0, :2] = new[1, : queries - 1] = False
    layer.write(*draw(3, queries, seed=5), new)
    q = draw_queries(3, groups, queries)
    got = ask(layer, q, 0.4, causal, valid=new)
    k, v = layer.materialize()
    for row in range(3):
        count = int(new[row].sum())
        held = lengths[row] + count
        own_k, own_v = (x[row, :, :held].repeat_interleave(groups, 0) for x in (k, v))
        allowed = torch.ones(count, held, dtype=torch.bool)
        if causal:
            allowed = allowed.tril(held - count)
        p = torch.softmax((q[row][:, new[row]] @ own_k.mT * 0.4).masked_fill(~allowed, float("-inf")), -1)
        torch.testing.assert_close(got[row][:, new[row]], p @ own_v, rtol=0, atol=1e-9)
    assert torch.isfinite(got).all()


def test_many_queries_unpack_a_row_once_and_few_do_not(monkeypatch):
    layer = new_layer(OPTIONS["dct"])
    feed(layer, *draw(2, 101), [101])
    seen = []
    for name in ("expand", "scores"):
        plain = getattr(layer.store, name)
        monkeypatch.setattr(layer.store, name, lambda *a, n=name, plain=plain: seen.append(n) or plain(*a))
    for queries, groups, expected in (
        (pages.EXPAND, 1, ["scores"]),
        (pages.EXPAND + 1, 1, ["expand"] * 2),
        (pages.EXPAND // 4, 4, ["scores"]),
        (pages.EXPAND // 4 + 1, 4, ["expand"] * 2),
    ):
        twin = copy.copy(layer)  # a store of its own would lose the count
        twin.dense = copy.deepcopy(layer.dense)
        twin.write(*draw(2, queries, seed=5))
        seen.clear()
        ask(twin, draw_queries(2, groups, queries), 0.4)
        assert seen == expected


def test_what_a_turn_takes_beside_is_bounded_said_and_given_back(llama):
    """One row of one layer at a time, dense; peak_bytes counts it."""
    memory = longwave.cache(llama, LOSSY["segments"], profile=random_profile(llama))
    with torch.no_grad():
        llama(tokens(2, 150), **into(memory))
        assert memory.report().scratch == 0
        llama(tokens(2, 50, seed=2), **into(memory))
    report = memory.report()
    assert report.scratch == 200 * memory.method.shape.token_bytes
    assert f"a pass took {report.scratch:,} more" in str(report)
    assert "scratch" not in report.parts
    assert report.nbytes + report.scratch <= memory.method.peak_bytes(200, batch=2)
    assert memory.method.peak_bytes(9) == memory.method.nbytes(9)  # no pages, no turn over them


def test_attend_in_query_blocks(options, monkeypatch):
    layer = new_layer(options)
    feed(layer, *draw(1, 101), [101])
    layer.write(*draw(1, 17, seed=5))
    q = draw_queries(1, 1, 17)
    whole = ask(layer, q, 0.4)
    monkeypatch.setattr("longwave.ops.attention.reference.MASK_ELEMENTS", 2 * 200 * 3)
    torch.testing.assert_close(ask(layer, q, 0.4), whole, rtol=0, atol=1e-12)


# storage


def test_compressed_channels_are_projections_of_the_dense_ones():
    """Independently: rows of cosines, least squares, one segment at a time."""
    options = OPTIONS["dct"]
    layer = new_layer(options)
    k, v = draw(2, 103)
    feed(layer, k, v, [103])
    t = torch.arange(16, dtype=torch.float64)
    basis = torch.stack([torch.cos(torch.pi * n * (t + 0.5) / 16) for n in range(3)], dim=1)
    for exact, held, kept in zip((k, v), layer.materialize(), kept_by(options), strict=True):
        expected = exact.clone()
        for segment in range(5):  # 103 - 3 - 10 = 90 waiting, 5 segments of 16
            at = slice(3 + 16 * segment, 3 + 16 * (segment + 1))
            for head in range(H):
                for channel in (~kept[head]).nonzero()[:, 0].tolist():
                    y = exact[:, head, at, channel]
                    expected[:, head, at, channel] = (basis @ torch.linalg.lstsq(basis, y.T).solution).T
        assert not torch.equal(expected, exact)
        torch.testing.assert_close(held, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PAGED)
def test_step_by_step_equals_all_at_once(name):
    k, v = draw(2, 97)
    layers = []
    for sizes in ([97], [1] * 97, [40, 1, 1, 30, 25]):
        layers.append(new_layer(OPTIONS[name]))
        feed(layers[-1], k, v, sizes)
    for layer in layers[1:]:
        assert layer.store.tokens == layers[0].store.tokens
        assert layer.nbytes == layers[0].nbytes
        for a, b in zip(layer.materialize(), layers[0].materialize(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "codes"])
def test_every_token_keeps_its_place(name):
    """Kept channels across every segment border, sinks and window are the dense ones, in order."""
    options = OPTIONS[name]
    layer = new_layer(options)
    k, v = draw(1, 120)
    feed(layer, k, v, [60] + [1] * 60)
    for exact, held, kept in zip((k, v), layer.materialize(), kept_by(options), strict=True):
        assert held.shape == exact.shape
        for head in range(H):
            assert torch.equal(held[0, head][:, kept[head]], exact[0, head][:, kept[head]])
        first, last = options.sinks, options.window
        assert torch.equal(held[:, :, :first], exact[:, :, :first])
        assert torch.equal(held[:, :, -last:], exact[:, :, -last:])


@pytest.mark.parametrize("basis", list(BASES))
def test_all_states_are_exact(basis):
    layer = new_layer(Explicit(keep=0.0, states=9, segment=9, sinks=1, window=4, basis=basis))
    k, v = draw(2, 77)
    feed(layer, k, v, [50, 27])
    for exact, held in zip((k, v), layer.materialize(), strict=True):
        torch.testing.assert_close(held, exact, rtol=0, atol=1e-9)


def test_rows_of_different_lengths(options):
    """Row by row, a padded batch holds what single rows hold, whatever the chunks."""
    k, v = draw(3, 110)
    pads = [0, 37, 109]
    valid = torch.stack([torch.arange(110) >= pad for pad in pads])
    together = new_layer(options)
    feed(together, k, v, [60, 49, 1], valid)
    held = together.materialize()
    for row, pad in enumerate(pads):
        alone = new_layer(options)
        sizes = [max(0, 60 - pad), 49 - max(0, pad - 60), 1]
        feed(alone, k[row : row + 1, :, pad:], v[row : row + 1, :, pad:], [s for s in sizes if s])
        for a, b in zip(held, alone.materialize(), strict=True):
            torch.testing.assert_close(a[row : row + 1, :, : 110 - pad], b, rtol=0, atol=1e-9)
            assert not a[row, :, 110 - pad :].any()


# bytes


def padded(size):
    """A field of a page begins at a multiple of 16 bytes."""
    return (size + 15) // 16 * 16


def page(options, kept_k, kept_v, itemsize):
    """Bytes of a segment: heads that keep as many channels share a field [h, T, n] and one [h, S, c]."""
    if options.keep_bits:
        keys = H * D * 6 + H * 2 * D * 2  # 3 bits for 16 tokens are 6 bytes; a scale and a zero a channel
        values = H * 16 * 4 + H * 16 * 2  # 4 bits for 8 channels are 4 bytes; a scale a token
        return keys + values + H * 2 * D + padded(H * 2 * 2)  # two coefficients of 8 bits a channel, a gain each
    total = 0
    for kept in (kept_k, kept_v):
        counts = kept.sum(-1).tolist()
        for n in set(counts):
            heads = counts.count(n)
            total += padded(heads * options.segment * n * itemsize) + padded(
                heads * options.states * (D - n) * itemsize
            )
    return total


def formula(options, length, kept_k, kept_v, itemsize):
    """Bytes of one row, from the text of docs/fourier.md: pages, everything else dense in blocks of 64 tokens."""
    waiting = max(0, length - options.sinks - options.window)
    period = isinstance(options, longwave.FourierPaper)
    whole = 0 if period and waiting <= options.states else 1 if period else options.segment
    middle = waiting // whole * whole if whole else 0
    total = (length - middle + 63) // 64 * 64 * 2 * H * D * itemsize
    if not middle:
        return total
    if not period:  # the index: for K and V, each head (int64) and the order of its channels (int16)
        pages = middle // options.segment
        return total + pages * page(options, kept_k, kept_v, itemsize) + 2 * (H * 8 + H * D * 2)
    total += (
        2 * (2 * H * D + H) * 8
    )  # the index, int64: for K and V, each channel's place there and back, and the heads
    for kept in (kept_k, kept_v):
        n = int(kept.sum())
        c = H * D - n
        total += (middle * n + options.states * c) * itemsize + 4 * c * max(4, itemsize)
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 5, 28, 29, 90, 333])
def test_bytes_equal_the_formula(options, dtype, length):
    layer = new_layer(options, dtype)
    k, v = draw(1, length, dtype=dtype)
    layer.write(k, v)
    layer.settle()
    expected = formula(options, length, *kept_by(options), k.element_size())
    assert layer.nbytes == expected
    method = bound(options, dtype=dtype)
    assert method.layer_bytes(0, length) == method.nbytes(length) == expected
    three = method.layer(0)
    three.write(*draw(3, length, dtype=dtype))
    three.settle()
    assert three.nbytes == method.nbytes(length, 3)


@pytest.mark.parametrize("name", PAGED)
def test_bytes_while_growing(name):
    """A token at a time: never more than the formula, and never above the peak that a size budget is computed with."""
    method, (k, v) = bound(OPTIONS[name]), draw(1, 200)
    layer, most = method.layer(0), 0
    for t in range(200):
        layer.write(k[:, :, t : t + 1], v[:, :, t : t + 1])
        layer.settle()
        assert layer.nbytes == method.layer_bytes(0, t + 1)
        most = max(most, layer.nbytes)
    assert most <= method.peak_bytes(200)


def test_nothing_of_a_prompt_is_pinned(options):
    """No tensor held shares memory with the prompt's, and none is a view of something larger."""
    layer = new_layer(options)
    k, v = draw(2, 150)
    layer.write(k, v)
    layer.settle()
    own = [x for tensors in layer.parts().values() for x in tensors]
    theirs = {k.untyped_storage().data_ptr(), v.untyped_storage().data_ptr()}
    assert not theirs & {x.untyped_storage().data_ptr() for x in own}
    assert sum(x.numel() * x.element_size() for x in own) == storage_bytes(own) == layer.nbytes


def test_the_store_is_not_copied_for_every_token():
    layer = new_layer(OPTIONS["dct"])
    k, v = draw(1, 130)
    seen = set()
    for t in range(130):
        layer.write(k[:, :, t : t + 1], v[:, :, t : t + 1])
        layer.settle()
        if layer.store is not None:
            seen.add(layer.store.pages.data_ptr())
    assert len(seen) <= (130 - 13) // 16


# through models


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("options", [dict(keep=0.0, states=16), dict(keep=1.0, states=2)], ids=["states", "kept"])
def test_nothing_lost_equals_dense(dtype, options):
    model = build("llama", dtype)
    ids = tokens(2, 90)
    expected = model(ids, use_cache=False).logits
    memory = longwave.cache(model, Explicit(segment=16, sinks=2, window=8, **options))
    with torch.no_grad():
        got = [model(ids[:, a:b], **into(memory)).logits for a, b in ((0, 60), (60, 89), (89, 90))]
    assert any(layer.store is not None for layer in memory.memory_layers())
    atol = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=atol)


LOSSY = {
    "segments": Explicit(keep=0.25, states=2, segment=16, sinks=2, window=8),
    "ragged": Explicit(keep=0.25, states=2, segment=16, sinks=2, window=8, quota="layer"),
    "planned": longwave.Fourier(segment=16, sinks=2, window=8),
    "merged": longwave.Fourier(segment=16, sinks=2, window=8),
    "period": longwave.FourierPaper(states=16, sinks=2, window=8, reserve=16),
}


@pytest.fixture(params=list(LOSSY))
def lossy(request):
    make = merging_profile if request.param == "merged" else random_profile
    return lambda model: longwave.cache(model, LOSSY[request.param], profile=make(model))


@pytest.mark.parametrize("chunk", [None, 13])
def test_a_row_does_not_depend_on_the_others(models, lossy, chunk):
    model = models["llama"][0]
    ids, mask = left_padded(3, 80, [31, 0, 77])
    options = dict(max_new_tokens=40, do_sample=False, output_logits=True, return_dict_in_generate=True)
    options |= {} if chunk is None else {"prefill_chunk_size": chunk}
    memory = lossy(model)
    together = model.generate(ids, attention_mask=mask, **into(memory), **options)
    assert all(torch.isfinite(x).all() for x in together.logits)
    for row, pad in enumerate((31, 0, 77)):
        if chunk is not None and pad % chunk:  # chunks would begin elsewhere in the row
            continue
        alone = model.generate(
            ids[row : row + 1, pad:], attention_mask=mask[row : row + 1, pad:], **into(lossy(model)), **options
        )
        assert torch.equal(together.sequences[row, 80:], alone.sequences[0, 80 - pad :])
        torch.testing.assert_close(together.logits[-1][row], alone.logits[-1][0], rtol=1e-3, atol=1e-3)
    assert min(layer.store.tokens[1] for layer in memory.memory_layers()) > 0


def test_it_really_compresses(llama, lossy):
    """Lossy settings must change the logits: a silent no-op would pass every test of exactness."""
    ids = tokens(1, 300)
    exact = llama(ids, use_cache=False).logits[:, -1]
    memory = lossy(llama)
    with torch.no_grad():
        llama(ids[:, :299], **into(memory))
        got = llama(ids[:, 299:], **into(memory)).logits[:, -1]
    assert memory.nbytes < 0.8 * memory.dense_nbytes
    assert (got - exact).abs().max() > 1e-2


def test_beams_reorder_the_compressed_past(models, lossy):
    """Beam search with k beams on a compressed cache equals replaying each result alone."""
    model = models["llama"][0]
    ids = tokens(1, 70)
    memory = lossy(model)
    out = model.generate(
        ids,
        **into(memory),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=30,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        replay, total = lossy(model), 0.0
        with torch.no_grad():
            logits = model(ids, **into(replay)).logits[:, -1]
            for token in sequence[70:]:
                total += torch.log_softmax(logits, -1)[0, token].item()
                logits = model(token.view(1, 1), **into(replay)).logits[:, -1]
        assert total == pytest.approx(score.item(), abs=2e-3)


def test_several_tokens_at_once_equal_one_by_one_within_the_open_segment(llama, lossy):
    ids, new = tokens(2, 66), tokens(2, 6, seed=2)
    at_once, stepwise = lossy(llama), lossy(llama)
    with torch.no_grad():
        for memory in (at_once, stepwise):
            llama(ids, **into(memory))
        before = [layer.store.tokens for layer in stepwise.memory_layers()]
        expected = torch.cat([llama(new[:, i : i + 1], **into(stepwise)).logits for i in range(6)], 1)
        assert before == [layer.store.tokens for layer in stepwise.memory_layers()]  # nothing crossed the window
        torch.testing.assert_close(llama(new, **into(at_once)).logits, expected, rtol=1e-4, atol=1e-4)


def test_prompts_shorter_than_sinks_and_window_stay_dense(llama):
    memory = longwave.cache(llama, Explicit(keep=0.0, states=2, segment=16, sinks=4, window=40))
    ids = tokens(1, 30)
    with torch.no_grad():
        got = llama(ids, **into(memory)).logits
    torch.testing.assert_close(got, llama(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert all(layer.store is None for layer in memory.memory_layers())
    assert "dense" in str(memory.report())


def test_crop_keeps_to_the_dense_tail(llama, lossy):
    memory, twin = lossy(llama), lossy(llama)
    ids, guess, new = tokens(1, 80), tokens(1, 5, seed=2), tokens(1, 3, seed=3)
    with torch.no_grad():
        for m in (memory, twin):
            llama(ids, **into(m))
        memory.activate_past_recording()
        llama(guess, **into(memory))
        memory.crop(-5)
        assert memory.get_seq_length() == 80
        got, expected = (llama(new, **into(m)).logits for m in (memory, twin))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="compressed already"):
        memory.crop(-70)


def test_recording_postpones_compression_by_one_pass_only(llama):
    memory = longwave.cache(llama, LOSSY["segments"], profile=random_profile(llama))
    memory.activate_past_recording()
    with torch.no_grad():
        llama(tokens(1, 20), **into(memory))
        llama(tokens(1, 6), **into(memory))  # a segment is due, and waits
        assert all(layer.store is None for layer in memory.memory_layers())
        llama(tokens(1, 1), **into(memory))
    assert all(layer.store is not None for layer in memory.memory_layers())


def test_recording_does_not_hold_a_whole_prompt_dense(llama, lossy):
    """Prompt lookup starts recording before the prompt is read."""
    memory = lossy(llama)
    memory.activate_past_recording()
    with torch.no_grad():
        llama(tokens(1, 300), **into(memory))
    assert memory.report().ratio < 0.8
    memory.crop(-5)
    assert memory.get_seq_length() == 295
    memory.reset()
    assert not any(layer.record_past for layer in memory.memory_layers())


def test_inference_mode_and_back(llama, lossy):
    memory = lossy(llama)
    ids, mask = left_padded(2, 90, [30, 0])
    with torch.inference_mode():
        llama(ids, attention_mask=mask, **into(memory))
        llama(tokens(2, 1), attention_mask=torch.cat([mask, mask[:, -1:]], 1), **into(memory))
    mask = torch.nn.functional.pad(mask, (0, 60), value=1)
    out = llama.generate(
        torch.cat([ids, tokens(2, 60, seed=4)], 1), attention_mask=mask, **into(memory), max_new_tokens=40
    )
    assert out.shape == (2, 190)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_peak_covers_rows_of_different_lengths(name):
    method = bound(OPTIONS[name])
    for pads in ([0, 1, 1, 1], [0, 20, 70, 119], [0, 0, 0, 50]):
        layer, (k, v) = method.layer(0), draw(4, 120)
        valid = torch.stack([torch.arange(120) >= pad for pad in pads])
        most = 0
        for start in range(0, 120, 5):
            layer.write(k[:, :, start : start + 5], v[:, :, start : start + 5], valid[:, start : start + 5])
            layer.settle()
            most = max(most, layer.nbytes)
        assert most <= method.peak_bytes(120, batch=4)


def test_deepcopies_do_not_share_the_store(llama, lossy):
    memory = lossy(llama)
    with torch.no_grad():
        llama(tokens(1, 90), **into(memory))
        twin = copy.deepcopy(memory)
        expected = llama(tokens(1, 4, seed=3), **into(twin)).logits
        llama(tokens(1, 90, seed=9), **into(memory))
        fresh = lossy(llama)
        llama(tokens(1, 90), **into(fresh))
        torch.testing.assert_close(llama(tokens(1, 4, seed=3), **into(fresh)).logits, expected)
    assert twin.nbytes > 0


def test_half_precision_stays_close_to_float32():
    model, half = build("llama"), build("llama", torch.bfloat16)
    ids = tokens(1, 100)
    made = []
    for m in (model, half):
        memory = longwave.cache(m, LOSSY["segments"], profile=random_profile(m))
        with torch.no_grad():
            m(ids, **into(memory))
        made.append(memory.layers[0].materialize()[0].float())
        layout = memory.layers[0].store.layout
        assert layout.dtype == layout.k[0].states.dtype == m.dtype
    assert (made[0] - made[1]).abs().max() < 0.02 * made[0].abs().max()
