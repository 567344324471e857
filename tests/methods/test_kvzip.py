"""kvzip: what each token gets while the model repeats its context, by stock transformers' own eager attention."""

import copy
import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import longwave
from longwave.frame.observe import Repeat
from tests.conftest import build, into, left_padded, tokens
from tests.reading import check_state, read, read_in, state_of

SMALL = dict(sinks=2, window=8)
ROOM = dict(sinks=2, window=8, tokens=4096)


@pytest.fixture(scope="module")
def made():
    return {name: build(name, torch.float64) for name in ("llama", "gemma3", "qwen3next")}


@pytest.fixture(scope="module")
def eager():
    model = build("llama", torch.float64)
    model.set_attn_implementation("eager")
    return model


def column(layer, name):
    """Of all heads, which hold as many: [batch, kv_heads, n]."""
    return torch.cat([layer.head(head)[0][name] for head in range(2)], 1)


def scores(memory):
    name = memory.method.method.repeat.column
    return [column(layer, name) for layer in memory.memory_layers()]


def places(layer, row=0):
    """What each head of a row holds, by its place in the text."""
    found = []
    for head in range(2):
        items, lengths = layer.head(head)
        found.append(items["position"][row, 0, : lengths[row]].tolist())
    return found


def total(memory, row=0):
    return sum(layer.total(row) for layer in memory.memory_layers())


def by_hand(eager, ids, repeat):
    """Of every layer [kv_heads, tokens]: one pass over the text and what is repeated, the softmax renormalised."""
    n = len(ids)
    found = [torch.zeros(2, n, dtype=torch.float64) for _ in eager.model.layers]
    for start in range(0, n, repeat.chunk):
        stop = min(n, start + repeat.chunk)
        again = [*repeat.ask, *ids[max(0, start - repeat.lead) : start].tolist(), *ids[start:stop].tolist()]
        whole = torch.cat([ids, torch.tensor(again)])
        with torch.no_grad():
            shares = eager(whole[None], output_attentions=True, use_cache=False).attentions
        counted = [i for i in range(len(whole)) if i >= n or start <= i < stop or i < repeat.sinks]
        for layer, share in zip(found, shares, strict=True):
            asked = share[0, :, n:]  # [query_heads, repeated, all]
            part = asked[:, :, start:stop] / asked[:, :, counted].sum(-1, keepdim=True)
            layer[:, start:stop] = part.unflatten(0, (2, -1)).amax((1, 2))
    return found


@pytest.mark.parametrize("repeat", [Repeat(16, 3, 2, (5, 6)), Repeat(50, 8, 2), Repeat(7, 0, 2), Repeat(2048, 8, 2)])
def test_scores_are_those_of_plain_attention(made, eager, repeat):
    method = longwave.KVzip(chunk=repeat.chunk, lead=repeat.lead, ask=repeat.ask, **ROOM)
    memory, ids = longwave.cache(made["llama"], method), tokens(1, 50)
    assert method.repeat == repeat
    read(made["llama"], memory, ids)
    for got, want in zip(scores(memory), by_hand(eager, ids[0], repeat), strict=True):
        torch.testing.assert_close(got[0], want.float(), rtol=1e-5, atol=1e-6)


def test_those_of_highest_score_stay_of_all_heads_and_layers(made, eager):
    memory, ids = longwave.cache(made["llama"], longwave.KVzip(chunk=16, lead=3, **SMALL), budget=0.4), tokens(1, 60)
    read(made["llama"], memory, ids)
    worth = torch.stack(by_hand(eager, ids[0], memory.method.method.repeat))[:, :, 2:52]
    free = memory.method.limit(60) - 10
    least = worth.flatten().topk(free * worth[..., 0].numel()).values[-1]
    counts = set()
    for layer, own in zip(memory.memory_layers(), worth, strict=True):
        for share, held in zip(own, places(layer), strict=True):
            assert held == [0, 1, *((share >= least).nonzero()[:, 0] + 2).tolist(), *range(52, 60)]
            counts.add(len(held))
    assert len(counts) > 2


