"""specpc: the choice written out, by transformers' own attention weights; rows, positions, refusals."""

import copy

import pytest
import torch

import longwave
from longwave.prefill.specpc import chosen
from tests.conftest import VOCABULARY, build, into, left_padded, shallow, tokens

SMALL = dict(tokens=24, window=8, ahead=3, skip=1, kernel=5)


@pytest.fixture(scope="module")
def draft():
    return shallow(build("llama", torch.float64), 2)


def naive(draft, ids, tokens, window, ahead, skip, kernel):
    """Positions that stay of ids [1, n], one peak after the other."""
    eager, n = copy.deepcopy(draft), ids.shape[1]
    eager.set_attn_implementation("eager")
    whole = eager.generate(ids, max_new_tokens=ahead, do_sample=False) if ahead else ids
    with torch.no_grad():
        attentions = eager(whole, output_attentions=True).attentions[skip:]
    worth = torch.zeros(n, dtype=torch.float64)
    for p in attentions:
        for i in range(window + ahead):
            weight = i / (window - 1) if i < window else 1
            worth = torch.maximum(worth, weight * p[0, :, n - window + i, :n].amax(0))
    if n <= tokens:
        return list(range(n))
    kept, room = [], tokens - window
    for best in worth[: n - window].argsort(descending=True).tolist():
        for step in range(kernel // 2 + 1):
            for at in dict.fromkeys((best - step, best + step)):
                if 0 <= at < n - window and at not in kept and len(kept) < room:
                    kept.append(at)
    return sorted(kept) + list(range(n - window, n))


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("skip", [0, 1])
def test_the_best_stay_with_their_neighbours(draft, ahead, skip):
    options = SMALL | dict(ahead=ahead, skip=skip)
    for seed in range(4):
        ids = tokens(1, 60, seed)
        short = longwave.specpc(draft, ids, **options)
        want = naive(draft, ids, **options)
        got = short.positions[0].tolist()
        assert len(got) == 24
        assert got[-8:] == list(range(52, 60))
        # where the neighbourhoods of two peaks meet, the last places may go to either's
        assert len(set(got) & set(want)) >= 22


def test_a_choice_by_hand():
    worth = torch.zeros(30)
    worth[[4, 20, 26]] = torch.tensor([0.5, 0.9, 1.0])
    # 26 is one of the last four, and stays anyway; of 4's neighbourhood there is room for it and the one before it
    assert chosen(worth, 4 + 5 + 2, 4, 5).tolist() == [3, 4, 18, 19, 20, 21, 22, 26, 27, 28, 29]
    assert chosen(worth, 4 + 5, 4, 5).tolist() == [18, 19, 20, 21, 22, 26, 27, 28, 29]
    assert chosen(worth, 4 + 2, 4, 1).tolist() == [4, 20, 26, 27, 28, 29]
    assert chosen(worth, 30, 4, 5).tolist() == list(range(30))


def test_rows_are_alone(draft):
    pads = [0, 25, 45]
    ids, mask = left_padded(3, 60, pads)
    short = longwave.specpc(draft, ids, attention_mask=mask, **SMALL)
    assert short.mask.sum(-1).tolist() == [24, 24, 15]
    assert torch.equal(short.positions < 0, short.mask == 0)
    for row, pad in enumerate(pads):
        alone = longwave.specpc(draft, ids[row : row + 1, pad:], **SMALL)
        real = short.mask[row].bool()
        assert torch.equal(short.positions[row, real], alone.positions[0])
        assert torch.equal(short.ids[row, real], alone.ids[0])
        assert torch.equal(short.ids[row, real], ids[row, pad:][alone.positions[0]])
        assert torch.equal(short.drafted[row], alone.drafted[0])


def test_what_is_left_is_a_prompt_like_any_other(draft):
    """At fresh positions, in any cache; and what was drafted serves speckv as well."""
    model = build("llama", torch.float64)
    ids, mask = left_padded(2, 60, [0, 25])
    short = longwave.specpc(draft, ids, attention_mask=mask, **SMALL | dict(tokens=40))
    memory = longwave.cache(model, longwave.SpecKV(window=8, ahead=3), budget=0.3)
    longwave.look_ahead(model, memory, short.ids, short.drafted, short.mask)
    out = model.generate(short.ids, attention_mask=short.mask, **into(memory), max_new_tokens=3)
    assert out.shape == (2, 43)
    own = draft.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(short.drafted, own[:, 60:])


def test_a_short_prompt_stays(draft):
    ids = tokens(2, 20)
    short = longwave.specpc(draft, ids, **SMALL)
    assert torch.equal(short.ids, ids)
    assert short.mask.all()
    assert short.positions.tolist() == [list(range(20))] * 2
    one = longwave.specpc(draft, ids[:, :1], **SMALL)
    assert torch.equal(one.ids, ids[:, :1])


def test_sliding_layers_have_no_say():
    """One full layer among six: the others hold a window alone."""
    short = longwave.specpc(build("gemma3"), tokens(1, 60), **SMALL)
    assert short.ids.shape == (1, 24)


def test_the_draft_answers_as_before(draft):
    ids = tokens(1, 40)
    stock = build("llama", torch.float64)
    twin = shallow(stock, 2)
    longwave.specpc(draft, ids, **SMALL)
    options = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(draft.generate(ids, **options), twin.generate(ids, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=0), "window is a whole number of tokens, at least 1; got 0"),
        (dict(tokens=8), r"tokens is a whole number of tokens \(window \+ 1\), at least 9; got 8"),
        (dict(ahead=-1), "ahead is a whole number of tokens, at least 0; got -1"),
        (dict(skip=-1), "skip is a whole number of layers, at least 0; got -1"),
        (dict(skip=2), "skip=2 leaves no layer of this draft to ask: its last one with full attention is 1"),
        (dict(kernel=4), "kernel is an odd number of tokens, got 4"),
    ],
)
def test_wrong_options(draft, options, message):
    with pytest.raises(ValueError, match=message):
        longwave.specpc(draft, tokens(1, 30), **SMALL | options)


def test_another_tokenizer(draft):
    with pytest.raises(ValueError, match=f"the draft knows {VOCABULARY}"):
        longwave.specpc(draft, tokens(1, 30) + 200, **SMALL)
