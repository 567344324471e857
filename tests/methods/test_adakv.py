"""adakv: snapkv's scores, shared out over the heads of a layer; each head holds its own number of tokens."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import longwave
from longwave.ops.attention.reference import dense_attention, ragged_step_attention
from longwave.store.ragged import RaggedBuffer
from longwave.store.tokens import capacity
from tests.conftest import into, left_padded, tokens
from tests.methods import naive
from tests.methods.naive import G, H, by_votes, draw, drive, limit
from tests.methods.test_evicting import run

SMALL = dict(sinks=2, window=7)
SIZES = (60, 9, *[1] * 40, 25, *[1] * 9)


@dataclass(frozen=True)
class Often(longwave.AdaKV):
    every: ClassVar[int] = 8


@dataclass(frozen=True)
class OftenSnap(longwave.SnapKV):
    every: ClassVar[int] = 8


def unlike(batch, count, seed=0):
    """Heads of different habits: the first attends to few tokens, always the same, the second to all alike."""
    k, v, q = draw(batch, count, seed, sharp=1.0)
    q[:, :G] = q[:, :G] / 20 + 3 * k[:, :1, 4:5]
    k[:, 0, 4] *= 2
    q[:, G:] /= 20
    return k, v, q


def layer_of(method, budget=None, dtype=torch.float64):
    return method.bind(naive.shape(dtype), None, budget).layer(0)


def places(layer, row=0):
    """What each head of a row holds, by its place in the text."""
    found = []
    for head in range(H):
        items, lengths = layer.head(head)
        found.append(items["position"][row, 0, : lengths[row]].tolist())
    return found


# what stays


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
def test_a_prompt_against_lists_and_loops(safeguard):
    """Every head's best `safeguard` of an even share, then the best of all heads."""
    method = Often(tokens=30, safeguard=safeguard, **SMALL)
    k, v, q = unlike(2, 90)
    layer = run(layer_of(method), k, v, q, [90])
    share = 30 - 9
    for row in range(2):
        ranked = []
        for h in range(H):
            head = naive.Head([naive.Token(t, k[row, h, t], v[row, h, t]) for t in range(90)], seen=90)
            head.queries = [q[row, h * G : (h + 1) * G, t] for t in range(83, 90)]
            scores = by_votes(head)
            ranked.append(sorted((-scores[i], h, i) for i in range(2, 83)))
        floor = int(safeguard * share)
        stays = [token for own in ranked for token in own[:floor]]
        rest = sorted(token for own in ranked for token in own[floor:])
        stays += rest[: H * share - len(stays)]
        for h, got in enumerate(places(layer, row)):
            assert got == [0, 1, *sorted(i for _, head, i in stays if head == h), *range(83, 90)]


def test_a_head_that_looks_at_few_tokens_leaves_its_room_to_the_other():
    layer = run(layer_of(Often(tokens=30, **SMALL)), *unlike(1, 200), [200])
    few, many = layer.far.counts[0]
    assert few + many == H * (30 - 7)
    assert few == 2 + 5  # sinks, and one peak with its neighbours; 4 are safe
    assert many > 1.6 * few


