"""infllm: which blocks are read and at which distance, what stands for a block, and that nothing else decides."""

from dataclasses import replace

import pytest
import torch

import longwave
from longwave.frame import Pass
from tests.conftest import into, shape_of, tokens
from tests.methods import naive
from tests.methods.naive import SCALE, D, G, H, draw
from tests.methods.test_evicting import step_of
from tests.methods.test_longcache import COMINGS, MODULE, Turning, answers, drive, new_layer, stretches
from tests.reading import read_in

SMALL = dict(sinks=2, window=13, block=4, blocks=2, representatives=2, chunk=8)
METHOD = longwave.InfLLM(**SMALL)
ALL = longwave.InfLLM(**SMALL | dict(blocks=1000))


def oracle(method, k, v, q, i, head, places):
    """The answer to one query and its share of each place: a far one stands `window - 1` before it."""
    apart = torch.tensor([min(i - j, method.window - 1) for j in places])[None]
    asked = Turning()._by(q[None, head : head + 1, i : i + 1].expand(-1, -1, len(places), -1), apart)[0, 0]
    p = torch.softmax((asked * k[head // G, places]).sum(-1) * SCALE, -1)
    return p @ v[head // G, places], p


def mean_keys(method, k, mass, count):
    """[H, count, D]: of each block the mean of its keys that got most."""
    out = torch.zeros(H, count, D, dtype=k.dtype)
    for h in range(H):
        for block in range(count):
            first = method.sinks + block * method.block
            places = sorted(range(first, first + method.block), key=lambda j: -mass[h][j])
            out[h, block] = k[h, places[: method.representatives]].mean(0)
    return out


def chosen(method, means, q, start, stop):
    """Blocks that those who ask together read."""
    far = torch.full((1, stop - start), method.window - 1)
    asked = Turning()._by(q[None, :, start:stop], far)[0].mean(1)
    worth = sum(means[head // G] @ asked[head] for head in range(H * G))
    return sorted(sorted(range(means.shape[1]), key=lambda b: -float(worth[b]))[: method.blocks])


def twin(method, k, v, q, parts):
    """Answers [H * G, n, D] of one row whose passes bring so many tokens, and what its keys got in the window."""
    out, start, mass = torch.zeros_like(q), 0, [[0.0] * k.shape[1] for _ in range(H)]
    for count in parts:
        for a, b in stretches(method, start, start + count):
            ready = max(0, (a - method.sinks - method.window) // method.block)
            blocks = chosen(method, mean_keys(method, k, mass, ready), q, a, b) if ready else []
            far = [method.sinks + n * method.block + j for n in blocks for j in range(method.block)]
            rest = range(method.sinks + ready * method.block, b)
            for i in range(a, b):
                places = [*range(min(method.sinks, i + 1)), *far, *(j for j in rest if j <= i)]
                for head in range(H * G):
                    out[head, i], p = oracle(method, k, v, q, i, head, places)
                    for j, got in zip(places, p.tolist(), strict=True):
                        mass[head // G][j] += got if i - j < method.window else 0
        start += count
    return out, mass


@pytest.mark.parametrize("coming", list(COMINGS))
@pytest.mark.parametrize("pads", [[0], [0, 11, 45]], ids=["alone", "padded"])
def test_each_row_reads_what_its_twin_reads(coming, pads):
    sizes = COMINGS[coming]
    given = draw(len(pads), sum(sizes), seed=4)
    valid = naive.coming_with(pads, sum(sizes))
    layer = new_layer(METHOD)
    found = answers(layer, *given, sizes, valid)
    for row, own, mine, parts in naive.rows_of(given, sizes, valid):
        want, mass = twin(METHOD, *mine, parts)
        torch.testing.assert_close(found[row][:, own], want, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.dense.column("mass")[row, :, : sum(parts)], torch.tensor(mass).float())
        ready = METHOD.full(sum(parts))
        assert layer._known[row] == ready
        torch.testing.assert_close(layer.means[row, :, :ready], mean_keys(METHOD, mine[0], mass, ready))


@pytest.mark.parametrize("options", [dict(blocks=0), dict(sinks=0), dict(block=1, representatives=1), dict(block=7)])
def test_other_options(options):
    method = longwave.InfLLM(**SMALL | options)
    k, v, q = draw(1, 60, seed=5)
    found = answers(new_layer(method), k, v, q, [58, 1, 1])
    torch.testing.assert_close(found[0], twin(method, k[0], v[0], q[0], [58, 1, 1])[0], rtol=0, atol=1e-6)


# all blocks, and no block


@pytest.mark.parametrize("sizes", [[70], [1] * 70, [9, 1, 40, 20]], ids=["prompt", "steps", "chunks"])
def test_of_all_blocks_it_is_attention_with_a_ceiling_on_distance(sizes):
    k, v, q = draw(1, 70)
    found = answers(new_layer(ALL), k, v, q, sizes)
    for i in range(70):
        for head in range(H * G):
            want, _ = oracle(ALL, k[0], v[0], q[0], i, head, list(range(i + 1)))
            torch.testing.assert_close(found[0, head, i], want, rtol=0, atol=1e-9)


def test_every_token_is_first_in_a_block_or_behind_them():
    layer, (k, v, q) = new_layer(ALL), draw(1, 90)
    read = []
    places = layer._places
    layer._places = lambda *given: read.append(places(*given)) or read[-1]
    answers(layer, k, v, q, [40, 1, 30, 19])
    for index, count in read:
        assert index[0, : count[0]].tolist() == list(range(int(count[0])))
    assert layer._known == [(90 - 2 - 13) // 4]


def test_within_the_window_it_is_the_model(llama):
    ids = tokens(1, 40)
    method = longwave.InfLLM(sinks=2, window=40, block=4, blocks=0, chunk=8)
    stock = read_in(llama, longwave.cache(llama, "dense"), ids, (30, 1, 1, 8))
    torch.testing.assert_close(read_in(llama, longwave.cache(llama, method), ids, (30, 1, 1, 8)), stock)


# positions, chunks, order


def test_no_place_exceeds_the_window_and_those_who_ask():
    layer = new_layer(METHOD)
    k, v, q = draw(1, 20 * 21)
    answers(layer, k, v, q, [220, *[1] * 20, 40, 3, *[1] * 7, 130])
    assert layer.progress.rotary.highest == METHOD.positions - 1


@pytest.mark.parametrize("size", [8, 40])
def test_chunks_of_whole_chunks_are_the_prompt(size, monkeypatch):
    monkeypatch.setattr(longwave.InfLLM, "alone", 0)
    k, v, q = draw(2, 120, seed=9)
    want = answers(new_layer(METHOD), k, v, q, [120])
    found = answers(new_layer(METHOD), k, v, q, [size] * (120 // size))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [[60], [33, 27], [30, *[1] * 10, 20]], ids=str)
def test_later_tokens_change_nothing_before_their_chunk(sizes):
    k, v, q = draw(1, 60, seed=2)
    before = answers(new_layer(METHOD), k, v, q, sizes)
    other = [torch.cat([x[:, :, :56], x[:, :, 56:] + 1], 2) for x in (k, v, q)]  # 56: a chunk begins
    after = answers(new_layer(METHOD), *other, sizes)
    assert torch.equal(before[:, :, :56], after[:, :, :56])
    assert not torch.equal(before[:, :, 56:], after[:, :, 56:])


def test_what_a_crop_took_back_stands_for_no_block():
    """A block that comes back into the window is made anew of the keys that are there when it leaves."""
    k, v, q = draw(1, 80, seed=3)
    layer = new_layer(METHOD)
    answers(layer, k, v, q, [60])
    layer.crop(-20)
    assert layer._known == [METHOD.full(40)]
    list(drive(layer, k, v + 1, q, [40], start=40))
    ready = METHOD.full(80)
    assert layer._known == [ready]
    mass = layer.dense.column("mass")[0].tolist()
    torch.testing.assert_close(layer.means[0, :, :ready], mean_keys(METHOD, k[0], mass, ready))


# a needle, and the head that asks for it


@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_needle_of_one_head_is_found(group):
    """In the KV head of the query head that asks, and in no other, a hundred blocks back."""
    heads, method = 4, longwave.InfLLM(**SMALL | dict(blocks=1))
    shape = replace(naive.shape(), kv_heads=heads, query_heads=heads * group)
    for head in range(heads * group):
        layer = method.bind(shape, None, None).layer(0)
        layer.progress.rotary = Turning()
        g = torch.Generator().manual_seed(head)
        k = torch.randn(1, heads, 500, D, generator=g, dtype=torch.float64) * 0.01
        v, q = torch.zeros_like(k), torch.zeros(1, heads * group, 500, D, dtype=torch.float64)
        slow = torch.tensor([3, 7])  # the slowest pair: turned by places, it stays what it is
        k[0, head // group, 60, slow], v[0, head // group, 60] = 30.0, 1.0
        q[0, head, 60:, slow] = 3.0
        *_, out = drive(layer, k, v, q, [499, 1])
        assert out[0, head, 0].min() > 0.99, head
        rest = [h for h in range(heads * group) if h // group != head // group]
        assert out[0, rest].abs().max() < 0.01


# steps on the device


@pytest.mark.parametrize("pads", [[0, 0], [0, 25]], ids=["even", "padded"])
def test_a_step_on_the_device_reads_what_a_pass_does(pads):
    check_steps(METHOD, pads)


def check_steps(method, pads):
    valid = torch.arange(70) >= torch.tensor(pads)[:, None]
    k, v, q = draw(2, 70)
    passes, steps = new_layer(method), new_layer(method)
    for layer in (passes, steps):
        list(drive(layer, k, v, q, [40], valid))
    steps.reserve(30)
    step = step_of(steps, 0)
    for i, expected in enumerate(drive(passes, k, v, q, [1] * 30, valid, start=40)):
        at = torch.tensor([[40 + i - pad] for pad in pads])
        now = slice(40 + i, 41 + i)
        step.positions.copy_(at)
        turned = (Turning()._by(x[:, :, now], at) for x in (q, k))
        p = Pass(*turned, v[:, :, now], SCALE, phase="step", positions=at, module=MODULE, rotary=Turning())
        torch.testing.assert_close(steps.run_step(p, step), expected, rtol=0, atol=1e-9)
        steps.stepped(1)
        if steps.ripe():
            steps.settle()
        for count in (step.at, step.seen, step.total):
            count.add_(1)
    steps.release()
    assert steps._known == passes._known
    for row, ready in enumerate(passes._known):
        torch.testing.assert_close(steps.means[row, :, :ready], passes.means[row, :, :ready])


# what is refused, and bytes


def test_bytes_and_words(llama):
    memory = longwave.cache(llama, METHOD)
    read_in(llama, memory, tokens(2, 200), (150, 50))
    bound = memory.method
    assert memory.nbytes == bound.nbytes(200, 2)
    dense = longwave.Dense().bind(shape_of(llama), None, None).nbytes(200, 2)
    mass = 4 * 256 * 2 * len(memory.layers) * bound.shape.kv_heads
    means = METHOD.full(256) * 2 * len(memory.layers) * bound.shape.kv_heads * bound.shape.head_dim * 4
    assert memory.nbytes == dense + mass + means
    assert str(bound) == "infllm(reads window=13, 2 blocks of 4, sinks=2)"


def test_what_is_refused(llama):
    with pytest.raises(ValueError, match=r"infllm turns tokens to 4,608 positions .* knows 512 .*: give a smaller"):
        longwave.cache(llama, "infllm")
    with pytest.raises(ValueError, match=r"keeps everything, so its budget is 1; got 0.5"):
        longwave.cache(llama, METHOD, 0.5)
    memory = longwave.cache(llama, METHOD)
    read_in(llama, memory, tokens(1, 40), (40,))
    with pytest.raises(NotImplementedError, match=r"is_causal=False goes over .* of 44 infllm reads 13"):
        llama(tokens(1, 4), is_causal=False, **into(memory))
    assert memory.get_seq_length() == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sinks=-1), "sinks is a whole number of tokens, at least 0; got -1"),
        (dict(block=0), "block is a whole number of tokens, at least 1; got 0"),
        (dict(blocks=-1), "blocks is a whole number of blocks, at least 0; got -1"),
        (dict(representatives=0), "representatives is a whole number of keys, at least 1; got 0"),
        (dict(representatives=5), "a block of 4 keys has no 5 representatives"),
        (dict(window=7), r"window is a whole number of tokens \(those that choose together.* at least 8; got 7"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.InfLLM(**SMALL | options)


# host memory


@pytest.fixture
def in_host(monkeypatch):
    """A cache whose tokens lie in host memory, of a model that is there too."""
    monkeypatch.setattr(longwave.InfLLM, "check", lambda self, device: None)
    return replace(METHOD, host=True, cached=1)


def test_what_lies_on_the_device_does_not_grow(llama, in_host):
    ids, found = tokens(1, 400), []
    memory = longwave.cache(llama, in_host)
    for end in (200, 400):
        read_in(llama, memory, ids[:, :end], (end - memory.get_seq_length() - 9, *[1] * 9))
        assert memory.nbytes == memory.method.nbytes(end)
        found.append(memory.report().parts)
    assert found[0]["read last"] == found[1]["read last"]
    assert found[0]["host memory"] < found[1]["host memory"]
    assert next(memory.memory_layers()).unsteady() == "keys and values lie in host memory"
