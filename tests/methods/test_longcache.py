"""longcache: what is chosen, that it is read at places without gaps, and that nothing else decides."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import longwave
from longwave.decode import StaticDecoder
from longwave.frame import Pass, cache_argument
from longwave.frame.attention import StepMask
from longwave.methods import longcache
from longwave.methods.longcache import ReAttentionLayer
from longwave.methods.told import NEVER
from longwave.ops.attention.reference import causal_attention
from longwave.rotary import Rotary
from tests.conftest import build, into, left_padded, shape_of, tokens
from tests.methods import naive
from tests.methods.naive import SCALE, D, G, H, draw
from tests.methods.test_evicting import step_of
from tests.models import checks
from tests.models.table import ROWS
from tests.reading import read_in

SMALL = dict(sinks=2, window=9, top=2, spans=3, span=4, chunk=8)
METHOD = longwave.ReAttention(**SMALL)
SCOPE = 2 + 3 * 4 + 9
MODULE = SimpleNamespace(layer_idx=0)


class Turning:
    """A rotary embedding of pairs, that remembers the highest place it turned anything to."""

    highest = 0

    def rotates(self, module):
        return True

    def module_of(self, index):
        return MODULE

    def _by(self, x, angle):
        angle = angle.double()[:, None, :, None] / 10 ** torch.arange(D // 2, dtype=torch.float64)
        a, b = x.double().chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)

    def rotate(self, module, x, positions):
        self.highest = max(self.highest, int(positions.max()))
        return self._by(x, positions)

    def unrotate(self, module, x, positions):
        return self._by(x, -positions)

    def shift(self, module, x, old, new):
        self.highest = max(self.highest, int(new.max()))
        return self._by(x, new - old)


def new_layer(method=METHOD, dtype=torch.float64):
    layer = method.bind(naive.shape(dtype), None, None).layer(0)
    layer.progress.rotary = Turning()
    return layer


def drive(layer, k, v, q, sizes, valid=None, start=0):
    """Passes of `sizes` with tokens whose k and q come un-rotated; yields each answer."""
    for size in sizes:
        now = slice(start, start + size)
        seen = torch.ones(k.shape[0], start + size).bool() if valid is None else valid[:, : start + size]
        at = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, now]
        turn = layer.progress.rotary._by
        layer.update(turn(k[:, :, now], at), v[:, :, now])
        mask = StepMask(None if valid is None else seen, True)
        yield layer.forward(turn(q[:, :, now], at), SCALE, mask, MODULE, at)
        start += size


def answers(layer, *rest, **more):
    return torch.cat(list(drive(layer, *rest, **more)), 2)


# the twin: one row, with loops


def stretches(method, start, stop):
    """Borders of what chooses together in a pass of a row's tokens start to stop."""
    step = 1 if stop - start <= method.alone else method.chunk
    first = method.plain - method.plain % step
    ends = [end for end in range(first, stop, step) if end > start]
    return list(zip([start, *ends], [*ends, stop], strict=True))


