"""Calibration windows: exact lengths, facts that are there to be found, weights on nothing but the answers."""

import re

import pytest
import torch

from longwave.plan.recall import FACTS, HIDDEN, NAMES, Windows, _alternate, windows

CONTEXT, SCORED = 700, 330
PROSE = "It was a bright day in April, and the clocks were striking. " * 60
CODE = "def add(a, b):\n    return a + b\n\n" * 120


@pytest.fixture(scope="module")
def made(tokenizer):
    return windows(tokenizer, [PROSE, CODE], CONTEXT, SCORED, prose=4, recall=4, seed=1)


def test_rows_have_the_exact_lengths(made):
    assert made.ids.shape == (8, CONTEXT + SCORED + 1)
    assert made.ids.dtype == torch.int64
    assert made.weight.shape == (8, SCORED)
    assert made.recall.shape == (8,)
    assert made.recall.dtype == torch.bool
    assert made.context == CONTEXT
    torch.testing.assert_close(made.weight.sum(-1), torch.ones(8))


def test_prose_rows_are_the_text_itself_and_count_all(made, tokenizer):
    rows = [i for i in range(8) if not made.recall[i]]
    for number, row in enumerate(rows):
        assert tokenizer.decode(made.ids[row].tolist()) in (PROSE, CODE)[number % 2]  # texts in turn
        assert torch.equal(made.weight[row], torch.full((SCORED,), 1 / SCORED))


def asked_and_said(made, row, tokenizer):
    """(context, [(question, answer)]) of a recall row, by where its weights lie."""
    ids, counted = made.ids[row].tolist(), (made.weight[row] > 0).tolist()
    scored = ids[made.context + 1 :]  # weight i counts what stands at context + 1 + i
    pairs, question, answer = [], ids[made.context : made.context + 1], []
    for token, counts in zip(scored, counted, strict=True):
        if answer and not counts:
            pairs.append((tokenizer.decode(question), tokenizer.decode(answer)))
            question, answer = [], []
        (answer if counts else question).append(token)
    if answer:
        pairs.append((tokenizer.decode(question), tokenizer.decode(answer)))
    return tokenizer.decode(ids[: made.context]), pairs


def check_recall(made, row, tokenizer, least):
    context, pairs = asked_and_said(made, row, tokenizer)
    assert len(pairs) >= least
    found = re.findall(r"code of the (\w+) room is (\d{5})\.|\n(\w+)_limit = (\d{5})\n", context)
    said = {code or limit: value or other for code, value, limit, other in found}
    assert len(said) == HIDDEN
    assert set(said) <= set(NAMES)
    names = []
    for question, answer in pairs:
        name = re.fullmatch(r"\nThe access code of the (\w+) room is|\n(\w+)_limit =", question)
        assert name, question
        names.append(name[1] or name[2])
        assert answer == f" {said[names[-1]]}"
    assert len(set(names)) == len(names)
    assert len(made.weight[row][made.weight[row] > 0].unique()) == 1  # all answer tokens alike


def test_weights_lie_on_the_answers_and_facts_in_the_context(made, tokenizer):
    for row in range(8):
        if made.recall[row]:
            check_recall(made, row, tokenizer, least=6)


def test_answers_of_a_real_tokenizer(smollm2):
    made = windows(smollm2[1], [PROSE, CODE], 500, 96, prose=0, recall=4)
    assert made.ids.shape == (4, 597)
    for row in range(4):
        check_recall(made, row, smollm2[1], least=4)


def test_the_last_question_is_left_out_whole(tokenizer):
    """Whatever the room, no answer is cut: the text goes on after the last that fits."""
    for scored in range(60, 400, 37):
        made = windows(tokenizer, [PROSE], CONTEXT, scored, prose=0, recall=2)
        for row in range(2):
            _, pairs = asked_and_said(made, row, tokenizer)
            assert pairs
            assert all(re.fullmatch(r" \d{5}", answer) for _, answer in pairs)


def test_the_text_around_the_facts_goes_on(made, tokenizer):
    """Without the facts a recall row's context is one stretch of its text."""
    for number, row in enumerate(i for i in range(8) if made.recall[i]):
        context = tokenizer.decode(made.ids[row, :CONTEXT].tolist())
        for pattern in (r"\nThe access code of the \w+ room is \d{5}\.\n", r"\n\w+_limit = \d{5}\n"):
            context = re.sub(pattern, "", context)
        assert context in (PROSE, CODE)[number % 2]


@pytest.mark.parametrize(
    ("prose", "recall", "expected"),
    [(2, 2, "prpr"), (4, 2, "pprppr"), (6, 3, "pprpprppr"), (3, 0, "ppp"), (0, 2, "rr"), (1, 3, "rprr")],
)
def test_kinds_alternate(prose, recall, expected):
    kinds = _alternate(prose, recall)
    assert (kinds.count(False), kinds.count(True)) == (prose, recall)
    for end in range(1, len(kinds) + 1):  # any first part holds both in proportion
        assert abs(kinds[:end].count(True) - end * recall / (prose + recall)) < 1
    if len(set(expected)) == 1:
        assert "".join("pr"[kind] for kind in kinds) == expected


def test_rows_follow_the_kinds(made):
    assert made.recall.tolist() == _alternate(4, 4)


def test_a_seed_is_all_that_decides(tokenizer, made):
    again = windows(tokenizer, [PROSE, CODE], CONTEXT, SCORED, prose=4, recall=4, seed=1)
    other = windows(tokenizer, [PROSE, CODE], CONTEXT, SCORED, prose=4, recall=4, seed=2)
    assert torch.equal(again.ids, made.ids)
    assert torch.equal(again.weight, made.weight)
    assert not torch.equal(other.ids, made.ids)


def test_a_part_is_those_rows(made):
    part = made.part(slice(2, 5))
    assert isinstance(part, Windows)
    assert part.context == made.context
    for name in ("ids", "weight", "recall"):
        assert torch.equal(getattr(part, name), getattr(made, name)[2:5])


def test_both_kinds_of_fact_are_drawn(made, tokenizer):
    text = tokenizer.decode(made.ids[made.recall].flatten().tolist())
    assert "_limit =" in text
    assert "The access code" in text
    assert len(FACTS) == 2


# refusals


def test_a_text_of_exactly_one_window_will_do(tokenizer):
    need = CONTEXT + SCORED + 1
    made = windows(tokenizer, [PROSE[:need]], CONTEXT, SCORED, prose=2, recall=0)
    assert tokenizer.decode(made.ids[0].tolist()) == PROSE[:need]
    with pytest.raises(ValueError, match=rf"text number 2 has {need - 1} tokens, fewer than one window of 700 and 330"):
        windows(tokenizer, [PROSE, PROSE[: need - 1]], CONTEXT, SCORED, prose=2, recall=0)


def test_a_context_too_short_for_the_facts_is_refused(tokenizer):
    with pytest.raises(ValueError, match=f"window of 200 tokens is too short to hide {HIDDEN} facts"):
        windows(tokenizer, [PROSE], 200, SCORED, prose=0, recall=1)


def test_too_few_scored_tokens_are_refused(tokenizer):
    with pytest.raises(ValueError, match="10 scored tokens are too few for one question and its answer"):
        windows(tokenizer, [PROSE], CONTEXT, 10, prose=0, recall=1)