@pytest.mark.parametrize("given", [dict(tokens=30), {}], ids=["tokens", "budget"])
def test_with_everything_safe_it_is_snapkv(given):
    """In every pass, in steps too: the same tokens and the same answers."""
    k, v, q = unlike(2, sum(SIZES))
    budget = None if given else 0.3
    ours = layer_of(Often(safeguard=1, **given, **SMALL), budget)
    theirs = layer_of(OftenSnap(**given, **SMALL), budget)
    pairs = zip(drive(ours, k, v, q, SIZES), drive(theirs, k, v, q, SIZES), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert ours.held() == theirs.held()
        for h, held in enumerate(places(ours, 1)):
            assert held == theirs.dense.column("position")[1, h].tolist()


def test_answers_are_those_of_masked_attention():
    """Gathered and freed, or all tokens kept and those that went hidden: the same."""
    k, v, q = unlike(2, sum(SIZES))
    layer, start = layer_of(Often(tokens=30, **SMALL)), 0
    stays = [[list(range(0)) for _ in range(H)] for _ in range(2)]
    for size, got in zip(SIZES, drive(layer, k, v, q, SIZES), strict=True):
        end = start + size
        for row in range(2):
            for h in range(H):
                own, held = slice(h * G, (h + 1) * G), [*stays[row][h], *range(start, end)]
                for t in range(start, end):
                    hidden = torch.full((end,), float("-inf"), dtype=torch.float64)
                    hidden[[i for i in held if i <= t]] = 0
                    p = torch.softmax(q[row, own, t] @ k[row, h, :end].T * naive.SCALE + hidden, -1)
                    torch.testing.assert_close(got[row, own, t - start], p @ v[row, h, :end], rtol=0, atol=1e-9)
            stays[row] = places(layer, row)
        start = end


def test_the_layer_holds_its_budget_at_every_step():
    """Heads together, whatever each of them holds; the bytes are those that snapkv takes, but for rounding."""
    method = Often(safeguard=0, sinks=0, window=7)
    bound, plain = (m.bind(naive.shape(), None, 0.3) for m in (method, OftenSnap(sinks=0, window=7)))
    layer, most = bound.layer(0), limit(method, 0.3, 4)
    k, v, q = unlike(1, sum(SIZES))
    start = 0
    for size, _ in zip(SIZES, drive(layer, k, v, q, SIZES), strict=True):
        start += size
        assert layer.held()[0] * H == sum(map(len, places(layer)))
        assert layer.held()[0] <= most(start) + (method.every - 1 if size == 1 else 0)
        assert layer.nbytes <= bound.peak_bytes(start) <= plain.peak_bytes(start) + 2 * 64 * bound.shape.token_bytes
    few, many = layer.far.counts[0]
    assert few < many / 3


def test_bytes_say_what_heads_hold():
    """Nothing is padded from one head to the other: the slots are as many as tokens."""
    layer = run(layer_of(Often(tokens=100, safeguard=0, **SMALL)), *unlike(1, 400), [400])
    few, many = layer.far.counts[0]
    assert many > few + 64
    slots = (few + many) * (2 * 8 * 8 + 4)
    near = capacity(7) * (2 * H * 8 * 8 + 4 * H)
    assert layer.nbytes == slots + near + 4 * H + layer.needs.nbytes(H * G, 8, 8)
    assert layer.nbytes == layer.bound.nbytes(400)
    padded = H * capacity(many) * (2 * 8 * 8 + 4)
    assert slots < padded


def test_values_have_no_say():
    k, v, q = unlike(1, 90)
    one, other = (run(layer_of(Often(tokens=30, **SMALL)), k, x, q, [90]) for x in (v, v.flip(2) * 3))
    assert places(one) == places(other)


def test_the_past_does_not_hang_on_what_comes(llama):
    ids = tokens(1, 70)
    other = ids.clone()
    other[:, 60:] = tokens(1, 10, seed=5)
    got = []
    for given in (ids, other):
        memory = longwave.cache(llama, Often(**SMALL), budget=0.3)
        with torch.no_grad():
            got.append([llama(given[:, a:b], **into(memory)).logits for a, b in ((0, 50), (50, 57), (57, 70))])
    assert torch.equal(got[0][0], got[1][0])
    assert torch.equal(got[0][1], got[1][1])
    torch.testing.assert_close(got[0][2][:, :3], got[1][2][:, :3])
    assert not torch.allclose(got[0][2][:, 3:], got[1][2][:, 3:])


# moving and taking back


def test_tokens_that_were_never_evicted_can_be_taken_back():
    """Also those that lie head behind head already."""
    k, v, q = unlike(2, 60)
    layer, other = (layer_of(Often(tokens=300, **SMALL)) for _ in range(2))
    run(layer, k, v, q, [50, 10])
    run(other, k[:, :, :31], v[:, :, :31], q[:, :, :31], [31])
    layer.crop(-29)
    assert layer.rows == layer.held() == [31, 31]
    for mine, theirs in zip(layer.materialize(), other.materialize(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="cannot remove 40 tokens from a cache of 31"):
        layer.crop(-40)


def test_what_was_evicted_does_not_come_back():
    k, v, q = unlike(1, 90)
    layer = run(layer_of(Often(tokens=30, **SMALL)), k, v, q, [80, 3])
    before = places(layer)
    with pytest.raises(ValueError, match="evicted others when it had seen 83 tokens"):
        layer.crop(-1)
    assert places(layer) == before


def test_a_budget_of_all_observes_nothing(llama):
    memory = longwave.cache(llama, longwave.AdaKV(sinks=0, window=4), 1.0)
    with torch.no_grad():
        llama(tokens(2, 40), **into(memory))
    layer = next(memory.memory_layers())
    assert not layer.far
    assert not layer.dense.columns
    assert longwave.cache(llama, "adakv", 0.99).method.needs.queries == 64


def test_a_real_mix_of_rows_in_steps(llama):
    """Rows of different length and turns of a few: what a copy reads on is what the cache would have."""
    ids, mask = left_padded(3, 90, [0, 33, 58])
    memory = longwave.cache(llama, Often(sinks=0, window=6), budget=0.4)
    options = dict(max_new_tokens=20, do_sample=False)
    first = llama.generate(ids, attention_mask=mask, **into(memory), **options)
    twin = copy.deepcopy(memory)
    more = torch.cat([first, tokens(3, 7, seed=3)], 1)
    longer = torch.cat([mask, torch.ones(3, 27, dtype=torch.long)], 1)
    got = llama.generate(more, attention_mask=longer, **into(memory), **options)
    assert torch.equal(got, llama.generate(more, attention_mask=longer, **into(twin), **options))
    for layer in memory.memory_layers():
        for row in range(3):
            assert sum(layer.far.counts[row]) % 2 == 0
            assert layer.held()[row] <= memory.method.most(layer.rows[row])


# the operation and the store


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_query_over_ragged_heads(dtype):
    """Head by head by ordinary attention; what lies behind the ends may be anything that is finite."""
    g = torch.Generator().manual_seed(3)
    counts, seen = [[5, 0, 9], [1, 12, 2]], [[4], [7]]
    far_k, far_v = torch.randn(2, 2, 20, 8, generator=g, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, 2, 3, 10, 8, generator=g, dtype=torch.float64).to(dtype)
    q = torch.randn(2, 6, 1, 8, generator=g, dtype=torch.float64).to(dtype)
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(-1)
    got = ragged_step_attention(q, far_k, far_v, ends, k, v, 0.5, torch.tensor(seen))
    assert got.dtype == dtype
    for row in range(2):
        for h in range(3):
            start = sum(counts[row][:h])
            own, n = slice(start, start + counts[row][h]), seen[row][0]
            both = [
                torch.cat([far[row, own], near[row, h, :n]])[None, None].double()
                for far, near in ((far_k, k), (far_v, v))
            ]
            want = dense_attention(q[row, 2 * h : 2 * h + 2][None].double(), *both, 0.5, None)
            torch.testing.assert_close(
                got[row, 2 * h : 2 * h + 2][None].double(), want, **dict.fromkeys(("rtol", "atol"), tolerance(dtype))
            )


def tolerance(dtype):
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def test_a_row_that_sees_nothing_is_finite():
    nothing = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int64)
    x = torch.ones(1, 2, 4, 8)
    out = ragged_step_attention(x[:, :, :1], x[:, 0], x[:, 0], nothing[0], x, x, 1.0, nothing[1])
    assert torch.isfinite(out).all()


def test_a_ragged_buffer_refuses_what_does_not_fit_together():
    made = RaggedBuffer(2, 2)
    kept = torch.tensor([[True, True, True, False], [True, True, True, True]])
    x = torch.randn(2, 1, 4, 8)
    made.fill({"k": x, "v": x}, kept, [[1, 2], [0, 4]])
    assert [made.place(0, 1), made.place(1, 0), made.place(1, 1)] == [slice(1, 3), slice(3, 3), slice(3, 7)]
    assert made.ends.tolist() == [[1, 3], [0, 4]]
    short = made.items["k"][1:]
    for name, wrong in (
        *(("counts", [1, 2, 0, 3]), ("counts", [1, 2, 0]), ("ends", made.ends + 1)),
        *(("k", short), ("other", short)),
    ):
        with pytest.raises(ValueError, match="heads"):
            RaggedBuffer(2, 2).load_state(made.state() | {name: wrong})
    other = RaggedBuffer(2, 2)
    other.load_state(made.state())
    other.drop_last([1, 0])
    assert other.counts == [[0, 1], [0, 4]]
    assert torch.equal(other.items["k"][0], x[0, 0, 1])


def test_rows_of_a_ragged_buffer_need_not_hold_as_much():
    """No row is padded to another, in storage that stays where it is neither but for what it is given."""
    made, x = RaggedBuffer(2, 2, {"mark": torch.float32}), torch.randn(2, 1, 4, 8)
    mark = torch.arange(8.0).view(2, 1, 4)
    made.fill({"k": x, "v": -x, "mark": mark}, torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool(), [[0, 1], [3, 1]])
    assert len(made.items["k"]) == made.rooms[0] + made.rooms[1] == 5
    made.reserve([4, 2], x)
    assert made.rooms == [4, 4]
    assert made.items["mark"][[0, *range(4, 8)]].tolist() == [0, 4, 5, 6, 7]
    before = [t.data_ptr() for t in (*made.tensors(), *made.columns())]
    made.fill({"k": x, "v": -x, "mark": mark}, torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]]).bool(), [[1, 1], [0, 1]])
    assert [t.data_ptr() for t in (*made.tensors(), *made.columns())] == before
    made.release()
    assert made.items["mark"].tolist() == [1, 2, 7]
    made.select(torch.tensor([1, 0, 1]))
    assert made.items["mark"].tolist() == [7, 1, 2, 7]
    assert torch.equal(made.items["v"], -made.items["k"])
    assert made.ends.tolist() == [[0, 1], [1, 2], [0, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(safeguard=1.2), "safeguard is a part of a head's even share, from 0 to 1; got 1.2"),
        (dict(safeguard=True), "got True"),
        (dict(safeguard=float("nan")), "got nan"),
        (dict(store="kivi"), "another number of tokens in every head.*leave store out, or use snapkv"),
        (dict(positions="slots"), 'positions="true"'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.AdaKV(**options)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_size_is_spent_and_not_exceeded(llama, batch):
    dense = longwave.cache(llama, "dense").method.nbytes(400, batch)
    memory = longwave.cache(llama, Often(**SMALL), f"{dense // 2}B", max_tokens=400, batch=batch)
    ids = tokens(batch, 400)
    with torch.no_grad():
        for start, stop in ((0, 300), (300, 360), *((i, i + 1) for i in range(360, 400))):
            llama(ids[:, start:stop], **into(memory))
            assert memory.nbytes <= dense // 2
    assert memory.nbytes > 0.4 * dense