def test_uniform_gives_every_head_as_many(made, eager):
    method = longwave.KVzip(chunk=16, lead=3, uniform=True, **SMALL)
    memory, ids = longwave.cache(made["llama"], method, budget=0.4), tokens(1, 60)
    read(made["llama"], memory, ids)
    kept = memory.method.limit(60) - 10
    for layer, worth in zip(memory.memory_layers(), by_hand(eager, ids[0], method.repeat), strict=True):
        for head, held in enumerate(layer.dense.column("position")[0].tolist()):
            middle = sorted((worth[head, 2:52].topk(kept).indices + 2).tolist())
            assert held == [0, 1, *middle, *range(52, 60)]


@dataclass(frozen=True)
class Often(longwave.KVzip):
    every: ClassVar[int] = 8


@pytest.mark.parametrize("given", [dict(tokens=24), {}], ids=["tokens", "budget"])
def test_layers_together_hold_the_budget_in_every_turn(made, given):
    """Shared anew after every prompt; between two, all get their even share of what is written."""
    model, ids = made["llama"], left_padded(2, 160, [0, 20])
    memory = longwave.cache(model, Often(chunk=16, **given, **SMALL), budget=None if given else 0.3)
    layers, end, bound = list(memory.memory_layers()), 0, memory.method
    heads, spreads = 2 * len(layers), []
    for size in (60, *[1] * 20, 40, *[1] * 10, 2):
        end += size
        read(model, memory, ids[0][:, :end], ids[1])
        for row in range(2):
            even = bound.limit(layers[row].rows[row])
            assert sum(layer.more[row] for layer in layers) == 0
            assert heads * even <= total(memory, row) < heads * (even + (8 if size == 1 else 1))
            assert total(memory, row) == sum(len(own) for layer in layers for own in places(layer, row))
        if size > 1:
            assert memory.nbytes == bound.nbytes(end, 2) - far_less(bound, end)
            spreads.append([layer.more[0] for layer in layers])
    assert any(spreads[0])
    assert spreads[0] != spreads[1]


def far_less(bound, end):
    """Bytes that the second row, 20 tokens shorter, does not take behind the window."""
    each = sum(bound.layer_bytes(index, end) - bound.layer_bytes(index, end - 20) for index in range(3))
    return each


def test_of_what_was_written_all_heads_keep_as_much(made):
    """It has no score: of equals the earlier ones stay, in all heads as many up to one."""
    model, ids = made["llama"], tokens(1, 120)
    memory = longwave.cache(model, Often(chunk=16, **SMALL), budget=0.3)
    read_in(model, memory, ids, (60, *[1] * 60))
    for layer in memory.memory_layers():
        left = layer.rows[0] - layer.dense.lengths[0]
        written = [[place for place in held if 60 <= place < left] for held in places(layer)]
        assert abs(len(written[0]) - len(written[1])) <= 1
        assert len(written[0]) > 4


def test_ragged_heads_are_read_again_as_they_are(made):
    """What a row's heads give to the reading is what they hold, head by head."""
    model, (ids, mask) = made["llama"], left_padded(2, 60, [0, 9])
    memory = longwave.cache(model, longwave.KVzip(chunk=16, **SMALL), budget=0.3)
    read(model, memory, ids, mask)
    for layer in memory.memory_layers():
        for row in range(2):
            for head, (own, k, v) in enumerate(layer.by_heads(row)):
                items, lengths = layer.head(head)
                assert own == slice(head, head + 1)
                assert torch.equal(k, items["k"][row : row + 1, :, : lengths[row]])
                assert torch.equal(v, items["v"][row : row + 1, :, : lengths[row]])


def test_what_layers_were_given_is_kept(made):
    """In a state that is put back: the next steps hold as much of every layer."""
    model, ids = made["llama"], tokens(1, 90)
    memory, other = (longwave.cache(model, Often(chunk=16, **SMALL), budget=0.3) for _ in range(2))
    read(model, memory, ids[:, :60])
    for layer, twin in zip(memory.layers, other.layers, strict=True):
        twin.load_state(copy.deepcopy(layer.state()), layer.device)
    assert any(layer.more[0] for layer in other.layers)
    assert torch.equal(read_in(model, memory, ids, (1,) * 20), read_in(model, other, ids, (1,) * 20))
    assert [places(layer) for layer in memory.layers] == [places(layer) for layer in other.layers]
    wrong = {**memory.layers[0].state(), "more": [0, 0]}
    with pytest.raises(ValueError, match="rows differ in number"):
        other.layers[0].load_state(wrong, memory.layers[0].device)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3next"])
