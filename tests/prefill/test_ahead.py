"""look_ahead: what is kept is what transformers' own attention says, and nothing of the draft stays."""

import copy

import pytest
import torch
from torch.nn.functional import max_pool1d

import longwave
from longwave.decode import supports
from longwave.prefill.ahead import drafted, read_ahead
from tests.conftest import build, into, left_padded, shallow, tokens
from tests.reading import check_state, read, state_of

METHOD = longwave.SpecKV(sinks=2, window=8, ahead=5)
BUDGET = 0.3


@pytest.fixture(scope="module")
def made():
    """In float64 rounding moves no choice: name -> (model, its draft)."""
    found = {}
    for name, layers in (("llama", 1), ("qwen3", 1), ("gemma3", 6)):
        model = build(name, torch.float64)
        found[name] = model, shallow(model, layers)
    return found


@pytest.fixture(params=["llama", "gemma3"])
def pair(request, made):
    return made[request.param]


@pytest.fixture
def model(made):
    return made["llama"][0]


@pytest.fixture
def draft(made):
    return made["llama"][1]


def empty(model, method=METHOD, budget=BUDGET):
    return longwave.cache(model, method, budget=budget)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_what_is_kept_is_what_the_drafted_queries_look_at(made, name):
    """By the attention weights of an eager model over prompt and draft."""
    model, draft = made[name]
    ids = tokens(1, 60)
    memory = empty(model)
    written = longwave.look_ahead(model, memory, ids, draft)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(torch.cat([ids, written], 1), output_attentions=True).attentions
    for layer, p in zip(memory.memory_layers(), weights, strict=True):
        most = p[0, :, -(8 + 5 + 1) + 1 :].amax(1).unflatten(0, (2, -1)).amax(1)[:, :59]
        most[:, 51:] = 0
        worth = max_pool1d(most, 7, 1, 3)[:, 2:51]
        count = memory.method.limit(59) - 2 - 8
        kept = worth.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values + 2
        assert torch.equal(layer.dense.column("position")[0, :, 2 : 2 + count].long(), kept)
        assert layer.held() == [memory.method.limit(59)]


def test_a_draft_decides(model, draft):
    """Other drafted tokens, other tokens kept; and the window alone would keep others again."""
    ids, found = tokens(1, 60), []
    for one in (draft, tokens(1, 5, seed=3)):
        memory = empty(model)
        longwave.look_ahead(model, memory, ids, one)
        found.append(memory)
    found.append(empty(model, longwave.SpecKV(sinks=2, window=8, ahead=0)))
    read(model, found[-1], ids[:, :-1])
    kept = [memory.layers[1].dense.column("position") for memory in found]
    assert not any(torch.equal(a, b) for a, b in ((kept[0], kept[1]), (kept[0], kept[2]), (kept[1], kept[2])))


@pytest.mark.parametrize("pads", [[0, 0], [0, 23]], ids=["even", "padded"])
def test_rows_are_alone_and_both_loops_go_on_alike(pair, pads):
    model, draft = pair
    ids, mask = left_padded(2, 60, pads)
    options = dict(max_new_tokens=5, do_sample=False)
    found = []
    for loop in (model.generate, lambda *a, **k: longwave.generate(model, *a, **k)):
        memory = empty(model)
        longwave.look_ahead(model, memory, ids, draft, mask)
        found.append((loop(ids, attention_mask=mask, **into(memory), **options), memory))
    assert torch.equal(found[0][0], found[1][0])
    check_state(state_of(found[0][1]), state_of(found[1][1]), rtol=1e-6, atol=1e-6)
    for row, pad in enumerate(pads):
        memory = empty(model)
        longwave.look_ahead(model, memory, ids[row : row + 1, pad:], draft)
        alone = model.generate(ids[row : row + 1, pad:], **into(memory), **options)
        assert torch.equal(alone[0, 60 - pad :], found[0][0][row, 60:])


@pytest.mark.parametrize("pads", [[0, 0], [0, 23]], ids=["even", "padded"])
def test_generate_does_it_itself(pair, pads):
    """Its first token is the dense model's, since the prompt is read exactly."""
    model, draft = pair
    ids, mask = left_padded(2, 60, pads)
    memory = empty(model)
    got = longwave.generate(
        model, ids, attention_mask=mask, **into(memory), draft=draft, max_new_tokens=5, do_sample=False
    )
    dense = model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
    assert torch.equal(got[:, :61], dense)
    layer = next(memory.memory_layers())
    assert layer.rows == [64 - pad for pad in pads]
    for row, seen in enumerate(layer.rows):
        assert layer.held()[row] <= memory.method.most(seen)
    given = empty(model)
    written = drafted(model, empty(model), ids, draft, mask)
    again = longwave.generate(
        model, ids, attention_mask=mask, **into(given), draft=written, max_new_tokens=5, do_sample=False
    )
    assert torch.equal(again, got)


def test_budget_one_is_the_model_itself(pair):
    model, draft = pair
    ids = tokens(2, 60)
    memory = empty(model, budget=1)
    assert longwave.look_ahead(model, memory, ids, draft).shape == (2, 0)
    options = dict(max_new_tokens=5, do_sample=False)
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **into(memory), **options), want)
    assert torch.equal(longwave.generate(model, ids, **into(empty(model, budget=1)), draft=draft, **options), want)


def test_room_for_all_is_the_model_itself(pair):
    """Everything is observed, and nothing goes."""
    model, draft = pair
    ids = tokens(2, 60)
    memory = empty(model, longwave.SpecKV(tokens=4096, ahead=5), None)
    options = dict(max_new_tokens=5, do_sample=False)
    got = longwave.generate(model, ids, **into(memory), draft=draft, **options)
    assert torch.equal(got, model.generate(ids, **options))


