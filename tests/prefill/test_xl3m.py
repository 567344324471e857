"""xl3m: which segments stay, and that rows, batches and order decide nothing else."""

from types import SimpleNamespace

import pytest
import torch

import longwave
from longwave.prefill.xl3m import entropies
from tests.conftest import left_padded, tokens

SMALL = dict(tokens=40, question=6, segment=9, prefix=2)


class Copier:
    """A model that is sure of what comes next where token 96 stands before it, and counts what it reads."""

    device = torch.device("cpu")

    def __init__(self):
        self.read = []

    def __call__(self, ids, attention_mask=None, **more):
        self.read.append(ids.shape)
        logits = torch.zeros(len(ids), 1, 97)
        logits[:, 0, 5] = 9.0 * (ids == 96).any(-1)
        return SimpleNamespace(logits=logits)


def naive(model, ids, tokens, question, segment, prefix):
    """Numbers that stay of ids [n], each segment read alone."""
    n = len(ids)
    if n <= tokens:
        return list(range(n))
    segments, worth = [], []
    for start in range(prefix, n - question, segment):
        own = list(range(start, min(start + segment, n - question)))
        text = [*range(prefix), *own, *range(n - question, n)]
        with torch.no_grad():
            p = torch.softmax(model(ids[text][None]).logits[0, -1], -1)
        segments.append(own)
        worth.append(float(-(p * p.log()).sum()))
    kept = []
    for at in sorted(range(len(segments)), key=lambda at: worth[at]):
        if prefix + question + len(kept) + len(segments[at]) <= tokens:
            kept += segments[at]
    return [*range(prefix), *sorted(kept), *range(n - question, n)]


@pytest.mark.parametrize("options", [{}, dict(prefix=0), dict(segment=7, question=11), dict(batch=1)], ids=str)
def test_the_surest_segments_stay_in_order(llama, options):
    ids, mask = left_padded(3, 100, [0, 23, 70])
    options = SMALL | options
    short = longwave.xl3m(llama, ids, attention_mask=mask, **options)
    options.pop("batch", None)
    for row in range(3):
        own = ids[row][mask[row].bool()]
        want = naive(llama, own, **options)
        assert len(want) <= 40
        there = short.mask[row].bool()
        assert short.positions[row][there].tolist() == want
        assert torch.equal(short.ids[row][there], own[want])
        assert (short.positions[row][~there] == -1).all()
        assert there.tolist() == sorted(there.tolist())  # padded on the left


def test_a_segments_entropy_is_its_own(llama):
    texts = [tokens(1, n, seed=n)[0] for n in (9, 30, 17)]
    alone = [entropies(llama, [text], 1)[0] for text in texts]
    assert entropies(llama, texts, 8) == pytest.approx(alone, rel=1e-5)


def test_the_segment_with_the_answer_stays():
    ids = tokens(1, 300) % 90
    for place in (5, 120, 290):
        planted = ids.clone()
        planted[0, place] = 96
        short = longwave.xl3m(Copier(), planted, **SMALL)
        assert place in short.positions[0].tolist()
        assert short.ids.shape[1] <= 40


def test_a_prompt_that_fits_is_not_read():
    model, ids = Copier(), tokens(2, 40)
    short = longwave.xl3m(model, ids, **SMALL)
    assert torch.equal(short.ids, ids)
    assert short.mask.all()
    assert not model.read


def test_what_is_read_grows_with_the_text():
    for n in (200, 400):
        model = Copier()
        longwave.xl3m(model, tokens(1, n), **SMALL)
        read = sum(rows * width for rows, width in model.read)
        assert read <= (n / 9 + 1) * (2 + 9 + 6)
        assert max(width for _, width in model.read) == 2 + 9 + 6


def test_a_model_reads_what_is_left(llama):
    short = longwave.xl3m(llama, tokens(1, 700))
    assert short.ids.shape[1] <= 384  # three quarters of 512
    assert llama.generate(short.ids, attention_mask=short.mask, max_new_tokens=3).shape[1] == short.ids.shape[1] + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tokens=16), r"tokens is a whole number of tokens \(prefix \+ segment \+ question\), at least 17; got 16"),
        (dict(question=0), "question is a whole number of tokens, at least 1; got 0"),
        (dict(segment=0), "segment is a whole number of tokens, at least 1; got 0"),
        (dict(attention_mask=torch.tensor([[1, 1, 0]])), "attention mask is"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.xl3m(Copier(), tokens(1, 50), **SMALL | options)
