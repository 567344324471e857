"""Text metrics that several benchmarks share, each as its own benchmark defines it. Scores are 0 to 1.

Libraries are pinned in pyproject.toml where a published number depends on the version: two packages called ROUGE give
20.6 and 17.1 for the same texts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

CJK_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def normalise(text: str) -> str:
    """SQuAD's answer form: lower case, no ASCII punctuation, no articles, single spaces."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def overlap_f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of two multisets of tokens; 0 where nothing is shared."""
    shared = sum((Counter(predicted) & Counter(gold)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def token_f1(output: str, gold: str) -> float:
    """SQuAD's token F1, as LongBench and L-Eval use it."""
    return overlap_f1(normalise(output).split(), normalise(gold).split())


@lru_cache(maxsize=1)
def jieba() -> Any:
    """The package that cuts Chinese into words. ModuleNotFoundError where it is not installed."""
    import logging

    import jieba as package

    package.setLogLevel(logging.ERROR)
    return package


def cut_chinese(text: str) -> list[str]:
    """jieba's words, punctuation and spaces included."""
    return list(jieba().cut(text, cut_all=False))


def token_f1_zh(output: str, gold: str) -> float:
    """F1 over jieba's words, lower-cased, without ASCII or CJK punctuation and spaces (LongBench)."""

    def words(text: str) -> list[str]:
        removed = set(string.punctuation + CJK_PUNCTUATION)
        bare = ("".join(c for c in "".join(word.lower().split()) if c not in removed) for word in cut_chinese(text))
        return [word for word in bare if word]

    return overlap_f1(words(output), words(gold))


def rouge_l(output: str, gold: str) -> float:
    """ROUGE-L F of the package `rouge` 1.0.1, a summary-level LCS over distinct words (LongBench). 0 for empty text."""
    from rouge import Rouge

    try:
        return float(Rouge().get_scores([output], [gold], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):  # its way of saying that a side is empty, or too long for it
        return 0.0


def rouge_l_zh(output: str, gold: str) -> float:
    """The same over jieba's words."""
    return rouge_l(" ".join(cut_chinese(output)), " ".join(cut_chinese(gold)))


def rouge_scores(output: str, gold: str, kinds: Sequence[str], stem: bool = False) -> dict[str, float]:
    """F-measures of the package `rouge-score` 0.1.2 (L-Eval, InfiniteBench), such as rouge1, rouge2, rougeL."""
    return {kind: float(value.fmeasure) for kind, value in _scorer(tuple(kinds), stem).score(gold, output).items()}


@lru_cache(maxsize=8)
def _scorer(kinds: tuple[str, ...], stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(kinds), use_stemmer=stem)


def first_line(text: str) -> str:
    """The text up to its first newline, leading newlines aside."""
    return text.lstrip("\n").split("\n")[0]