def test_the_cache_is_as_if_it_had_been_read_once(made, name):
    """Length, bits, and layers of transformers' own: padded rows, a prompt and a chunk."""
    model = made[name]
    pads = [0, 0] if name == "qwen3next" else [0, 9]
    ids, mask = left_padded(2, 70, pads)
    memory, dense = longwave.cache(model, longwave.KVzip(chunk=16, **ROOM)), longwave.cache(model, "dense")
    got, want = (read_in(model, held, ids, (40, 1, 1, 20, 1), mask) for held in (memory, dense))
    assert torch.equal(got, want)
    for ours, theirs in zip(memory.layers, dense.layers, strict=True):
        if hasattr(theirs, "dense"):
            assert all(map(torch.equal, ours.materialize(), theirs.materialize()))
            assert (ours.rows, ours.columns) == (theirs.rows, theirs.columns)
        elif hasattr(theirs, "keys"):
            assert torch.equal(ours.keys, theirs.keys)
        else:
            assert all(map(torch.equal, ours.recurrent_states.values(), theirs.recurrent_states.values()))


def test_padding_and_neighbours_change_no_score(made):
    ids, mask = left_padded(3, 50, [0, 7, 30])
    method = longwave.KVzip(chunk=16, lead=3, ask=(9,), **ROOM)
    for name in ("llama", "gemma3"):
        memory = longwave.cache(made[name], method)
        read(made[name], memory, ids, mask)
        for row, pad in enumerate([0, 7, 30]):
            alone = longwave.cache(made[name], method)
            read(made[name], alone, ids[row : row + 1, pad:])
            for ours, theirs in zip(scores(memory), scores(alone), strict=True):
                torch.testing.assert_close(ours[row, :, : 50 - pad], theirs[0])


def test_padding_changes_no_score_where_nobody_says_positions(made):
    """Models count columns then, padding included."""
    ids, mask = left_padded(2, 50, [0, 30])
    memory, alone = (longwave.cache(made["llama"], longwave.KVzip(chunk=16, lead=3, **ROOM)) for _ in range(2))
    with torch.no_grad():
        made["llama"](ids, attention_mask=mask, **into(memory))
    read(made["llama"], alone, ids[1:, 30:])
    for ours, theirs in zip(scores(memory), scores(alone), strict=True):
        torch.testing.assert_close(ours[1, :, :20], theirs[0])


def test_a_chunk_of_the_prompt_is_repeated_after_it(made, eager):
    """Its tokens have scores of their own, those before keep theirs, steps have none."""
    memory, ids = longwave.cache(made["llama"], longwave.KVzip(chunk=64, lead=0, **ROOM)), tokens(1, 47)
    read_in(made["llama"], memory, ids, (20, 1, 26))
    first = by_hand(eager, ids[0, :20], Repeat(64, 0, 2))
    # the second chunk is repeated alone: as if chunks of the whole text were cut there
    for layer, early, share in zip(scores(memory), first, eager_shares(eager, ids[0], 21), strict=True):
        torch.testing.assert_close(layer[0, :, :20], early.float(), rtol=1e-5, atol=1e-6)
        assert (layer[0, :, 20] == 0).all()
        torch.testing.assert_close(layer[0, :, 21:], share.float(), rtol=1e-5, atol=1e-6)


def eager_shares(eager, ids, start):
    n, whole = len(ids), torch.cat([ids, ids[start:]])
    with torch.no_grad():
        shares = eager(whole[None], output_attentions=True, use_cache=False).attentions
    for share in shares:
        asked = share[0, :, n:]
        counted = asked[:, :, [*range(2), *range(start, len(whole))]].sum(-1, keepdim=True)
        yield (asked[:, :, start:n] / counted).unflatten(0, (2, -1)).amax((1, 2))


def test_embeddings_are_repeated_as_they_are(made):
    """A model that reads images has no ids of them."""
    model, ids = made["llama"], tokens(2, 40)
    method = longwave.KVzip(chunk=16, ask=(5,), **ROOM)
    one, two = longwave.cache(model, method), longwave.cache(model, method)
    read(model, one, ids)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), **into(two))
    check_state(state_of(two), state_of(one))