def read_by(method, k, q, start, stop):
    """Places that the tokens start to stop - 1 read: k [H, n, D] and q [H * G, n, D], before rotation."""
    if stop <= method.scope:
        return list(range(stop))
    votes = {}
    middle = range(method.sinks, stop - method.window)
    for i in range(start, stop):
        for head in range(H * G):
            scores = k[head // G] @ q[head, i]
            for place in sorted(middle, key=lambda j: -float(scores[j]))[: method.top]:
                votes[place] = votes.get(place, 0) + 1
    won = sorted(votes, key=lambda j: (-votes[j], j))[: method.spans]
    near = {j for c in won for j in range(c - method.span // 2, c - method.span // 2 + method.span)}
    return [*range(method.sinks), *sorted(near & set(middle)), *range(stop - method.window, stop)]


def twin(method, k, v, q, parts):
    """Answers [H * G, n, D] of one row whose passes bring so many tokens."""
    out, start = torch.zeros_like(q), 0
    turn = Turning()._by
    for count in parts:
        for a, b in stretches(method, start, start + count):
            places = read_by(method, k, q, a, b)
            assert len(places) <= method.scope
            at = torch.arange(len(places))[None]
            keys = turn(k[None, :, places], at)[0]
            for i in range(a, b):
                mine = places.index(i)
                for head in range(H * G):
                    asked = turn(q[None, head : head + 1, i : i + 1], at[:, mine : mine + 1])[0, 0, 0]
                    p = torch.softmax(keys[head // G, : mine + 1] @ asked * SCALE, -1)
                    out[head, i] = p @ v[head // G, places[: mine + 1]]
        start += count
    return out


COMINGS = {
    "prompt": [70],
    "steps": [30, *[1] * 20],
    "chunks": [17, 19, 1, 3, 25],
    "within": [SCOPE, 1, 1],
}


@pytest.mark.parametrize("coming", list(COMINGS))
@pytest.mark.parametrize("pads", [[0], [0, 11, 45]], ids=["alone", "padded"])
def test_each_row_reads_what_its_twin_reads(coming, pads):
    sizes = COMINGS[coming]
    given = draw(len(pads), sum(sizes), seed=4)
    valid = naive.coming_with(pads, sum(sizes))
    found = answers(new_layer(), *given, sizes, valid)
    for row, own, mine, parts in naive.rows_of(given, sizes, valid):
        want = twin(METHOD, *mine, parts)
        torch.testing.assert_close(found[row][:, own], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options", [dict(spans=0), dict(span=1), dict(span=5), dict(sinks=0), dict(top=40), dict(spans=200, window=8)]
)
def test_other_options(options):
    method = longwave.ReAttention(**SMALL | options)
    count = min(method.scope + 12, 70)
    k, v, q = draw(1, 110, seed=5)
    k, v, q = (x[:, :, :count] for x in (k, v, q))
    found = answers(new_layer(method), k, v, q, [count - 2, 1, 1])
    torch.testing.assert_close(found[0], twin(method, k[0], v[0], q[0], [count - 2, 1, 1]), rtol=0, atol=1e-9)


# below the scope, and where all of the middle is chosen


@pytest.mark.parametrize("sizes", [[SCOPE], [1] * SCOPE, [9, 1, SCOPE - 10]], ids=str)
def test_within_the_scope_it_is_full_attention(sizes):
    k, v, q = draw(2, SCOPE)
    found = answers(new_layer(), k, v, q, sizes)
    at = torch.arange(SCOPE)[None]
    want = causal_attention(*(Turning()._by(x, at) for x in (q, k)), v, SCALE)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9)


def test_gathered_whole_it_is_full_attention_too():
    """What is chosen is put together and turned as any choice is: of all tokens it must make full attention."""
    method = longwave.ReAttention(**SMALL | dict(window=100))
    k, v, q = draw(2, 60)
    layer = new_layer(method)
    want = answers(new_layer(method), k, v, q, [60])
    layer.attend = lambda p: layer.attend_in_stretches(p)
    torch.testing.assert_close(answers(layer, k, v, q, [60]), want, rtol=0, atol=1e-9)


def test_all_of_a_models_logits_below_the_scope(llama):
    ids, mask = left_padded(2, 60, [0, 13])
    method = longwave.ReAttention(sinks=2, window=40, spans=6, span=4, chunk=8)
    stock = read_in(llama, longwave.cache(llama, "dense"), ids, (40, 1, 1, 18), mask)
    found = read_in(llama, longwave.cache(llama, method), ids, (40, 1, 1, 18), mask)
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-4)


# positions


def test_no_place_exceeds_the_scope():
    layer = new_layer()
    k, v, q = draw(1, 50 * 11)
    answers(layer, k, v, q, [300, *[1] * 20, 40, 3, *[1] * 7, 180])
    assert layer.progress.rotary.highest == SCOPE - 1


def test_a_model_beyond_its_trained_length(llama):
    """No position that its rotary embedding is asked for, but to undo it, exceeds the scope."""
    memory = longwave.cache(llama, METHOD)
    real, asked = memory._progress.rotary, []

    class Watched(Rotary):
        def rotate(self, module, x, positions):
            asked.append(int(positions.max()))
            return super().rotate(module, x, positions)

        def shift(self, module, x, old, new):
            asked.append(int(new.max()))
            return super().shift(module, x, old, new)

    memory._progress.rotary = Watched(real.turns)
    longer = tokens(1, 3 * llama.config.max_position_embeddings)
    assert torch.isfinite(read_in(llama, memory, longer, (1000, 1, 1, 34, 500))).all()
    assert max(asked) == SCOPE - 1


def test_where_it_stands_decides_nothing():
    """Tokens that nobody asks for before a needle: the same is read, and answered."""
    k, v, q = (x * 0.1 for x in draw(1, 120, seed=7))
    found = []
    for more in (0, 37):
        empty = torch.zeros(1, H, more, D, dtype=k.dtype)
        keys, values = (torch.cat([x[:, :, :2], empty, x[:, :, 2:]], 2) for x in (k, v))
        asks = torch.cat([q[:, :, :2], empty.repeat_interleave(G, 1), q[:, :, 2:]], 2)
        keys[:, :, 2 + more + 30] = 5.0
        asks[:, :, -1] = 5.0
        layer = new_layer(longwave.ReAttention(**SMALL | dict(top=1)))
        found.append(list(drive(layer, keys, values, asks, [119 + more, 1]))[-1])
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


# a needle, and the heads that ask for it


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "tiles"])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_needle_of_one_head_is_found(group, exact):
    """In the KV head of the query head that asks, and in no other; the step's answer is the needle's value."""
    heads = 4
    shape = replace(naive.shape(), kv_heads=heads, query_heads=heads * group)
    for head in range(heads * group):
        method = longwave.ReAttention(**SMALL | dict(top=1, spans=2, span=1, exact=exact))
        layer = method.bind(shape, None, None).layer(0)
        layer.progress.rotary = Turning()
        g = torch.Generator().manual_seed(head)
        k = torch.randn(1, heads, 90, D, generator=g, dtype=torch.float64) * 0.01
        v, q = torch.zeros_like(k), torch.zeros(1, heads * group, 90, D, dtype=torch.float64)
        slow = torch.tensor([3, 7])  # the slowest pair: turned by places, it stays what it is
        k[0, head // group, 40, slow], v[0, head // group, 40] = 30.0, 1.0
        q[0, head, 89, slow] = 3.0
        *_, out = drive(layer, k, v, q, [89, 1])  # heads that ask for nothing vote for the first token
        assert out[0, head, 0].min() > 0.99, head
        rest = [h for h in range(heads * group) if h // group != head // group]
        assert out[0, rest].abs().max() < 0.01 if rest else True


# chunks


@pytest.mark.parametrize("size", [8, 24, 40])
def test_chunks_of_whole_chunks_are_the_prompt(size, monkeypatch):
    monkeypatch.setattr(longwave.ReAttention, "alone", 0)
    k, v, q = draw(2, 120, seed=9)
    want = answers(new_layer(), k, v, q, [120])
    torch.testing.assert_close(answers(new_layer(), k, v, q, [size] * (120 // size)), want, rtol=0, atol=1e-9)


def test_other_chunks_choose_otherwise():
    k, v, q = draw(1, 120, seed=9, sharp=4)
    found = [answers(new_layer(), k, v, q, [60, *sizes]) for sizes in ([60], [29, 31])]
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_short_pass_is_as_many_steps():
    k, v, q = draw(2, 70, seed=9)
    found = [answers(new_layer(), k, v, q, [40, *sizes]) for sizes in ([16, 14], [1] * 30, [5, 11, 14])]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [[60], [33, 27], [30, *[1] * 10, 20]], ids=str)
def test_later_tokens_change_nothing_before_their_chunk(sizes):
    k, v, q = draw(1, 60, seed=2)
    before = answers(new_layer(), k, v, q, sizes)
    other = [torch.cat([x[:, :, :56], x[:, :, 56:] + 1], 2) for x in (k, v, q)]  # 56: a chunk begins
    after = answers(new_layer(), *other, sizes)
    assert torch.equal(before[:, :, :56], after[:, :, :56])
    assert not torch.equal(before[:, :, 56:], after[:, :, 56:])


# steps on the device


@pytest.mark.parametrize("pads", [[0, 0], [0, 25]], ids=["even", "padded"])
def test_a_step_on_the_device_reads_what_a_pass_does(pads):
    valid = torch.arange(70) >= torch.tensor(pads)[:, None]
    k, v, q = draw(2, 70)
    passes, steps = new_layer(), new_layer()
    for layer in (passes, steps):
        list(drive(layer, k, v, q, [40], valid))
    steps.reserve(30)
    step = step_of(steps, 0)
    for i, expected in enumerate(drive(passes, k, v, q, [1] * 30, valid, start=40)):
        at = torch.tensor([[40 + i - pad] for pad in pads])
        now = slice(40 + i, 41 + i)
        turned = (Turning()._by(x[:, :, now], at) for x in (q, k))
        p = Pass(*turned, v[:, :, now], SCALE, phase="step", positions=at, module=MODULE, rotary=Turning())
        torch.testing.assert_close(steps.run_step(p, step), expected, rtol=0, atol=1e-9)
        steps.stepped(1)
        for count in (step.at, step.seen, step.total):
            count.add_(1)


# what is refused, and bytes


def test_a_mask_beyond_the_scope_is_refused(llama):
    memory = longwave.cache(llama, METHOD)
    read_in(llama, memory, tokens(1, 40), (40,))
    mask = torch.ones(1, 1, 4, 44, dtype=torch.bool)
    mask[..., 7] = False
    with pytest.raises(NotImplementedError, match=r"4D attention mask goes over tokens that are not read: of 44 .* 23"):
        llama(tokens(1, 4), attention_mask=mask, **into(memory))
    with pytest.raises(NotImplementedError, match="is_causal=False goes over"):
        llama(tokens(1, 4), is_causal=False, **into(memory))
    assert memory.get_seq_length() == 40


def test_a_scope_beyond_what_the_model_knows_is_refused(llama):
    with pytest.raises(ValueError, match=r"reads 8,192 tokens at once .* knows 512 positions: give fewer spans"):
        longwave.cache(llama, "longcache")
    assert longwave.ReAttention().scope == 8192


def test_a_budget_decides_nothing(llama):
    with pytest.raises(ValueError, match=r"keeps everything, so its budget is 1; got 0.5"):
        longwave.cache(llama, METHOD, 0.5)
    memory = longwave.cache(llama, METHOD, 1.0)
    assert str(memory.method) == "longcache(reads everything)"
    assert not any(isinstance(layer, ReAttentionLayer) for layer in memory.memory_layers())


# looking before reading

LOOK = longwave.ReAttention(**SMALL, look=7)


def feed(model, memory, ids):
    with torch.no_grad():
        return model(ids, **cache_argument(model, memory), use_cache=True).logits


def asked(model, method, ids, question):
    """A cache that has read ids and a question, and the question's logits."""
    memory = longwave.cache(model, method)
    feed(model, memory, ids)
    return memory, feed(model, memory, question)


def tell(cache, other):
    """The next pass reads what the other one found, without looking."""
    for layer, there in zip(cache.memory_layers(), other.memory_layers(), strict=True):
        layer.told, layer._asking = copy.deepcopy(there.told), True


def test_all_layers_read_the_spans_that_all_of_them_asked_for(llama, monkeypatch):
    ids, question = tokens(2, 90), tokens(2, 6, seed=7)
    seen, claims = [], longcache.select.claims
    monkeypatch.setattr(longcache.select, "claims", lambda *a, **b: seen.append(claims(*a, **b)) or seen[-1])
    memory, logits = asked(llama, LOOK, ids, question)
    layers = list(memory.memory_layers())
    assert len(seen) == len(layers)
    best = sum(seen).topk(3).indices
    for layer in layers:
        assert layer.told.asked == [True, True]
        assert [set(row) for row in layer.told.found.tolist()] == [set(row) for row in best.tolist()]
    # whoever is told to read those spans reads the same, without looking
    told = longwave.cache(llama, METHOD)
    feed(llama, told, ids)
    tell(told, memory)
    torch.testing.assert_close(feed(llama, told, question), logits, rtol=0, atol=1e-6)
    more = tokens(2, 3, seed=8)  # steps go on with what the question found
    steps = [torch.cat([feed(llama, cache, token) for token in more.split(1, 1)], 1) for cache in (memory, told)]
    torch.testing.assert_close(*steps, rtol=0, atol=1e-6)
    assert len(seen) == len(layers)


def test_the_first_reading_leaves_nothing_behind(llama):
    memory, _ = asked(llama, LOOK, tokens(2, 90), tokens(2, 6, seed=7))
    once, _ = asked(llama, METHOD, tokens(2, 90), tokens(2, 6, seed=7))
    assert memory.get_seq_length() == once.get_seq_length() == 96
    first, other = (next(cache.memory_layers()) for cache in (memory, once))
    assert (first.rows, first.held(), first._run) == (other.rows, other.held(), other._run)
    torch.testing.assert_close(first.materialize()[1], other.materialize()[1])  # of the first layer: no choice is in it


def test_the_needle_is_looked_for_by_those_that_ask_for_it():
    """Of two layers one asks for token 40; both read its span, though one of the other's own has more votes."""
    method = longwave.ReAttention(**SMALL | dict(top=1, spans=1), look=8)
    layers = [method.bind(naive.shape(layers=2), None, None).layer(i) for i in range(2)]
    for layer in layers:
        layer.progress = layers[0].progress
        layer.join(layers)
    layers[0].progress.rotary = Turning()
    k, v, q = (x * 0.01 for x in draw(1, 92, seed=3))
    slow = torch.tensor([3, 7])
    k[0, :, 40, slow], v[0, :, 40] = 30.0, 1.0
    q[0, :, 90:, slow] = 3.0
    weak = q * 0.01
    for layer, own in zip(layers, (q, weak), strict=True):
        answers(layer, k[:, :, :90], v[:, :, :90], own[:, :, :90], [90])
    layers[0].progress.look = look = []
    before = [layer.counts() for layer in layers]
    for layer, own in zip(layers, (q, weak), strict=True):
        list(drive(layer, k, v, own, [2], start=90))
    layers[0].progress.look = None
    for layer, was in zip(layers, before, strict=True):
        layer.take_back(was)
        assert layer.counts() == was
        layer.seen(look, [2])
    assert [layer.told.found.tolist() for layer in layers] == [[[40 // 4]]] * 2
    (out,) = drive(layers[0], k, v, q, [2], start=90)
    assert out.min() > 0.9


@pytest.mark.parametrize("size", [1, 8, 20])
def test_who_does_not_look(llama, size):
    """A step, and what is longer than a question; the latter forgets what was found, the former reads it."""
    memory, _ = asked(llama, LOOK, tokens(1, 90), tokens(1, 6, seed=7))
    found = next(memory.memory_layers()).told.found.clone()
    feed(llama, memory, tokens(1, size, seed=9))
    layer = next(memory.memory_layers())
    assert layer.told.asked == [size == 1]
    assert size > 1 or torch.equal(layer.told.found, found)


def test_within_the_scope_nobody_looks(llama, monkeypatch):
    monkeypatch.setattr(longcache.select, "claims", None)
    memory, logits = asked(llama, LOOK, tokens(1, 12), tokens(1, 6, seed=7))
    _, plain = asked(llama, "dense", tokens(1, 12), tokens(1, 6, seed=7))
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-4)
    assert next(memory.memory_layers()).told.asked == [False]


@pytest.mark.parametrize("start", [90, 93])
def test_a_question_is_read_with_as_much_before_it_as_is_said(llama, start, monkeypatch):
    """And so are the steps behind it, until the window is full; what stands before that may be found, wherever chunks
    end."""
    rows, told = [], longcache.select.told

    def spy(found, stop, *args):
        index, count = told(found, stop, *args)
        if found.shape[1]:
            rows.append((found[0].tolist(), int(stop), index[0, : int(count)].tolist()))
        return index, count

    monkeypatch.setattr(longcache.select, "told", spy)
    memory = longwave.cache(llama, replace(LOOK, before=1))
    feed(llama, memory, tokens(1, start))
    feed(llama, memory, tokens(1, 6, seed=7))
    for token in tokens(1, 4, seed=8).split(1, 1):
        feed(llama, memory, token)
    layers, stops = 3, []
    for found, stop, read in rows:
        first = max(start - 1, stop - 9)
        spans = [j for n in sorted(found) for j in range(4 * n, 4 * n + 4) if 2 <= j < first]
        assert read == [0, 1, *spans, *range(first, stop)]
        stops.append(stop)
    assert stops[-4 * layers :: layers] == [start + 7, start + 8, start + 9, start + 10]
    assert stops[-4 * layers - 1] == start + 6


def test_what_stands_right_before_a_question_is_looked_for_too():
    """Where the window would have held it, and `before` leaves it out."""
    method = longwave.ReAttention(**SMALL | dict(top=1, spans=1), look=4, before=2)
    layer = method.bind(naive.shape(layers=1), None, None).layer(0)
    layer.join([layer])
    layer.progress.rotary = Turning()
    k, v, q = (x * 0.01 for x in draw(1, 92, seed=3))
    slow = torch.tensor([3, 7])
    k[0, :, 85, slow], v[0, :, 85] = 30.0, 1.0
    q[0, :, 90:, slow] = 3.0
    answers(layer, k[:, :, :90], v[:, :, :90], q[:, :, :90], [90])
    layer.progress.look = look = []
    before = layer.counts()
    list(drive(layer, k, v, q, [2], start=90))
    layer.progress.look = None
    layer.take_back(before)
    layer.seen(look, [2])
    assert layer.told.found.tolist() == [[85 // 4]]
    (out,) = drive(layer, k, v, q, [2], start=90)
    assert out.min() > 0.9


@pytest.mark.parametrize("crops", [(5,), (5, 6), (11,), (12,)], ids=str)
def test_a_question_that_is_taken_back_takes_its_spans_along(llama, crops):
    ids, one, two = tokens(1, 90), tokens(1, 6, seed=7), tokens(1, 5, seed=8)
    memory, _ = asked(llama, LOOK, ids, one)
    was = next(memory.memory_layers()).told.found.clone()
    feed(llama, memory, two)
    assert not torch.equal(next(memory.memory_layers()).told.found, was)
    for crop in crops:
        memory.crop(-crop)
    first = sum(crops) == 5  # the first question stands
    for layer in memory.memory_layers():
        assert layer.told.asked == [first]
        assert torch.equal(layer.told.found, was) if first else (layer.told.found == NEVER).all()
        assert not first or layer.told.since.tolist() == [90]


def test_whoever_was_parked_forgets_what_was_before_the_last_question(llama):
    memory, _ = asked(llama, LOOK, tokens(1, 90), tokens(1, 6, seed=7))
    feed(llama, memory, tokens(1, 5, seed=8))
    memory.park()
    memory.wake()
    assert all(layer.told.asked == [True] for layer in memory.memory_layers())
    memory.crop(-5)
    assert all(layer.told.asked == [False] for layer in memory.memory_layers())


def test_a_pass_is_read_twice_however_many_caches_there_are(llama):
    caches = [longwave.cache(llama, LOOK) for _ in range(3)]
    feed(llama, caches[0], tokens(1, 90))
    passes = []
    handle = llama.model.layers[0].register_forward_hook(lambda *a: passes.append(1))
    feed(llama, caches[0], tokens(1, 6, seed=7))
    handle.remove()
    assert len(passes) == 2
    assert len(caches) == 3


@pytest.mark.parametrize("before", [None, 1])
def test_rows_look_alone(llama, before):
    """One is within the scope and stays without a question until it is longer; one brings nothing to the other's."""
    long, short, question = tokens(1, 90), tokens(1, 12, seed=5), tokens(1, 6, seed=7)
    ids = torch.cat([torch.cat([long, question], 1), torch.cat([torch.zeros(1, 78).long(), short, question], 1)])
    mask = torch.ones_like(ids)
    mask[1, :78] = 0
    method = replace(LOOK, before=before)
    memory = longwave.cache(llama, method)
    read_in(llama, memory, ids, (90, 6), mask)
    alone, _ = asked(llama, method, long, question)
    for layer, other in zip(memory.memory_layers(), alone.memory_layers(), strict=True):
        assert layer.told.asked == [True, False]
        assert layer.told.found[0].tolist() == other.told.found[0].tolist()
    more = tokens(2, 12, seed=9)  # the short row outgrows the scope in steps
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    got = read_in(llama, memory, ids, (1,) * 12, mask)
    for row, (text, cache) in enumerate(((long, alone), (short, longwave.cache(llama, method)))):
        if row:
            read_in(llama, cache, torch.cat([text, question], 1), (12, 6))
        want = torch.cat([feed(llama, cache, token) for token in more[row : row + 1].split(1, 1)], 1)
        torch.testing.assert_close(got[row : row + 1], want, rtol=0, atol=1e-4)
    # a question of the second row alone leaves the first one's spans
    was = next(memory.memory_layers()).told.found[0].clone()
    last = torch.cat([torch.zeros(1, 6).long(), tokens(1, 6, seed=3)])
    ids = torch.cat([ids, last], 1)
    mask = torch.cat([mask, torch.tensor([[0] * 6, [1] * 6])], 1)
    read_in(llama, memory, ids, (6,), mask)
    told = next(memory.memory_layers()).told
    assert told.asked == [True, True]
    assert torch.equal(told.found[0], was)


def test_rows_are_moved_with_what_they_were_told(llama):
    memory, _ = asked(llama, LOOK, tokens(2, 90), tokens(2, 6, seed=7))
    first = next(memory.memory_layers())
    was = first.told.found.clone()
    assert not torch.equal(was[0], was[1])
    memory.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(first.told.found, was.flip(0))


def test_guesses_ask_nothing(llama):
    """While the past is recorded a short pass is as many steps, and reads what the last question found."""
    memory, _ = asked(llama, LOOK, tokens(1, 90), tokens(1, 6, seed=7))
    steps, more = copy.deepcopy(memory), tokens(1, 4, seed=8)
    was = next(memory.memory_layers()).told.found.clone()
    for layer in memory.memory_layers():
        layer.activate_past_recording()
    got = feed(llama, memory, more)
    want = torch.cat([feed(llama, steps, token) for token in more.split(1, 1)], 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert torch.equal(next(memory.memory_layers()).told.found, was)
    feed(llama, memory, tokens(1, 9, seed=4))  # longer than a question
    assert next(memory.memory_layers()).told.asked == [False]


@pytest.mark.parametrize("kind", ["gemma3", "qwen3next"])
def test_layers_of_transformers_own_are_put_back(kind):
    """Windows and recurrent states have read a question once, as those of a cache that was told what to read."""
    model, ids, question = build(kind), tokens(1, 90), tokens(1, 6, seed=7)
    memory, logits = asked(model, LOOK, ids, question)
    told = longwave.cache(model, METHOD)
    feed(model, told, ids)
    tell(told, memory)
    torch.testing.assert_close(feed(model, told, question), logits, rtol=0, atol=1e-5)


def test_a_first_reading_that_fails_at_its_end_is_said(llama, monkeypatch):
    memory, _ = asked(llama, LOOK, tokens(1, 90), tokens(1, 6, seed=7))
    monkeypatch.setattr(llama.model.norm, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(llama, memory, tokens(1, 5))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="failed half-way"):
        feed(llama, memory, tokens(1, 5))


def test_a_refused_pass_forgets_nothing(llama):
    memory, _ = asked(llama, LOOK, tokens(1, 90), tokens(1, 6, seed=7))
    for size in (5, 9):
        with torch.no_grad(), pytest.raises(ValueError, match="attention mask"):
            llama(tokens(1, size), **cache_argument(llama, memory), attention_mask=torch.ones(1, 7))
        assert all(layer.told.asked == [True] for layer in memory.memory_layers())


@pytest.mark.parametrize("sizes", [(90,), (9, 40, 8, 33)], ids=str)
@pytest.mark.parametrize("room", [1, 50, 1 << 14])
@pytest.mark.parametrize("pads", [(0, 0), (0, 33)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_without_scanning_a_prompt_reads_its_ends(kind, pads, room, sizes, monkeypatch):
    """As with a window in place of spans, however many stretches are answered at once; and a question still finds the
    middle."""
    monkeypatch.setattr(longcache, "READ", room)
    model = build(kind) if kind == "llama" else checks.build(next(row for row in ROWS if row.kind == kind))
    ids, mask = tokens(2, 90), torch.ones(2, 90)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    ends = longwave.cache(model, longwave.ReAttention(**SMALL | dict(spans=0, window=9 + 12)))
    blind = longwave.cache(model, longwave.ReAttention(**SMALL, look=7, scan=False))
    at = 0
    for size in sizes:
        part, at = ids[:, at : at + size], at + size
        seen = mask[:, :at].long()
        with torch.no_grad():
            want, found = (
                model(part, **cache_argument(model, memory), attention_mask=seen).logits for memory in (ends, blind)
            )
        real = seen[:, -size:].bool()
        torch.testing.assert_close(found[real], want[real], rtol=0, atol=1e-5)
    step, question = tokens(2, 1, seed=8), tokens(2, 6, seed=7)
    seen = torch.cat([mask, torch.ones(2, 1)], 1).long()
    with torch.no_grad():
        want, found = (
            model(step, **cache_argument(model, memory), attention_mask=seen).logits for memory in (ends, blind)
        )
        torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
        model(question, **cache_argument(model, blind), attention_mask=torch.cat([seen, torch.ones(2, 6).long()], 1))
    assert all(layer.told.asked == [True, True] for layer in blind.memory_layers())


@pytest.mark.parametrize("options", [dict(), dict(scan=False), dict(scan=False, before=1)], ids=str)
def test_captured_steps_read_what_a_question_found(llama, options):
    method = replace(LOOK, **options)
    ids, question, more = tokens(2, 90), tokens(2, 6, seed=7), tokens(2, 4, seed=8)
    plain, _ = asked(llama, method, ids, question)
    stepped, _ = asked(llama, method, ids, question)
    want = torch.cat([feed(llama, plain, token) for token in more.split(1, 1)], 1)
    with StaticDecoder(llama, stepped, new_tokens=4) as decoder:
        found = [decoder.step(token[:, 0]).clone() for token in more.split(1, 1)]
    torch.testing.assert_close(torch.stack([x.view(2, -1) for x in found], 1), want, rtol=0, atol=1e-4)


def test_bytes_are_a_dense_caches(llama):
    memory = longwave.cache(llama, METHOD)
    read_in(llama, memory, tokens(2, 200), (150, 50))
    dense = longwave.Dense().bind(shape_of(llama), None, None)
    assert memory.nbytes == memory.method.nbytes(200, 2) == dense.nbytes(200, 2)
    assert str(memory.method) == "longcache(reads 23 tokens: 3 spans of 4, window=9)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sinks=-1), "sinks is a whole number of tokens, at least 0; got -1"),
        (dict(top=0), "top is a whole number of tokens, at least 1; got 0"),
        (dict(spans=-1), "spans is a whole number of spans, at least 0; got -1"),
        (dict(span=0), "span is a whole number of tokens, at least 1; got 0"),
        (dict(chunk=64, window=63), r"window is a whole number of tokens \(.*chunk.*\), at least 64; got 63"),
        (dict(exact=1), "exact is True or False, got 1"),
        (dict(look=-1), "look is a whole number of tokens, at least 0; got -1"),
        (dict(chunk=64, window=64, look=65), "stay in the window of 64; got 65"),
        (dict(before=1), "before is of what is looked for: give look"),
        (dict(look=1, before=-1), "before is a whole number of tokens, at least 0; got -1"),
        (dict(chunk=64, window=64, look=60, before=5), "share the window of 64: before is at most 4"),
        (dict(look=1, scan=1), "scan is True or False, got 1"),
        (dict(scan=False), "leaves the middle to what is looked for"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.ReAttention(**options)
