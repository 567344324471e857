"""What a method sees: passes as they are; queries, mass, un-rotated keys and inputs of attention as eager has them."""

import copy
import gc
import pickle

import pytest
import torch

import longwave
from longwave.decode import StaticDecoder
from longwave.evals.fork import fork, needs_of, prefill
from longwave.frame.observe import Needs
from longwave.methods import METHODS
from tests.conftest import build, into, left_padded, tokens
from tests.frame.spy import Spy, Truth
from tests.reading import positions_of, read

PADS, LENGTH, WIDTH = [0, 9, 17], 20, 6  # the last row is shorter than the queries that are remembered


@pytest.fixture(scope="module")
def pairs():
    """name -> (a model, its twin that attends eagerly); float64, of which eager softmax makes float32."""
    found = {}
    for name in ("llama", "gemma3"):
        ours = build(name, torch.float64)
        eager = copy.deepcopy(ours)
        eager.set_attn_implementation("eager")
        found[name] = (ours, eager)
    return found


@pytest.fixture
def pair(pairs):
    return pairs["llama"]


@pytest.fixture(autouse=True)
def known():
    longwave.register(Spy)
    yield
    del METHODS["spy"]


# passes


def test_a_pass_is_what_it_says(pair):
    model, _ = pair
    memory = longwave.cache(model, "spy", positions=True)
    ids = tokens(2, 30)
    for end in (20, 21, 25, 26):
        read(model, memory, ids[:, :end])
    for index, layer in enumerate(memory.layers):
        assert [p.phase for p in layer.passes] == ["prompt", "step", "chunk", "step"]
        for p, start, end in zip(layer.passes, (0, 20, 21, 25), (20, 21, 25, 26), strict=True):
            new = end - start
            assert p.module is model.model.layers[index].self_attn
            assert (p.q.shape, p.k.shape, p.v.shape) == ((2, 4, new, 8), (2, 2, new, 8), (2, 2, new, 8))
            assert p.known_positions().tolist() == [list(range(start, end))] * 2
            assert p.scaling == model.model.layers[0].self_attn.scaling
            assert p.causal
            assert (p.valid, p.mask, p.hidden, p.rotary) == (None,) * 4  # nobody asked for the last two
        assert layer.dense.column("position").tolist() == [[list(range(26))] * 2] * 2


def test_a_padded_pass_says_which_tokens_are_real_and_where(pair):
    model, _ = pair
    memory = longwave.cache(model, "spy", positions=True)
    ids, mask = left_padded(3, LENGTH + 5, PADS)
    for end in (LENGTH, LENGTH + 1, LENGTH + 5):
        read(model, memory, ids[:, :end], mask)
    for layer in memory.layers:
        prompt, step, chunk = layer.passes
        assert torch.equal(prompt.valid, mask[:, :LENGTH].bool())
        assert torch.equal(prompt.positions, positions_of(mask[:, :LENGTH], LENGTH))
        assert step.valid is None
        assert step.positions.tolist() == [[LENGTH - pad] for pad in PADS]
        assert chunk.positions.tolist() == [list(range(LENGTH - pad + 1, LENGTH - pad + 5)) for pad in PADS]
        for row, pad in enumerate(PADS):
            held = layer.dense.column("position")[row, :, : LENGTH + 5 - pad]
            assert held.tolist() == [list(range(LENGTH + 5 - pad))] * 2


def test_positions_are_the_models_own(pair):
    """Whoever gives other position_ids is believed, in steps too; a prompt of one token is a prompt."""
    model, _ = pair
    memory = longwave.cache(model, "spy", positions=True)
    read(model, memory, tokens(1, 1), position_ids=torch.tensor([[70]]))
    with StaticDecoder(model, memory, new_tokens=2, positions=torch.tensor([90])) as decoder:
        decoder.step(tokens(1, 1))
        decoder.step(tokens(1, 1))
    layer = memory.layers[1]
    assert [p.phase for p in layer.passes] == ["prompt", "step", "step"]
    assert all(p.module is model.model.layers[1].self_attn for p in layer.passes)
    assert layer.dense.column("position")[0].tolist() == [[70, 90, 91]] * 2


def test_not_causal_is_said(pair):
    memory = longwave.cache(pair[0], "spy")
    read(pair[0], memory, tokens(1, 12), is_causal=False)
    assert not memory.layers[0].passes[0].causal


