"""Votes and spans in torch and in Triton against loops in float64.

On a CPU Triton runs in its interpreter (tests/conftest.py switches it on), on a GPU for real.
"""

from collections import Counter

import pytest
import torch

from longwave.ops import select
from longwave.ops.attention import reference as attention
from longwave.ops.select import TILE, choose, places, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
# B, H, G, Q, L, D, top
CASES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 1, 3, 5, 33, 20, 4),
    (2, 2, 2, 7, 300, 8, 4),
    (1, 2, 1, 37, 261, 16, 1),
    (2, 2, 4, 1, 515, 24, 3),  # a step
    (1, 1, 2, 3, 5000, 8, 4),  # tokens are split into parts
]


def named(case):
    return " ".join(f"{name}{n}" for name, n in zip(("B", "H", "G", "Q", "L", "D", "top"), case, strict=True))


def made(case, dtype, seed=0):
    """Whole numbers, so that scores are exact in every type and many are equal; begin and end of each row."""
    b, heads, group, queries, tokens, dim, _ = case
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-3, 4, (b, queries, heads * group, dim), generator=g).to(DEVICE, dtype).transpose(1, 2)
    k = torch.full((b, heads, tokens + 9, dim), float("nan"), device=DEVICE, dtype=dtype)[:, :, :tokens]
    k[:] = torch.randint(-3, 4, k.shape, generator=g)
    begin = torch.tensor([min(row, tokens - 1) for row in range(b)], device=DEVICE)
    end = torch.tensor([tokens - 3 * row for row in range(b)], device=DEVICE)
    return q, k, begin, end


