"""Values computed by hand."""

import pytest

from longwave.evals.metrics import (
    cut_chinese,
    first_line,
    normalise,
    overlap_f1,
    rouge_l,
    rouge_l_zh,
    rouge_scores,
    token_f1,
    token_f1_zh,
)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The  Cat,\n an apple!", "cat apple"),
        ("theatre banana", "theatre banana"),  # articles are whole words
        ("U.S.-based", "usbased"),
        ("a", ""),
        ("“Ünïcode”", "“ünïcode”"),  # only ASCII punctuation goes
    ],
)
def test_normalise(text, form):
    assert normalise(text) == form


def test_f1_counts_repeated_tokens_as_often_as_both_have_them():
    assert overlap_f1(["x", "x", "y"], ["x", "y", "z"]) == pytest.approx(2 / 3)
    assert overlap_f1(["x", "x"], ["x"]) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert overlap_f1([], ["x"]) == overlap_f1(["x"], []) == overlap_f1([], []) == 0


@pytest.mark.parametrize(
    ("output", "gold", "score"),
    [
        ("the cat sat", "Cat sat down.", 0.8),  # precision 1, recall 2/3
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("the", "a", 0),  # nothing is left of either
    ],
)
def test_token_f1(output, gold, score):
    assert token_f1(output, gold) == pytest.approx(score)


@pytest.mark.parametrize(
    ("output", "gold", "score"),
    [
        ("我爱北京", "我在北京", 2 / 3),
        ("我 爱 北京。", "我爱北京", 1),  # spaces and punctuation go
        ("《红楼梦》", "红楼梦", 2 / 3),  # 《 is not in the reference's list, 》 is
        ("NBA", "nba", 1),
        ("", "北京", 0),
    ],
)
def test_token_f1_zh(output, gold, score):
    assert token_f1_zh(output, gold) == pytest.approx(score)


def test_chinese_words_keep_punctuation_and_spaces():
    assert cut_chinese("我爱 北京。") == ["我", "爱", " ", "北京", "。"]


@pytest.mark.parametrize(
    ("output", "gold", "score"),
    [
        ("the cat sat", "the cat ran", 2 / 3),
        ("x x x y", "x y", 1),  # distinct words; by the usual definition 2/3
        ("x y. z w", "z w. x y", 1),  # sentence by sentence; by the usual definition 1/2
        ("x", "y", 0),
        ("", "x", 0),
        ("...", "x", 0),
        (" ", "x", 0),
        ("x", "", 0),
    ],
)
def test_rouge_l(output, gold, score):
    assert rouge_l(output, gold) == pytest.approx(score, abs=1e-7)


def test_rouge_l_zh():
    assert rouge_l_zh("我爱北京", "我在北京") == pytest.approx(2 / 3, abs=1e-7)
    assert rouge_l_zh("", "北京") == 0


def test_rouge_score_package():
    kinds = ("rouge1", "rouge2", "rougeL")
    assert rouge_scores("the cat sat", "the cat ran", kinds) == pytest.approx(
        {"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3}
    )
    assert rouge_scores("x x x y", "x y", ["rougeL"]) == pytest.approx({"rougeL": 2 / 3})
    assert rouge_scores("runs", "running", ["rouge1"]) == {"rouge1": 0}
    assert rouge_scores("runs", "running", ["rouge1"], stem=True) == {"rouge1": 1}


@pytest.mark.parametrize(("text", "line"), [("\n\nx\ny", "x"), ("x", "x"), (" \nx", " "), ("\n", ""), ("", "")])
def test_first_line(text, line):
    assert first_line(text) == line