def test_positions_that_a_model_does_not_say(pair):
    model, _ = pair
    layer = longwave.cache(model, "spy", positions=True).layers[0]
    layer.update(*torch.randn(2, 2, 2, 5, 8, dtype=model.dtype))
    layer.forward(torch.randn(2, 4, 5, 8, dtype=model.dtype), 1.0, None, model)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not hand position_ids"):
        layer.passes[0].known_positions()
    assert layer.dense.column("position")[1, 0].tolist() == [0, 1, 2, 3, 4]  # then tokens are counted


# queries


def check_queries(memory, rows, truths, ends, forgot=0):
    """Row b of the cache remembers the queries of the last tokens before ends[b] of truths[rows[b]]: of those whose
    number from 1 on is a multiple of `every`."""
    for index, layer in enumerate(memory.memory_layers()):
        queries, every = layer.queries, layer.queries.every
        numbers = queries.numbers()
        for row, (which, end) in enumerate(zip(rows, ends, strict=True)):
            count = min(WIDTH, (end + forgot) // every) - (end + forgot) // every + end // every
            assert queries.counts[row] == max(0, count)
            own = [number - 1 for number in range(every, end + 1, every)][-count:] if count > 0 else []
            want = truths[which].q[index][:, own]
            held = slice(WIDTH - len(own), WIDTH)
            torch.testing.assert_close(queries.q[row, :, held], want, rtol=1e-5, atol=1e-5)
            assert queries.positions[row, held].tolist() == own
            assert numbers[row].tolist() == [0] * (WIDTH - len(own)) + [number + 1 for number in own]


def rows_of(ids, pads):
    return [ids[row, pad:] for row, pad in enumerate(pads)]


@pytest.fixture
def padded(pair):
    """(model, ids, mask, a Truth of each row) of a batch whose rows differ in length."""
    ids, mask = left_padded(3, LENGTH + 12, PADS)
    return pair[0], ids, mask, [Truth(pair[1], row) for row in rows_of(ids, PADS)]


def ends_at(columns):
    return [columns - pad for pad in PADS]


@pytest.fixture(params=[1, 2, 3], ids="every {}".format)
def every(request):
    return request.param


@pytest.mark.parametrize("sizes", [(20, 1, 1, 5, 1), (7, 7, 6, 8), (1,) * 12, (31,)])
def test_queries_are_those_of_the_last_tokens(padded, sizes, every):
    model, ids, mask, truths = padded
    memory = longwave.cache(model, "spy", queries=WIDTH, every=every)
    end = 0
    for size in sizes:
        end += size
        read(model, memory, ids[:, :end], mask)
        check_queries(memory, range(3), truths, [max(0, n) for n in ends_at(end)])


def test_queries_of_an_even_batch_and_of_fewer_tokens_than_asked(pair, every):
    ids = tokens(2, 12)
    truths = [Truth(pair[1], row) for row in ids]
    memory = longwave.cache(pair[0], "spy", queries=WIDTH, every=every)
    for end in (2, 3, 4, 9, 12):
        read(pair[0], memory, ids[:, :end])
        check_queries(memory, [0, 1], truths, [end, end])


def test_queries_after_rows_move(padded, every):
    model, ids, mask, truths = padded
    memory = longwave.cache(model, "spy", queries=WIDTH, every=every)
    read(model, memory, ids[:, :LENGTH], mask)
    twin, order = copy.deepcopy(memory), [2, 0, 0]
    memory.reorder_cache(torch.tensor(order))
    check_queries(memory, order, truths, [ends_at(LENGTH)[row] for row in order])
    read(model, memory, ids[order, : LENGTH + 1], mask[order])
    read(model, memory, ids[order, : LENGTH + 4], mask[order])
    check_queries(memory, order, truths, [ends_at(LENGTH + 4)[row] for row in order])
    check_queries(twin, range(3), truths, ends_at(LENGTH))  # the copy has its own
    twin.batch_select_indices(torch.tensor([1]))
    twin.batch_repeat_interleave(2)
    check_queries(twin, [1, 1], truths, [ends_at(LENGTH)[1]] * 2)
    for layer in twin.memory_layers():
        layer.offload()
        layer.prefetch()
    read(model, twin, ids[[1, 1], : LENGTH + 2], mask[[1, 1]])
    check_queries(twin, [1, 1], truths, [ends_at(LENGTH + 2)[1]] * 2)


@pytest.mark.parametrize("step", [2, 3])
def test_fewer_queries_are_taken_from_more(padded, step):
    """What a dense cache remembers of every token serves who asks for some of them, as if they had been asked for."""
    model, ids, mask, _ = padded
    wanted = Needs(queries=4, every=step)
    assert (wanted | Needs(queries=2)).every == 1
    memory = longwave.cache(model, "spy", queries=(wanted | Needs(queries=2)).queries)
    read(model, memory, ids[:, :LENGTH], mask)
    direct = longwave.cache(model, "spy", queries=4, every=step)
    read(model, direct, ids[:, :LENGTH], mask)
    for ours, theirs in zip(memory.memory_layers(), direct.memory_layers(), strict=True):
        assert ours.queries.covers(wanted)
        found = ours.queries.last(4, step)
        assert found.counts == theirs.queries.counts
        torch.testing.assert_close(found.q, theirs.queries.q)
        assert torch.equal(found.numbers(), theirs.queries.numbers())
        assert not ours.queries.covers(Needs(queries=40))


@pytest.mark.parametrize("recording", [False, True])
def test_queries_after_crop(padded, recording, every):
    """Those of removed tokens are forgotten; older ones had been forgotten before."""
    model, ids, mask, truths = padded
    memory = longwave.cache(model, "spy", queries=WIDTH, every=every)
    read(model, memory, ids[:, :LENGTH], mask)
    if recording:
        memory.activate_past_recording()
    guess = ids.roll(3, 1)
    guess[:, :LENGTH] = ids[:, :LENGTH]
    read(model, memory, guess[:, : LENGTH + 4], mask)
    memory.crop(-4)
    check_queries(memory, range(3), truths, ends_at(LENGTH), forgot=4)
    read(model, memory, ids[:, : LENGTH + 1], mask)
    read(model, memory, ids[:, : LENGTH + 6], mask)
    check_queries(memory, range(3), truths, ends_at(LENGTH + 6))


def steps(model, memory, ids, mask, start, end):
    positions = positions_of(mask[:, : start + 1], 1)
    with StaticDecoder(model, memory, new_tokens=end - start + 3, positions=positions) as decoder:
        return [decoder.step(ids[:, column]).clone() for column in range(start, end)]


def test_queries_in_steps(padded):
    model, ids, mask, truths = padded
    memory = longwave.cache(model, "spy", queries=WIDTH)
    read(model, memory, ids[:, :LENGTH], mask)
    steps(model, memory, ids, mask, LENGTH, LENGTH + 2)
    check_queries(memory, range(3), truths, ends_at(LENGTH + 2))
    steps(model, memory, ids, mask, LENGTH + 2, LENGTH + 10)
    check_queries(memory, range(3), truths, ends_at(LENGTH + 10))


def test_what_was_seen_goes_on_in_a_fork(padded):
    model, ids, mask, truths = padded
    fewer = longwave.cache(model, "spy", queries=WIDTH, mass=True)
    more = longwave.cache(model, "spy", queries=WIDTH + 3)
    dense = prefill(model, ids[:, :LENGTH], mask[:, :LENGTH], needs_of([fewer, more]))
    assert dense.layers[0].queries.width == WIDTH + 3
    memory = fork(dense, fewer)
    check_queries(memory, range(3), truths, ends_at(LENGTH))
    check_mass(memory, truths, ends_at(LENGTH))
    fork(dense, more)
    # a fork's columns are those of the longest row, so that its mask is made of real tokens from there on
    assert memory.get_seq_length() == LENGTH
    steps(model, memory, ids, mask, LENGTH, LENGTH + 3)
    check_queries(memory, range(3), truths, ends_at(LENGTH + 3))
    check_mass(memory, truths, ends_at(LENGTH + 3))
    with pytest.raises(ValueError, match=r"not observed while it read \(mass\): prefill"):
        fork(prefill(model, ids[:, :LENGTH], None), longwave.cache(model, "spy", mass=True))
    with pytest.raises(ValueError, match=r"not observed while it read \(9 queries\)"):
        fork(prefill(model, ids[:, :LENGTH], None), longwave.cache(model, "spy", queries=9))


def test_pickled_caches_go_on_observing(padded):
    model, ids, mask, truths = padded
    memory = longwave.cache(model, "spy", queries=WIDTH, mass=True)
    read(model, memory, ids[:, :LENGTH], mask)
    memory = pickle.loads(pickle.dumps(memory))
    read(model, memory, ids[:, : LENGTH + 2], mask)
    check_queries(memory, range(3), truths, ends_at(LENGTH + 2))
    check_mass(memory, truths, ends_at(LENGTH + 2))


# mass


def check_mass(memory, truths, ends, rows=None, asked=None):
    """Row b holds for each of its first ends[b] tokens what the queries of these gave it."""
    for index, layer in enumerate(memory.memory_layers()):
        held = layer.dense.column("mass")
        assert held.dtype == torch.float32
        for row, end in enumerate(ends):
            which = row if rows is None else rows[row]
            want = truths[which].mass(index, slice(end) if asked is None else asked[row])[:, :end]
            torch.testing.assert_close(held[row, :, :end], want.float(), rtol=1e-5, atol=1e-5)
            assert not held[row, :, end:].any()
        assert not layer.dense.columns["mass"][:, :, max(ends) :].any()


@pytest.mark.parametrize("sizes", [(20, 1, 1, 5, 1), (7, 7, 6, 8), (1,) * 12, (31,)])
def test_mass_is_the_sum_of_the_softmax(padded, sizes):
    model, ids, mask, truths = padded
    memory = longwave.cache(model, "spy", mass=True)
    end = 0
    for size in sizes:
        end += size
        read(model, memory, ids[:, :end], mask)
        check_mass(memory, truths, [max(0, n) for n in ends_at(end)])


def test_mass_in_steps_and_after_rows_moved(padded):
    model, ids, mask, truths = padded
    memory = longwave.cache(model, "spy", mass=True)
    read(model, memory, ids[:, :LENGTH], mask)
    steps(model, memory, ids, mask, LENGTH, LENGTH + 4)
    check_mass(memory, truths, ends_at(LENGTH + 4))
    order = [1, 2, 1, 0]
    memory.reorder_cache(torch.tensor(order))
    steps(model, memory, ids[order], mask[order], LENGTH + 4, LENGTH + 5)
    read(model, memory, ids[order, : LENGTH + 9], mask[order])
    check_mass(memory, truths, [ends_at(LENGTH + 9)[row] for row in order], rows=order)


def test_mass_after_crop(pair):
    """Tokens go with what they got; what they gave has been given."""
    model, eager = pair
    ids = tokens(1, 30)
    memory = longwave.cache(model, "spy", mass=True)
    read(model, memory, ids[:, :20])
    read(model, memory, ids[:, :24])
    memory.crop(-4)
    truth = Truth(eager, ids[0])
    check_mass(memory, [truth], [20], asked=[slice(24)])
    read(model, memory, ids[:, :30])
    again = truth.mass(0) + torch.nn.functional.pad(truth.mass(0, slice(20, 24))[:, :20], (0, 10))
    torch.testing.assert_close(memory.layers[0].dense.column("mass")[0], again.float(), rtol=1e-5, atol=1e-5)


def test_mass_where_all_see_all(pair):
    """Not causal: rows of padding ask nothing."""
    model, _ = pair
    ids, mask = left_padded(2, 16, [0, 5])
    memory = longwave.cache(model, "spy", mass=True)
    read(model, memory, ids, mask, is_causal=False)
    for layer in memory.layers:
        held = layer.dense.column("mass")
        queries = torch.tensor([16.0, 11.0]) * 2  # a query gives 1, and two heads of them share a KV head
        torch.testing.assert_close(held.sum(-1), queries[:, None].expand(-1, 2), rtol=1e-5, atol=1e-5)
        assert not held[1, :, 11:].any()


def test_what_watches_attention_refuses_a_mask_of_the_callers(pair):
    model, eager = pair
    ids = tokens(1, 20)
    mask = torch.ones(1, 1, 4, 20, dtype=torch.bool)
    for needs in (dict(mass=True), dict(queries=WIDTH)):
        memory = longwave.cache(model, "spy", **needs)
        read(model, memory, ids[:, :16])
        with pytest.raises(NotImplementedError, match="watches what attention reads"), torch.no_grad():
            model(ids[:, 16:], **into(memory), attention_mask=mask)
        read(model, memory, ids)  # as if it had not been asked
        if "mass" in needs:
            check_mass(memory, [Truth(eager, ids[0])], [20])


# keys before rotation, and what goes into attention


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_unrotated_keys_are_the_projections(pairs, kind):
    model, eager = pairs[kind]
    memory = longwave.cache(model, "spy", unrotated=True)
    ids, mask = left_padded(2, 28, [0, 9])
    for end in (20, 21, 28):
        read(model, memory, ids[:, :end], mask)
    truths = [Truth(eager, row) for row in rows_of(ids, [0, 9])]
    seen = 0
    for layer in memory.memory_layers():
        keys = torch.cat(layer.unrotated, dim=2)
        for row, pad in enumerate([0, 9]):
            want = truths[row].keys[layer.index]
            torch.testing.assert_close(keys[row, :, pad:], want, rtol=1e-5, atol=1e-5)
            rotated = torch.cat([p.k for p in layer.passes], dim=2)[row, :, pad:]
            assert not torch.allclose(rotated, want, atol=1e-2)
        seen += 1
    assert seen == (3 if kind == "llama" else 1)


def test_unrotated_keys_in_steps(pair):
    model, eager = pair
    ids = tokens(1, 24)
    memory = longwave.cache(model, "spy", unrotated=True)
    read(model, memory, ids[:, :20])
    steps(model, memory, ids, torch.ones_like(ids), 20, 24)
    truth = Truth(eager, ids[0])
    for layer in memory.layers:
        torch.testing.assert_close(torch.cat(layer.unrotated, 2)[0], truth.keys[layer.index], rtol=1e-5, atol=1e-5)


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_hidden_is_what_goes_into_attention(pairs, kind):
    model, eager = pairs[kind]
    memory = longwave.cache(model, "spy", hidden=True)
    ids, mask = left_padded(2, 28, [0, 9])
    for end in (20, 21, 28):
        read(model, memory, ids[:, :end], mask)
    truths = [Truth(eager, row) for row in rows_of(ids, [0, 9])]
    for layer in memory.memory_layers():
        hidden = torch.cat([p.hidden for p in layer.passes], dim=1)
        for row, pad in enumerate([0, 9]):
            torch.testing.assert_close(hidden[row, pad:], truths[row].hidden[layer.index], rtol=1e-5, atol=1e-5)


def test_hidden_in_steps_and_beside_other_caches(pair):
    """Steps hand it on as well, and other passes of the model in between do not get in the way."""
    model, eager = pair
    ids = tokens(1, 24)
    memory = longwave.cache(model, "spy", hidden=True)
    other = longwave.cache(model, "spy", hidden=True)
    read(model, memory, ids[:, :20])
    read(model, other, tokens(2, 9, seed=4))
    with torch.no_grad():
        model(tokens(2, 7, seed=3), use_cache=False)
    steps(model, memory, ids, torch.ones_like(ids), 20, 24)
    truth = Truth(eager, ids[0])
    for layer in memory.layers:
        hidden = torch.cat([p.hidden for p in layer.passes], dim=1)
        torch.testing.assert_close(hidden[0], truth.hidden[layer.index], rtol=1e-5, atol=1e-5)


def test_hooks_go_with_the_last_copy_of_their_cache():
    model = build("gemma3")
    memory = longwave.cache(model, "spy", hidden=True)
    assert hooks_of(model) == 1  # of the one layer that attends over everything
    read(model, memory, tokens(1, 12))
    twin = copy.deepcopy(memory)
    del memory
    gc.collect()
    assert hooks_of(model) == 1
    read(model, twin, tokens(1, 15))
    assert pickle.loads(pickle.dumps(twin)).get_seq_length() == 15
    other = longwave.cache(model, "spy", hidden=True)
    assert hooks_of(model) == 2
    del twin
    gc.collect()
    assert hooks_of(model) == 1
    del other
    gc.collect()
    assert hooks_of(model) == 0
    longwave.cache(model, "spy", queries=3, mass=True)
    assert hooks_of(model) == 0  # nobody asked


def test_a_model_whose_input_is_not_seen_says_so(pair):
    model, _ = pair
    memory = longwave.cache(model, "spy", hidden=True)
    twin = copy.deepcopy(model)  # hooks are copied with it
    for module in twin.modules():
        module._forward_pre_hooks.clear()
    with pytest.raises(ValueError, match="input of LlamaAttention was not seen"):
        read(twin, memory, tokens(1, 12))
    read(model, memory, tokens(1, 12))  # refused, not failed