@pytest.mark.parametrize("pads", [[0, 0], [0, 23]], ids=["even", "padded"])
def test_nothing_of_the_draft_stays(pair, pads):
    """Not in what is held, not in what is remembered, not in how the cache goes on."""
    model, _ = pair
    ids, mask = left_padded(2, 60, pads)
    memory, dense = empty(model), longwave.cache(model, "dense")
    longwave.look_ahead(model, memory, ids, tokens(2, 5, seed=4), mask)
    read(model, dense, ids[:, :59], mask)
    assert memory.get_seq_length() == 59
    assert memory.nbytes <= memory.method.peak_bytes(59, 2)
    for layer, whole in zip(memory.layers, dense.layers, strict=True):
        if hasattr(layer, "queries"):
            assert layer.rows == whole.rows
            assert layer.queries.seen == whole.rows
            assert int(layer.dense.column("position").max()) == 58
            assert not layer.ahead
        else:
            torch.testing.assert_close(layer.keys, whole.keys)
        assert not layer.record_past
    assert supports(model, memory) is None


def test_bytes_are_those_that_were_promised(model):
    for length in (20, 40, 75, 130):
        memory = empty(model)
        ids = tokens(2, length)
        written = tokens(2, 5, seed=4)
        read_ahead(model, memory, ids, written, torch.ones_like(ids))
        assert memory.nbytes == memory.method.nbytes(length, 2)


def test_logits_are_those_of_the_last_token_read_exactly(pair):
    model, _ = pair
    ids, mask = left_padded(2, 60, [0, 23])
    got = read_ahead(model, empty(model), ids, tokens(2, 5, seed=4), mask)
    want = read(model, longwave.cache(model, "dense"), ids, mask)[:, -1]
    torch.testing.assert_close(got, want)


def test_a_second_look_goes_on_from_what_was_read(model, draft):
    memory = empty(model)
    ids = tokens(2, 90)
    longwave.look_ahead(model, memory, ids[:, :60], draft)
    longwave.look_ahead(model, memory, ids, draft)
    assert memory.get_seq_length() == 89
    assert [layer.held() for layer in memory.layers] == [[memory.method.limit(89)] * 2] * 3
    out = model.generate(ids, **into(memory), max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 93)


def test_a_short_prompt_while_the_past_is_recorded(model):
    """It is not left to wait for `crop`, by when the drafted queries are gone."""
    ids, written = tokens(1, 20), tokens(1, 5, seed=4)
    method = longwave.SpecKV(sinks=0, window=8, ahead=5)
    memory, other = empty(model, method, 0.1), empty(model, method, 0.1)
    memory.activate_past_recording()
    longwave.look_ahead(model, memory, ids[:, :9], written)
    longwave.look_ahead(model, other, ids[:, :9], written)
    check_state(state_of(memory), state_of(other))


def check_refused(model, memory, what, *call, error=ValueError, **options):
    before = memory.get_seq_length()
    with pytest.raises(error, match=what):
        longwave.look_ahead(model, memory, *call, **options)
    assert memory.get_seq_length() == before


def test_what_is_refused_leaves_the_cache_alone(model, draft):
    ids = tokens(2, 30)
    check_refused(model, longwave.cache(model, "h2o"), 'build the cache with "speckv"', ids, draft)
    check_refused(model, empty(model, longwave.SpecKV(ahead=0)), "ahead above 0, or leave the draft out", ids, draft)
    check_refused(model, empty(model), "this one has no other: just generate", ids[:, :1], draft)
    check_refused(model, empty(model), r"\[batch, ahead\] = \[2, 5\], got \[2, 6\]", ids, ids[:, :6])
    check_refused(model, empty(model), "rows end in padding", ids, draft, (ids > 0).long().tril(28))
    check_refused(model, empty(model), "the prompt has token 500 and the draft knows", ids.clamp(max=1) * 500, draft)
    memory = empty(model)
    longwave.look_ahead(model, memory, ids, draft)
    check_refused(model, memory, "all of the prompt is in the cache already", ids[:, :29], draft)
    with pytest.raises(ValueError, match="a draft decides nothing for dense"):
        longwave.generate(model, ids, **into(longwave.cache(model, "dense")), draft=draft)
    with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
        longwave.generate(model, ids, **into(empty(model)), draft=draft, prefill_chunk_size=8)


def test_recurrent_states_do_not_go_back():
    model = build("qwen3next")
    ids = tokens(1, 30)
    check_refused(model, empty(model), "recurrent states do not go back", ids, ids[:, :5], error=NotImplementedError)


def test_a_failing_pass_marks_the_cache_and_looks_no_further(model, monkeypatch):
    memory, ids = empty(model), tokens(1, 40)
    monkeypatch.setattr(longwave.SpecKV, "votes", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        longwave.look_ahead(model, memory, ids, ids[:, :5])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="failed half-way"):
        longwave.look_ahead(model, memory, ids, ids[:, :5])
    memory.reset()
    with pytest.raises(ValueError, match="speckv chooses by"):  # it does not still look ahead
        read(model, memory, ids)
    longwave.look_ahead(model, memory, ids, ids[:, :5])


@pytest.mark.slow
def test_smollm2_by_its_own_first_layers(smollm2, real_text):
    """A real model, a shallow copy of it as draft: within the budget, and from the dense model's first token on."""
    model, tokenizer = smollm2
    ids = tokenizer(real_text[:2000], return_tensors="pt").input_ids
    memory = longwave.cache(model, "speckv", budget=0.25)
    got = longwave.generate(model, ids, **into(memory), draft=shallow(model, 20), max_new_tokens=6, do_sample=False)
    dense = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert got[0, ids.shape[1]] == dense[0, ids.shape[1]]
    assert memory.report().held <= memory.method.most(memory.get_seq_length())