def twin(q, k, begin, end, top, exact):
    """index [B, Hq, Q, top] by sorting."""
    group = q.shape[1] // k.shape[1]
    scores = (q.double() @ k.double().repeat_interleave(group, 1).mT).tolist()
    out = torch.full((*q.shape[:3], top), -1)
    for b, heads in enumerate(scores):
        for h, rows in enumerate(heads):
            for i, row in enumerate(rows):
                order = sorted(range(int(begin[b]), int(end[b])), key=lambda j: (-row[j], j))
                if not exact:
                    seen = Counter()
                    order = [j for j in order if not (seen.update([j // TILE]) or seen[j // TILE] > 1)]
                for n, j in enumerate(order[:top]):
                    out[b, h, i, n] = j
    return out.to(q.device)


@pytest.fixture(params=["reference", "triton", "in pieces"])
def best(request, monkeypatch):
    """The numbers that each of them finds."""
    if request.param == "reference":
        return lambda *given: reference.best(*given)[1]
    if request.param == "in pieces":
        monkeypatch.setattr(select, "PIECE", 2 * TILE)
        return lambda q, k, *rest: select._in_pieces(q, k.cpu(), *rest)[1]
    pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    from longwave.ops.select import triton

    return lambda *given: triton.best(*given)[1]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "tiles"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_both_find_the_best(best, case, dtype, exact):
    q, k, begin, end = made(case, dtype)
    assert torch.equal(best(q, k, begin, end, case[-1], exact), twin(q, k, begin, end, case[-1], exact))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "tiles"])
@pytest.mark.parametrize("case", CASES[:5], ids=named)
def test_float64_is_exact_whatever_is_held_at_once(case, exact, monkeypatch):
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 2000)
    monkeypatch.setattr(reference, "COLUMNS", 2 * TILE)
    g = torch.Generator().manual_seed(1)
    q, k, begin, end = made(case, torch.float64)
    q, k = (torch.randn(x.shape, generator=g, dtype=x.dtype).to(DEVICE) for x in (q, k))
    _, index = reference.best(q, k, begin, end, case[-1], exact)
    assert torch.equal(index, twin(q, k, begin, end, case[-1], exact))


def test_fewer_tokens_or_tiles_than_votes_give_none(best):
    """Nobody votes for the first token because he has no other."""
    q, k, begin, end = made((2, 1, 2, 3, 300, 8, 4), torch.float32)
    begin, end = torch.tensor([5, 9], device=DEVICE), torch.tensor([7, 9], device=DEVICE)
    found = best(q, k, begin, end, 4, True)
    assert (found[0].sort(-1).values == torch.tensor([-1, -1, 5, 6], device=DEVICE)).all()
    assert (found[1] == -1).all()
    begin, end = torch.tensor([5, 120], device=DEVICE), torch.tensor([100, 140], device=DEVICE)
    found = best(q, k, begin, end, 4, False)
    assert ((found >= 0).sum(-1) == torch.tensor([1, 2], device=DEVICE)[:, None, None]).all()
    assert not (found == 0).any()


def test_what_lies_outside_may_be_anything(best):
    q, k, begin, end = made((2, 2, 2, 7, 300, 8, 4), torch.float32)
    end = end - 20
    want = best(q, k, begin, end, 4, True)
    for row in range(2):
        k[row, :, : begin[row]] = 1e30
        k[row, :, end[row] :] = 1e30
    assert torch.equal(best(q, k, begin, end, 4, True), want)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_query_meets_the_keys_of_its_own_head(best, group):
    """Only one KV head has the key that only one query head asks for."""
    heads = 4
    for head in range(heads * group):
        q, k = torch.zeros(1, heads * group, 1, 8, device=DEVICE), torch.zeros(1, heads, 200, 8, device=DEVICE)
        q[0, head, 0, 3], k[0, head // group, 77, 3] = 1, 5
        whole = torch.tensor([0], device=DEVICE), torch.tensor([200], device=DEVICE)
        assert int(best(q, k, *whole, 1, True)[0, head]) == 77


# votes and spans


def won(index, tokens=20, begin=0, end=20, spans=3, span=1):
    at = torch.tensor([index])
    kept = reference.around(at, tokens, torch.tensor([begin]), torch.tensor([end]), spans, span)
    return kept[0].nonzero()[:, 0].tolist()


def test_most_votes_win_and_the_earlier_of_equals():
    votes = [4, 4, 4, 9, 9, 2, 2, 15]
    assert won(votes) == [2, 4, 9]
    assert won(votes, spans=4) == [2, 4, 9, 15]
    assert won(votes, spans=9) == [2, 4, 9, 15]  # what got no vote is nobody's
    assert won([8, 3, 5], spans=2) == [3, 5]
    assert won([-1, -1, 7]) == [7]
    assert won([-1, -1]) == []


@pytest.mark.parametrize(("span", "want"), [(1, [9]), (2, [8, 9]), (3, [8, 9, 10]), (4, [7, 8, 9, 10])])
def test_a_span_has_as_many_tokens_as_it_says(span, want):
    assert won([9], span=span) == want


def test_spans_stay_inside_and_melt_together():
    assert won([5, 7], span=4) == [3, 4, 5, 6, 7, 8]
    assert won([5], begin=5, span=4) == [5, 6]
    assert won([11], end=12, span=6) == [8, 9, 10, 11]


def test_places():
    keep = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1]]).bool()
    index, count = places(keep, 4)
    assert index.tolist() == [[1, 2, 4, 0], [4, 0, 0, 0]]
    assert count.tolist() == [3, 1]


def test_rows_choose_alone_and_absent_queries_do_not_vote(monkeypatch):
    monkeypatch.setenv("LONGWAVE_KERNELS", "reference")
    q, k, begin, end = made((2, 2, 2, 7, 300, 8, 4), torch.float64)
    options = dict(top=4, spans=9, span=3)
    asks = torch.arange(7, device=DEVICE) < torch.tensor([7, 3], device=DEVICE)[:, None]
    found = choose(q, k, begin, end, asks, **options)
    for row, count in enumerate((7, 3)):
        one = slice(row, row + 1)
        assert torch.equal(found[one], choose(q[one, :, :count], k[one], begin[one], end[one], **options))
    assert not torch.equal(found, choose(q, k, begin, end, **options))


