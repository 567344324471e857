"""What every selecting method promises: all is kept, summaries follow it exactly, sinks and window are always read."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import longwave
from longwave.frame import Pass
from longwave.store.tokens import capacity
from tests.conftest import into, left_padded, shape_of, tokens
from tests.methods import naive
from tests.methods.naive import SCALE, D, G, H, draw, drive
from tests.methods.test_evicting import run, step_of


@dataclass(frozen=True)
class Means(longwave.Selecting):
    """A third party's method: a chunk is worth what its mean key is to the group's first head."""

    name: ClassVar[str] = "means"
    summaries: ClassVar[int] = 1

    def summarise(self, k, real):
        return (k * real[..., None]).sum(-2, keepdim=True) / real.sum(-1).clamp(min=1)[..., None, None]

    def worth(self, q, summary):
        return (q[:, :, :1] @ summary[..., 0, :].mT)[:, :, 0]


SMALL = dict(chunk=4, sinks=3, window=10)
METHODS = {
    "quest": longwave.Quest(full_layers=0, **SMALL),
    "means": Means(**SMALL),
    "chunks-of-7": longwave.Quest(full_layers=0, chunk=7, sinks=0, window=1),
    "chunks-of-1": longwave.Quest(full_layers=0, chunk=1, sinks=2, window=5),
}


@pytest.fixture(params=list(METHODS))
def method(request):
    return METHODS[request.param]


def new_layer(method, budget=0.3, dtype=torch.float64):
    return method.bind(naive.shape(dtype), None, budget).layer(0)


def summary_of(method, k):
    """Of one row and head's keys [n, D], chunk by chunk: [chunks, summaries, D]."""
    made = []
    for start in range(0, len(k), method.chunk):
        part = k[start : start + method.chunk]
        if isinstance(method, Means):
            made.append(torch.stack([part.mean(0)]))
        else:
            made.append(torch.stack([part.min(0).values, part.max(0).values]))
    return torch.stack(made)


def check_summaries(layer):
    k, _ = layer.dense.view()
    for row, length in enumerate(layer.dense.lengths):
        for head in range(H):
            if length:
                expected = summary_of(layer.method, k[row, head, :length])
                torch.testing.assert_close(layer.summary[row, head, : len(expected)], expected, rtol=0, atol=1e-12)


# what is read


def read_by_a_step(method, budget, q, k):
    """Places that one head's step reads: all chunks of sinks and window, then those worth most. q [G, D], k [n, D]."""
    count, chunk = len(k), method.chunk
    chunks = [range(start, min(count, start + chunk)) for start in range(0, count, chunk)]
    always = {i for i, c in enumerate(chunks) if c[0] < method.sinks or c[-1] >= count - method.window}
    # a chunk of the middle has room for all its tokens, and is neither first nor last
    always |= {len(chunks) - 1} if count % chunk else set()
    worth = []
    for mine in summary_of(method, k):
        if isinstance(method, Means):
            worth.append(float(q[0] @ mine[0]))
        else:  # the most that any key between the least and the greatest could reach, to any of the group
            worth.append(max(float(torch.maximum(x * mine[0], x * mine[1]).sum()) for x in q))
    free = sorted(set(range(len(chunks))) - always, key=lambda i: -worth[i])
    chosen = always | set(free[: math.floor(budget * len(free))])
    return sorted(place for i in chosen for place in chunks[i])


@pytest.mark.parametrize("budget", [0.01, 0.3, 0.7])
@pytest.mark.parametrize("pads", [[0], [0, 31, 83]], ids=["alone", "padded"])
def test_a_step_reads_what_its_twin_reads(method, budget, pads):
    k, v, q = draw(len(pads), 110, seed=2, sharp=3)
    valid = None if pads == [0] else torch.arange(110) >= torch.tensor(pads)[:, None]
    layer = new_layer(method, budget)
    run(layer, k, v, q, [85], valid)
    read = 0
    for i, out in enumerate(drive(layer, k, v, q, [1] * 25, valid, start=85)):
        for row, pad in enumerate(pads):
            for head in range(H):
                keys, values = (x[row, head, pad : 86 + i] for x in (k, v))
                asked = q[row, head * G : (head + 1) * G, 85 + i]
                places = read_by_a_step(method, budget, asked, keys)
                read += len(places) < len(keys)
                p = torch.softmax(asked @ keys[places].T * SCALE, -1)
                torch.testing.assert_close(
                    out[row, head * G : (head + 1) * G, 0], p @ values[places], rtol=0, atol=1e-9
                )
    assert read > 0
    check_summaries(layer)