def test_the_decoder_alone_reads_twice_as_well(made):
    model, ids = made["llama"], tokens(1, 40)
    one, two = (longwave.cache(model, longwave.KVzip(**SMALL), budget=0.3) for _ in range(2))
    read(model, one, ids)
    with torch.no_grad():
        model.model(ids, None, None, two)
    check_state(state_of(two), state_of(one))


def test_a_request_in_another_tokenizer_is_refused_at_once(made):
    with pytest.raises(ValueError, match="token 97 of ask is none of this model's, which knows 97"):
        longwave.cache(made["llama"], longwave.KVzip(ask=(5, 97), **SMALL), budget=0.3)


def test_hooks_go_with_the_last_cache():
    model = build("llama")
    memory = longwave.cache(model, longwave.KVzip(**SMALL), budget=0.3)
    twin = copy.deepcopy(memory)
    count = lambda: len(model.model._forward_hooks) + len(model.model._forward_pre_hooks)  # noqa: E731
    assert count() == 2
    del memory
    assert count() == 2
    del twin
    assert count() == 0
    longwave.cache(model, longwave.KVzip(**SMALL), budget=1.0)
    assert count() == 0  # nothing ever goes, so nothing is read twice


def test_a_cache_that_has_lost_its_model_says_so_before_it_reads():
    model, ids = build("llama"), tokens(1, 60)
    memory = longwave.cache(model, longwave.KVzip(**SMALL), budget=0.3)
    read(model, memory, ids[:, :40])
    stored = pickle.dumps(memory)
    del memory
    found = pickle.loads(stored)
    before = state_of(found)
    with pytest.raises(ValueError, match="the model that the cache was built on"):
        read(model, found, ids[:, :50])
    check_state(state_of(found), before)
    read(model, found, ids[:, :41])  # a step is never repeated
    fresh = longwave.cache(model, found.method)
    read(model, fresh, ids)


def test_a_reading_that_fails_leaves_a_mark(monkeypatch):
    from longwave.frame import again

    model, ids = build("llama"), tokens(1, 40)
    memory = longwave.cache(model, longwave.KVzip(**SMALL), budget=0.3)
    monkeypatch.setattr(again, "last_attention", lambda *args: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        read(model, memory, ids)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"cache\.reset"):
        read(model, memory, ids)
    memory.reset()
    assert torch.isfinite(read(model, memory, ids)).all()


def test_a_refused_pass_is_not_repeated(made):
    model, ids = made["llama"], tokens(1, 40)
    memory = longwave.cache(model, longwave.KVzip(**SMALL), budget=0.3)
    read(model, memory, ids)
    before = state_of(memory)
    with pytest.raises(NotImplementedError, match="4D"), torch.no_grad():
        model(ids, attention_mask=torch.rand(1, 1, 40, 80, dtype=torch.float64), **into(memory))
    check_state(state_of(memory), before)
    read(model, memory, torch.cat([ids, ids], 1))


def test_options_are_checked():
    for options, message in (
        (dict(chunk=0), "chunk is a whole number of tokens"),
        (dict(lead=-1), "lead is a whole number of tokens"),
        (dict(ask="again"), "tokenizer"),
        (dict(ask=(1, -2)), "a token of ask"),
        (dict(uniform=1), "uniform is True or False, got 1"),
        (dict(positions="slots"), "slots would turn"),
        (dict(store="kivi"), "leave store out"),
    ):
        with pytest.raises(ValueError, match=message):
            longwave.KVzip(**options)
    assert longwave.KVzip(ask=[1, 2]) == replace(longwave.KVzip(), ask=(1, 2))


def test_a_size_must_hold_the_prompt_whole(llama):
    whole = longwave.cache(llama, "dense").method.nbytes(200)
    with pytest.raises(ValueError, match="holds all of a prompt"):
        longwave.cache(llama, longwave.KVzip(**SMALL), budget=f"{whole // 2}B", max_tokens=200)
    assert longwave.cache(llama, longwave.KVzip(**SMALL), budget=f"{whole}B", max_tokens=200).method.whole