def claimed(q, k, begin, end, asks, scaling, span):
    """`claims` with loops, float64."""
    out = torch.zeros(q.shape[0], -(-k.shape[2] // span), dtype=torch.float64)
    for b in range(q.shape[0]):
        own = slice(int(begin[b]), int(end[b]))
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                if own.start < own.stop and (asks is None or asks[b, i]):
                    scores = k[b, h * k.shape[1] // q.shape[1], own].double() @ q[b, h, i].double() * scaling
                    got = torch.zeros_like(out[b])
                    for j, share in enumerate(scores.softmax(0).tolist(), own.start):
                        got[j // span] += share
                    out[b] += got**2
    return out


@pytest.mark.parametrize("span", [1, 5, 32])
@pytest.mark.parametrize("columns", [7, 1 << 14], ids=["in pieces", "at once"])
def test_claims_are_squared_shares_of_softmaxes_over_the_middle(span, columns, monkeypatch):
    monkeypatch.setattr(reference, "COLUMNS", columns)
    monkeypatch.setattr(reference, "query_block", lambda rows, tokens: 2)
    g = torch.Generator().manual_seed(5)
    q, k = torch.randn(3, 4, 5, 8, generator=g), torch.randn(3, 2, 77, 8, generator=g)
    begin, end = torch.tensor([2, 30, 9]), torch.tensor([70, 41, 9])  # the last row has no middle
    asks = torch.arange(5) < torch.tensor([5, 3, 5])[:, None]
    for who in (None, asks):
        found = select.claims(q, k, begin, end, who, scaling=0.3, span=span)
        torch.testing.assert_close(found.double(), claimed(q, k, begin, end, who, 0.3, span), rtol=0, atol=1e-5)


def test_the_greatest_spans_and_their_tokens():
    share = torch.tensor([[0.5, 0, 2, 0.5], [0, 0, 0, 1], [0, 0, 0, 0]])
    found = select.greatest(share, 3)
    assert found.tolist() == [[2, 0, 3], [3, -1, -1], [-1, -1, -1]]  # of equals the earlier, and none that got nothing
    assert select.greatest(share, 6).shape == (3, 6)


def test_what_is_told_lies_between_the_ends():
    found = torch.tensor([[5, 1, -1], [0, 9, 2], [1, 2, 3]])
    stop = torch.tensor([40, 33, 14])  # the last row has fewer tokens than are read
    index, count = select.told(found, stop, 2, 7, 3)
    rows = [row[:n].tolist() for row, n in zip(index, count.tolist(), strict=True)]
    assert index.shape == (3, 2 + 9 + 7)
    assert rows[0] == [0, 1, 3, 4, 5, 15, 16, 17, *range(33, 40)]
    assert rows[1] == [0, 1, 2, 6, 7, 8, *range(26, 33)]  # 27 to 29 are in the window, 0 and 1 at the other end
    assert rows[2] == list(range(14))


@pytest.mark.parametrize("first", [0, 34, 37])
def test_what_is_told_begins_not_before_it_is_said_to(first):
    found, stop, since = torch.tensor([[5, 11, -1]]), torch.tensor([40]), torch.tensor([first])
    index, count = select.told(found, stop, 2, 7, 3, since)
    behind = range(max(33, first), 40)  # of tokens 33 to 35, a span found, those before that are read either way
    assert index[0, : count[0]].tolist() == [0, 1, 15, 16, 17, *(j for j in range(33, 36) if j < behind[0]), *behind]


def test_nothing_is_read_back():
    q, k = torch.zeros(2, 6, 1, 8, device="meta"), torch.zeros(2, 2, 300, 8, device="meta")
    at = torch.zeros(2, dtype=torch.long, device="meta")
    kept = choose(q, k, at, at, top=4, spans=9, span=3)
    assert [list(x.shape) for x in (kept, *places(kept, 40))] == [[2, 300], [2, 40], [2]]


@pytest.mark.parametrize(
    ("q", "k", "what"),
    [((1, 3, 4, 8), (1, 2, 5, 8), "H divides Hq"), ((2, 4, 4, 8), (1, 2, 5, 8), "share B, D and dtype")],
)
def test_shapes_that_do_not_go_together(q, k, what):
    at = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=what):
        choose(torch.zeros(q), torch.zeros(k), at, at, top=1, spans=1, span=1)


@pytest.mark.parametrize(
    ("dtype", "dim", "top", "what"),
    [(torch.float64, 8, 4, "float64"), (torch.float32, 129, 4, "512 bytes, not 516"), (torch.float16, 8, 17, "not 17")],
)
def test_triton_says_why_it_cannot(dtype, dim, top, what, monkeypatch):
    pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    monkeypatch.setenv("LONGWAVE_KERNELS", "triton")
    q, at = torch.zeros(1, 2, 3, dim, dtype=dtype, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)
    with pytest.raises(RuntimeError, match=what):
        choose(q, q, at, at, top=top, spans=1, span=1)
