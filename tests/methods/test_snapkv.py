"""snapkv: the window votes, votes are pooled, heads of a group vote together; what is kept may lie in pages."""

import copy

import pytest
import torch

import longwave
from longwave.frame.observe import Queries
from longwave.methods.held import Held
from longwave.store.tokens import capacity
from tests.conftest import into, left_padded, tokens
from tests.methods import naive
from tests.methods.naive import SCALE, D, G, H, Head, Token, by_votes, draw, drive, limit
from tests.methods.test_evicting import new_layer, run

SMALL = dict(sinks=2, window=7)


def positions(layer, row=0, head=0):
    return layer.dense.column("position")[row, head, : layer.dense.lengths[row]].tolist()


# votes


@pytest.mark.parametrize("kernel", [1, 3, 9])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("window", [1, 7])
def test_the_tokens_that_stay_are_the_twins(kernel, pool, window):
    method = longwave.SnapKV(kernel=kernel, pool=pool, sinks=2, window=window)

    def score(head):
        return by_votes(head, kernel, pool, window)

    valid = torch.arange(90) >= torch.tensor([0, 31])[:, None]
    naive.check(new_layer(method), score, limit(method, 0.3, 4), *draw(2, 90, seed=3), [50, 3, 1, 1, 35], valid)


def spiked(spikes, count=60):
    """Keys of which some match what every query asks for, and the others nothing."""
    k = torch.zeros(1, H, count, D, dtype=torch.float64)
    q = torch.zeros(1, H * G, count, D, dtype=torch.float64)
    q[..., 0] = 1 / SCALE
    for i, height in spikes.items():
        k[:, :, i, 0] = height
    return k, torch.randn(1, H, count, D, dtype=torch.float64), q


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_a_spike_keeps_its_neighbours(pool, kernel):
    method = longwave.SnapKV(tokens=8 + kernel, kernel=kernel, pool=pool, sinks=0, window=7)
    layer = run(new_layer(method), *spiked({30: 9.0}), [60])
    near = range(30 - kernel // 2, 31 + kernel // 2)
    kept = positions(layer)
    assert set(near) <= set(kept)
    assert kept[-7:] == list(range(53, 60))
    assert len(kept) == 8 + kernel


def test_where_the_pools_differ():
    """Middling tokens side by side are more on average than a high one alone; the highest of each says otherwise."""
    high = {20: 5.0, 40: 4.6, 41: 4.6, 42: 4.6}
    for pool, expected in (("avg", [40, 41, 42]), ("max", [19, 20, 21])):
        method = longwave.SnapKV(tokens=10, kernel=3, pool=pool, sinks=0, window=7)
        assert positions(run(new_layer(method), *spiked(high), [60]))[:3] == expected


def held_of(k, q, scaling=1.0):
    """k [n, D] and the last queries q [heads of the group, w, D] of one row and KV head."""
    queries = Queries(q.shape[1], 1)
    queries.counts = [q.shape[1]]
    queries.q = q[None]
    k = k[None, None]
    return Held(k, k, torch.tensor([k.shape[2]]), {}, queries, scaling)


def test_heads_of_a_group_vote_together():
    """Their votes are summed: what two heads like a little beats what one of them likes more."""
    table = torch.log(torch.tensor([[0.4, 0.4], [0.6, 1e-12], [1e-12, 0.6], [1e-12, 1e-12]], dtype=torch.float64))
    q = torch.eye(2, dtype=torch.float64)[:, None]  # each head reads a column
    votes = longwave.SnapKV(kernel=1, window=1, sinks=0).score(held_of(table, q))
    torch.testing.assert_close(votes[0, 0], torch.tensor([0.8, 0.6, 0.6, 0.0], dtype=torch.float64))


def test_a_query_votes_for_what_it_could_see():
    """The one before the newest does not see the newest token."""
    k = torch.tensor([[0.0], [0.0], [0.0], [50.0]], dtype=torch.float64)
    q = torch.ones(1, 2, 1, dtype=torch.float64)
    votes = longwave.SnapKV(kernel=1, window=2, sinks=0).score(held_of(k, q))
    # the newest gives all to itself; the other a third to each of the first three, one of which is in the window
    torch.testing.assert_close(votes[0, 0], torch.tensor([1 / 3, 1 / 3, 0, 0], dtype=torch.float64))


def test_only_queries_that_are_known_vote():
    """Fewer than the window, after a short prompt or a crop: what stands in the other places is anything."""
    k, q = torch.randn(6, D, dtype=torch.float64), torch.randn(G, 4, D, dtype=torch.float64)
    held, fewer = held_of(k, q.clone()), held_of(k, q[:, 2:])
    held.queries.counts = [2]
    held.queries.q[:, :, :2] = float("nan")
    votes = longwave.SnapKV(kernel=1, window=4, sinks=0).score(held)[..., :2]
    torch.testing.assert_close(votes, longwave.SnapKV(kernel=1, window=2, sinks=0).score(fewer)[..., :2])


def test_values_do_not_matter():
    k, v, q = draw(1, 80)
    kept = [positions(run(new_layer(longwave.SnapKV(**SMALL)), k, x, q, [80])) for x in (v, v * -9, v * 0)]
    assert kept[0] == kept[1] == kept[2]


def test_below_the_budget_nothing_goes():
    layer = run(new_layer(longwave.SnapKV(tokens=60, **SMALL)), *draw(2, 60), [60])
    assert positions(layer) == list(range(60))


def test_steps_wait_until_64_are_too_many():
    method = longwave.SnapKV(tokens=30, **SMALL)
    layer = run(new_layer(method), *draw(1, 40), [40])
    k, v, q = draw(1, 130, seed=5)
    held = []
    for i, _ in enumerate(drive(layer, k, v, q, [1] * 130)):
        held.append(layer.dense.lengths[0])
        assert layer.ripe() is False
        assert positions(layer)[-7:] == list(range(34 + i, 41 + i))
    assert held == [30 + (i + 1) % 64 for i in range(130)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kernel=4), "kernel is an odd number of tokens, got 4"),
        (dict(kernel=0), "kernel is a whole number of tokens, at least 1; got 0"),
        (dict(pool="mean"), 'pool is "avg" or "max", got \'mean\''),
        (dict(positions="slots", tokens=100), "asks with queries that it remembers, which slots would turn"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.SnapKV(**options)


# in pages

STORE = longwave.Kivi(group=8, bits=(4, 2))
PAGED = longwave.SnapKV(store=STORE, **SMALL)
BUDGET = 0.03  # of float64: a page of 4 and 2 bits takes 0.094 of its tokens with its scales


def paged_layer(method=PAGED, budget=BUDGET, dtype=torch.float64):
    return method.bind(naive.shape(dtype), None, budget).layer(0)


def twin_pages(layer, k, v, q, parts, window=7, sinks=2):
    """Pages that plain kivi makes of what the twin chose, for one row: k, v [H, t, D], q [H * G, t, D]."""
    span, segment = layer.bound.span, 8
    store = STORE.bind(naive.shape(), None, None).new_store(0, 1, torch.device("cpu"))
    heads, seen = [Head() for _ in range(H)], 0
    for count in parts:
        for h, head in enumerate(heads):
            for t in range(seen, seen + count):
                head.tokens.append(Token(t, k[h, t], v[h, t]))
                head.queries = [*head.queries, q[h * G : (h + 1) * G, t]][-window:]
        seen += count
        due = max(0, len(heads[0].tokens) - sinks - window) // span * span
        if not due:
            continue
        sides = []
        for head in heads:
            scores, keep = by_votes(head, window=window), due // span * segment
            order = sorted(range(sinks, sinks + due), key=lambda i, s=scores: (-s[i], i))[:keep]
            chosen = [head.tokens[i] for i in sorted(order)]
            sides.append([torch.stack([getattr(token, name) for token in chosen]) for name in "kv"])
            head.tokens = head.tokens[:sinks] + head.tokens[sinks + due :]
        store.append(None, *(torch.stack(side)[None] for side in zip(*sides, strict=True)))
    return store, heads


PARTS = {"prompt": [110], "steps": [1] * 110, "chunks": [60, 1, 1, 40, 8]}


@pytest.mark.parametrize("parts", list(PARTS.values()), ids=list(PARTS))
@pytest.mark.parametrize("pads", [[0], [0, 45]], ids=["alone", "padded"])
def test_pages_hold_what_the_twin_chose_as_plain_kivi_stores_it(parts, pads):
    layer = paged_layer()
    assert layer.bound.span > 8
    k, v, q = draw(len(pads), 110, seed=4)
    valid = None if pads == [0] else torch.arange(110) >= torch.tensor(pads)[:, None]
    run(layer, k, v, q, parts, valid)
    for row, pad in enumerate(pads):
        own = slice(pad, None)
        counts = naive.parts_of(parts, None if valid is None else valid[row])
        store, heads = twin_pages(layer, *(x[row, :, own] for x in (k, v, q)), counts)
        assert layer.store.counts[row] == store.counts[0] > 0
        assert torch.equal(layer.store.pages[row, : store.counts[0]], store.pages[0])
        for h, head in enumerate(heads):
            assert positions(layer, row, h) == head.places()
        assert layer.rows[row] == 110 - pad


def test_attention_is_over_dense_tokens_and_pages():
    layer = paged_layer()
    k, v, q = draw(2, 110, seed=4)
    run(layer, k, v, q, [100])
    assert layer.held()[0] == layer.dense.lengths[0] + layer.store.tokens[0] < 100
    keys, values = layer.materialize()
    (out,) = drive(layer, k, v, q, [10], start=100)
    keys, values = (torch.cat([x, y[:, :, 100:]], 2).repeat_interleave(G, 1) for x, y in ((keys, k), (values, v)))
    allowed = torch.ones(10, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - 10)
    p = (q[:, :, 100:] @ keys.mT * SCALE).masked_fill(~allowed, float("-inf")).softmax(-1)
    torch.testing.assert_close(out, p @ values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_pages_are_exact(dtype):
    bound = PAGED.bind(naive.shape(dtype, layers=2), None, BUDGET)
    page = 2 * 8 * 8 * (4 + 2) // 8 + 2 * 8 * 2 * 2 * 2  # codes of two heads, and a scale and zero a channel or token
    assert bound.inner.layout(0).page_bytes == page
    columns, queries = 4 * H, 7 * (H * G * D * dtype.itemsize + 8)
    for length in (1, 9, 60, 110, 333):
        middle = max(0, length - 9) // bound.span * bound.span
        dense = capacity(length - middle) * (2 * H * D * dtype.itemsize + columns)
        index = 2 * (H * 8 + H * D * 2) if middle else 0
        expected = dense + queries + middle // bound.span * page + index
        assert bound.layer_bytes(0, length) == expected
        for batch in (1, 3):
            layer = run(bound.layer(0), *draw(batch, length, dtype=dtype), [length])
            assert layer.nbytes == batch * (expected - index) + index
            assert bound.nbytes(length, batch) == 2 * layer.nbytes


def test_the_budget_bounds_what_more_context_costs():
    for budget in (0.01, 0.02, 0.05, 0.09):
        bound = PAGED.bind(naive.shape(), None, budget)
        assert 0.9 * budget < bound.page_fraction() <= budget
        more = [bound.layer_bytes(0, 9 + bound.span * n) for n in (1, 101)]
        dense = 100 * bound.span * bound.shape.token_bytes
        assert 0.9 * budget < (more[1] - more[0]) / dense <= budget


def test_bytes_while_growing_stay_below_the_peak():
    bound, k, v, q = PAGED.bind(naive.shape(), None, BUDGET), *draw(3, 150)
    valid = torch.arange(150) >= torch.tensor([0, 20, 101])[:, None]
    layer = bound.layer(0)
    for i, _ in enumerate(drive(layer, k, v, q, [1] * 150, valid)):
        assert layer.nbytes <= bound.peak_bytes(i + 1, batch=3)


def test_more_than_all_pages_take_is_refused(llama):
    whole = longwave.cache(llama, PAGED, 1.0).method
    assert whole.span == 8
    page = STORE.bind(whole.shape, None, None).page_fraction()
    assert whole.page_fraction() == page
    longwave.cache(llama, PAGED, page)
    for budget in (page + 1e-3, 0.9):
        with pytest.raises(
            ValueError, match=rf"a budget of {budget:g} is more than the store's pages take .*\({page:.3f}\)"
        ):
            longwave.cache(llama, PAGED, budget)


def test_a_size_that_pages_alone_do_not_meet_says_what_to_do(llama):
    assert longwave.cache(llama, PAGED, "100KB", max_tokens=300).method.span == 8
    with pytest.raises(ValueError, match=r"snapkv over pages cannot be fitted to a size.*as a fraction"):
        longwave.cache(llama, PAGED, "60KB", max_tokens=300)


def test_store_by_name_and_with_a_budget_of_its_own(llama):
    method = longwave.SnapKV(store="kivi", **SMALL)
    assert method.store == longwave.Kivi()
    assert "K 4 V 4 bits, group=64, sinks=2, window=7" in str(longwave.cache(llama, method, 0.1).method)
    finer = longwave.SnapKV(store=longwave.Kivi(group=8), store_budget=0.3, **SMALL)
    assert "K 4 V 4 bits" in str(longwave.cache(llama, finer, 0.1).method)
    by_name = longwave.cache(llama, "snapkv", 0.1, store="kivi", sinks=2, window=7).method
    assert by_name == longwave.cache(llama, method, 0.1).method


def test_a_row_does_not_depend_on_the_others_in_pages(llama):
    pads = [0, 13, 60]
    ids, mask = left_padded(3, 80, pads)
    options = dict(max_new_tokens=40, do_sample=False, output_logits=True, return_dict_in_generate=True)
    memory = longwave.cache(llama, PAGED, 0.06)
    together = llama.generate(ids, attention_mask=mask, **into(memory), **options)
    for row, pad in enumerate(pads):
        own = longwave.cache(llama, PAGED, 0.06)
        alone = llama.generate(ids[row : row + 1, pad:], **into(own), **options)
        torch.testing.assert_close(together.logits[-1][row], alone.logits[-1][0], rtol=1e-3, atol=1e-3)
        for ours, theirs in zip(memory.memory_layers(), own.memory_layers(), strict=True):
            assert ours.store.counts[row] == theirs.store.counts[0] > 0
            assert ours.dense.lengths[row] == theirs.dense.lengths[0]


def test_rows_move_and_copies_do_not_share_in_pages():
    k, v, q = draw(3, 110, seed=4)
    valid = torch.arange(110) >= torch.tensor([0, 30, 80])[:, None]
    layer = run(paged_layer(), k, v, q, [90], valid)
    order = torch.tensor([2, 0, 0])
    moved, fresh = copy.deepcopy(layer), paged_layer()
    moved.batch_select_indices(order)
    for _ in drive(layer, k, v, q, [20], valid, start=90):
        pass
    k, v, q, valid = (x[order] for x in (k, v, q, valid))
    got = torch.cat(list(drive(moved, k, v, q, [1] * 20, valid, start=90)), 2)
    expected = torch.cat(list(drive(fresh, k, v, q, [90, *[1] * 20], valid))[1:], 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert torch.equal(moved.store.pages, fresh.store.pages)


def test_crop_keeps_to_what_is_not_in_pages(llama):
    memory = longwave.cache(llama, PAGED, 0.06)
    with torch.no_grad():
        llama(tokens(1, 90), **into(memory))
        memory.activate_past_recording()
        llama(tokens(1, 5, seed=2), **into(memory))
        memory.crop(-5)
        assert memory.get_seq_length() == 90
        with pytest.raises(ValueError, match="compressed already"):
            memory.crop(-80)
        llama(tokens(1, 5, seed=3), **into(memory))