@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (4, 64), (5, 7), (16, 16), (1, 200)])
def test_sinks_and_window_are_read_whatever_the_length(chunk, sinks, window):
    """The chunks that a step may read are never fewer than those that it must."""
    for budget in (1e-3, 0.5, 0.999):
        bound = longwave.Quest(chunk=chunk, sinks=sinks, window=window).bind(naive.shape(), None, budget)
        for held in range(1, 150):
            chunks = math.ceil(held / chunk)
            must = sum(i * chunk < sinks or (i + 1) * chunk > held - window for i in range(chunks))
            assert bound.chunks(held) == must + math.floor(budget * (chunks - must)), held


def test_a_prompt_and_a_chunk_read_everything(method):
    k, v, q = draw(2, 110)
    dense, layer = longwave.Dense().bind(naive.shape(), None, None).layer(0), new_layer(method, 0.01)
    for ours, theirs in zip(*(drive(x, k, v, q, [60, 2, 40, 8]) for x in (layer, dense)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_all_of_it_is_plain_attention(method, llama):
    ids = tokens(2, 60)
    memory = longwave.cache(llama, method, 1.0)
    with torch.no_grad():
        got = [llama(ids[:, a:b], **into(memory)).logits for a, b in ((0, 50), *((i, i + 1) for i in range(50, 60)))]
    torch.testing.assert_close(torch.cat(got, 1), llama(ids, use_cache=False).logits, rtol=0, atol=1e-4)
    memory.crop(-3)
    assert all(layer.summary is None for layer in memory.memory_layers())


def test_the_first_layers_may_read_everything(llama):
    memory = longwave.cache(llama, longwave.Quest(full_layers=2, **SMALL), 0.1)
    with torch.no_grad():
        llama(tokens(1, 60), **into(memory))
    assert [layer.summary is None for layer in memory.memory_layers()] == [True, True, False]


def test_it_really_selects(llama):
    ids, answers = tokens(1, 200), {}
    for budget in (1.0, 0.1):
        memory = longwave.cache(llama, longwave.Quest(full_layers=0, **SMALL), budget)
        with torch.no_grad():
            llama(ids[:, :199], **into(memory))
            answers[budget] = llama(ids[:, 199:], **into(memory)).logits
    assert (answers[1.0] - answers[0.1]).abs().max() > 1e-2


# summaries


@pytest.mark.parametrize("seed", range(6))
def test_summaries_follow_any_history(method, seed):
    """Passes of any size, padding, crops, rows that move, copies: always those of the tokens that are there."""
    g = torch.Generator().manual_seed(seed)

    def pick(most):
        return int(torch.randint(0, most, (), generator=g))

    layer, batch, mask = new_layer(method), 3, torch.zeros(3, 0, dtype=torch.bool)
    twin = longwave.Dense().bind(naive.shape(), None, None).layer(0)
    for turn in range(25):
        action = pick(6) if mask.shape[1] else 0
        if action <= 2:
            size = (1, 2 + pick(20), 40 + pick(60))[action if mask.shape[1] else 2]
            new = torch.ones(batch, size, dtype=torch.bool)
            if not mask.shape[1]:
                new = torch.arange(size) >= torch.tensor([0, pick(30), pick(30)])[:, None]
            mask = torch.cat([mask, new], 1)
            k, v, q = (
                torch.nn.functional.pad(x, (0, 0, mask.shape[1] - size, 0)) for x in draw(batch, size, seed + turn)
            )
            for x in (layer, twin):
                for _ in drive(x, k, v, q, [size], mask, start=mask.shape[1] - size):
                    pass
        elif action == 3:
            count = 1 + pick(min(30, int(mask.sum(-1).min())))
            for x in (layer, twin):
                x.crop(-count)
            mask = mask[:, :-count]
        elif action == 4:
            order = torch.tensor([pick(batch) for _ in range(batch)])
            for x in (layer, twin):
                x.batch_select_indices(order)
            mask = mask[order]
        else:
            layer, twin = copy.deepcopy(layer), copy.deepcopy(twin)
        if not mask.shape[1]:
            layer.reset()
            twin.reset()
            continue
        assert layer.dense.lengths == twin.dense.lengths == mask.sum(-1).tolist()
        assert torch.equal(layer.dense.view()[0], twin.dense.view()[0])
        check_summaries(layer)
        assert layer.summary.shape[2] == layer.bound.every(layer.dense.longest)


def test_crop_over_a_chunks_border_and_on():
    """What came off must neither stay in a summary nor keep what comes later out of it."""
    layer = new_layer(METHODS["quest"])
    k, v, q = draw(1, 200)
    run(layer, k * 50, v, q, [40])
    layer.crop(-21)
    check_summaries(layer)
    run(layer, *draw(1, 19, seed=5), [10, *[1] * 9])
    check_summaries(layer)
    layer.crop(-(38 - 12))  # to the end of a chunk
    check_summaries(layer)
    run(layer, *draw(1, 90, seed=6), [90])
    layer.crop(-(102 - 64))  # and of the buffer's block
    check_summaries(layer)
    assert layer.nbytes == layer.bound.nbytes(64)


@pytest.mark.parametrize("pads", [[0, 0], [0, 9]], ids=["even", "padded"])
@pytest.mark.parametrize("budget", [0.01, 0.3, 0.7])
def test_a_step_on_the_device_reads_what_a_pass_does(method, budget, pads):
    valid = torch.arange(90) >= torch.tensor(pads)[:, None]
    k, v, q = draw(2, 90, sharp=3)
    passes, steps = (run(new_layer(method, budget), k, v, q, [40], valid) for _ in range(2))
    steps.reserve(50)
    step = step_of(steps, 0)
    for i, expected in enumerate(drive(passes, k, v, q, [1] * 50, valid, start=40)):
        now = slice(40 + i, 41 + i)
        assert steps._most >= max(map(steps.bound.chunks, passes.dense.lengths))
        p = Pass(q[:, :, now], k[:, :, now], v[:, :, now], SCALE, phase="step")
        torch.testing.assert_close(steps.run_step(p, step), expected, rtol=0, atol=1e-9)
        steps.stepped(1)
        for count in (step.at, step.seen, step.total):
            count.add_(1)
    steps.release()
    check_summaries(steps)
    assert steps.nbytes == passes.nbytes


def test_reserved_summaries_are_those_of_what_is_there():
    layer = new_layer(METHODS["quest"])
    k, v, q = draw(2, 100)
    run(layer, k, v, q, [50])
    layer.reserve(60)
    assert layer.summary.shape[2] >= math.ceil(110 / 4)
    layer.release()
    check_summaries(layer)
    assert layer.nbytes == layer.bound.nbytes(50, 2)


# bytes


def test_bytes_are_exact(method):
    for dtype in (torch.float64, torch.bfloat16):
        bound = method.bind(naive.shape(dtype), None, 0.3)
        for length in (1, 5, 63, 64, 65, 200):
            for batch in (1, 3):
                layer = run(bound.layer(0), *draw(batch, length, dtype=dtype), [length])
                room = capacity(length)
                summaries = math.ceil(room / method.chunk) * H * D * dtype.itemsize * method.summaries
                expected = batch * (room * 2 * H * D * dtype.itemsize + summaries)
                assert layer.nbytes == bound.nbytes(length, batch) == expected
                for i in range(5):
                    run(layer, *draw(batch, 1, seed=i, dtype=dtype), [1])
                    assert layer.nbytes == bound.nbytes(length + i + 1, batch)


def test_bytes_of_a_models_cache(llama):
    memory = longwave.cache(llama, longwave.Quest(full_layers=1, **SMALL), 0.3)
    with torch.no_grad():
        llama(tokens(3, 150), **into(memory))
    assert memory.nbytes == memory.method.nbytes(150, 3)
    assert memory.report().parts["summaries"] == 2 * 3 * H * D * 4 * 2 * math.ceil(192 / 4)


def test_a_size_checks_what_it_holds(llama):
    method = longwave.Quest(full_layers=0, **SMALL)
    needed = method.bind(shape_of(llama), None, None).nbytes(200)
    longwave.cache(llama, method, f"{needed}B", max_tokens=200)
    with pytest.raises(ValueError, match="leave nothing to save"):
        longwave.cache(llama, method, f"{needed - 1}B", max_tokens=200)


# rows


def test_a_row_does_not_depend_on_the_others(llama):
    pads = [0, 13, 60]
    ids, mask = left_padded(3, 80, pads)
    options = dict(max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True)
    method = longwave.Quest(full_layers=0, **SMALL)
    together = llama.generate(ids, attention_mask=mask, **into(longwave.cache(llama, method, 0.3)), **options)
    for row, pad in enumerate(pads):
        alone = llama.generate(ids[row : row + 1, pad:], **into(longwave.cache(llama, method, 0.3)), **options)
        assert torch.equal(together.sequences[row, 80:], alone.sequences[0, 80 - pad :])
        torch.testing.assert_close(together.logits[-1][row], alone.logits[-1][0], rtol=1e-3, atol=1e-3)


def test_deepcopies_do_not_share(method):
    layer = run(new_layer(method), *draw(2, 90), [90])
    twin, again = copy.deepcopy(layer), copy.deepcopy(layer)
    run(layer, *draw(2, 40, seed=5), [*[1] * 30, 10])
    more = draw(2, 30, seed=6)
    got, expected = (torch.cat(list(drive(x, *more, [10, *[1] * 20])), 2) for x in (twin, again))
    assert torch.equal(got, expected)


# host memory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host memory is that of another device")
@pytest.mark.parametrize("pads", [[0, 0], [0, 37]], ids=["even", "padded"])
def test_host_memory_answers_alike(llama, pads):
    model = copy.deepcopy(llama).cuda()
    ids, mask = (x.cuda() for x in left_padded(2, 90, pads))
    whole = torch.nn.functional.pad(mask, (0, 60), value=1)
    new = tokens(2, 60, seed=3).cuda()
    logits, made = [], []
    for host in (False, True):
        memory = longwave.cache(model, longwave.Quest(full_layers=1, host=host, **SMALL), 0.3)
        with torch.no_grad():
            got, start = [model(ids, attention_mask=mask, **into(memory)).logits], 0
            for size in (1, 1, 20, *[1] * 38):
                part, seen = new[:, start : start + size], whole[:, : 90 + start + size]
                got.append(model(part, attention_mask=seen, **into(memory)).logits)
                start += size
        memory.batch_select_indices(torch.tensor([1, 0]))
        memory.crop(-7)
        logits.append(torch.cat(got, 1))
        made.append(memory)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    plain, far = made
    assert far.nbytes == plain.nbytes == far.method.nbytes(143, 2)
    assert far.report().parts["host memory"] == plain.report().parts["dense"]
    for ours, theirs in zip(far.memory_layers(), plain.memory_layers(), strict=True):
        assert ours.dense.k.device.type == "cpu"
        torch.testing.assert_close(ours.dense.k.cuda(), theirs.dense.k)
        assert (ours.summary is None) == (theirs.summary is None)
        if ours.summary is not None:
            torch.testing.assert_close(ours.summary, theirs.summary)


def test_host_memory_on_a_model_that_lies_there_is_refused(llama):
    with pytest.raises(ValueError, match=r"host=True .*on the CPU already"):
        longwave.cache(llama, longwave.Quest(host=True), 0.3)


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chunk=0), "chunk is a whole number of tokens, at least 1; got 0"),
        (dict(sinks=-1), "sinks is a whole number of tokens, at least 0; got -1"),
        (dict(window=0), "window is a whole number of tokens, at least 1; got 0"),
        (dict(full_layers=-1), "full_layers is a whole number of layers, at least 0; got -1"),
        (dict(host=1.5), "host is True, False or a directory for files of keys and values, got 1.5"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.Quest(**options)
