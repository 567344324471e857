"""lm_infinite, self_extend and dual_chunk: at which distance a token is read, and a model written out that reads so."""

import pytest
import torch

import longwave
from longwave.evals.fork import can_fork, fork, prefill
from tests.conftest import build, into, tokens
from tests.methods.naive import rotated
from tests.reading import read, read_in


def lm_infinite(i, j, m):
    """Positions of a query and a key, as plain numbers; None where it is not seen."""
    if i - j < m.window:
        return i, j
    return (m.window, 0) if j < m.sinks else None


def self_extend(i, j, m):
    if i - j < m.window:
        return i, j
    return i // m.group + m.window - m.window // m.group, j // m.group


def dual_chunk(i, j, m):
    size = m.chunk - m.window
    apart = i // size - j // size
    return (i % size if apart == 0 else min(i % size + size, m.chunk) if apart == 1 else m.chunk), j % size


METHODS = {
    "lm_infinite": (longwave.LMInfinite(sinks=3, window=8), lm_infinite),
    "self_extend": (longwave.SelfExtend(group=4, window=8), self_extend),
    "dual_chunk": (longwave.DualChunk(chunk=10, window=4), dual_chunk),
}


@pytest.fixture(params=list(METHODS))
def case(request):
    return METHODS[request.param]


@pytest.fixture(scope="module")
def model():
    return build("llama", torch.float64)


def distances(method, count):
    """[count, count] of query i and key j as the method has them; -1 where nothing is seen."""
    found = torch.full((count, count), -1)
    i, j = torch.arange(count)[None], torch.arange(count)
    for ask, key, pairs in method.views(i, j):
        found = torch.where((pairs & (j <= i[..., None]))[0], ask[0, :, None] - key, found)
    return found


@pytest.mark.parametrize("known", [8, 9, 10, 11, 40])
def test_reach_is_where_distances_grow_beyond_what_the_model_knows(case, known):
    method, _ = case
    reach = method.reach(known)
    most = distances(method, 300 if reach is None else reach).max()
    assert reach == known or most < known
    if reach is not None:
        assert distances(method, reach + 1).max() >= known


def written_out(model, ids, place):
    """Logits [n, vocabulary] of ids [n]: a small Llama in which query i meets key j at place(i, j)."""
    n, hidden = len(ids), model.model.embed_tokens(ids)
    for layer in model.model.layers:
        x, module = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (
            project(x).view(n, -1, module.head_dim).transpose(0, 1)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        k, v = (y.repeat_interleave(len(q) // len(y), 0) for y in (k, v))
        out = torch.empty_like(q)
        for i in range(n):
            seen = {j: place(i, j) for j in range(i + 1) if place(i, j) is not None}
            asked = rotated(q[:, i : i + 1].expand(-1, len(seen), -1), torch.tensor([a for a, _ in seen.values()]))
            keys = rotated(k[:, list(seen)], torch.tensor([b for _, b in seen.values()]))
            p = torch.softmax((asked * keys).sum(-1) * module.scaling, -1)
            out[:, i] = (p[..., None] * v[:, list(seen)]).sum(1)
        hidden = hidden + module.o_proj(out.transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(40,), (5, 17, 1, 1, 9, 1, 6), (1,) * 40], ids=["prompt", "chunks", "steps"])
def test_answers_are_those_of_a_model_written_out(case, model, sizes):
    method, place = case
    ids = tokens(1, 40)
    got = read_in(model, longwave.cache(model, method), ids, sizes)
    want = written_out(model, ids[0], lambda i, j: place(i, j, method))
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_short_texts_are_read_as_the_model_does(case, model):
    method, _ = case
    ids = tokens(1, method.exact())
    got = read_in(model, longwave.cache(model, method), ids, (method.exact() - 2, 1, 1))
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-5, atol=1e-6)
    longer = tokens(1, method.exact() + 30)
    assert (read(model, longwave.cache(model, method), longer) - model(longer).logits).abs().max() > 1e-3


def test_pairs_are_those_of_the_papers(case):
    method, place = case
    for i, row in enumerate(distances(method, 60).tolist()):
        for j, distance in enumerate(row):
            at = place(i, j, method) if j <= i else None
            assert distance == (-1 if at is None else at[0] - at[1])


def test_lm_infinites_distances():
    found = distances(longwave.LMInfinite(sinks=2, window=4), 9)
    assert found[8].tolist() == [4, 4, -1, -1, -1, 3, 2, 1, 0]
    assert found[4].tolist() == [4, 3, 2, 1, 0] + [-1] * 4  # a sink at the window's edge counts once
    assert found.max() == 4


def test_self_extends_distances():
    """The paper's figure: seven trained tokens, a window of four, groups of two."""
    found = distances(longwave.SelfExtend(group=2, window=4), 10)
    assert found[9].flip(0).tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6]
    trained, method = 64, longwave.SelfExtend(group=8, window=16)
    reach = (trained - 16) * 8 + 16
    assert distances(method, reach).max() < trained
    far = distances(method, reach)[-1].flip(0)
    assert (far.diff() >= 0).all()
    assert far.diff().max() == 1


def test_self_extend_in_groups_of_one_is_the_model():
    found = distances(longwave.SelfExtend(group=1, window=4), 30)
    assert torch.equal(found, (torch.arange(30)[:, None] - torch.arange(30)).clamp(min=-1))


def test_dual_chunks_distances():
    method = longwave.DualChunk(chunk=10, window=4)
    found = distances(method, 300)
    assert found[6].tolist()[:7] == [6, 5, 4, 3, 2, 1, 0]
    assert found[11].tolist()[:12] == [10, 9, 8, 7, 6, 5, 5, 4, 3, 2, 1, 0]
    assert found[13].tolist()[:14] == [10, 9, 8, 7, 6, 5, 7, 6, 5, 4, 3, 2, 1, 0]
    assert found.max() == 10
    near = torch.arange(300)[:, None] - torch.arange(300)
    assert torch.equal(found[(near >= 0) & (near <= 4)], near[(near >= 0) & (near <= 4)])


def test_no_position_grows_with_the_text(case):
    """But for the near tokens, whose distances do not."""
    method, _ = case
    i, j = torch.arange(2000)[None], torch.arange(2000)
    for ask, key, pairs in method.views(i, j):
        seen = (pairs & (j <= i[..., None]))[0]
        assert (ask[0, :, None] - key)[seen].max() < 600


def test_a_prompt_is_read_by_the_method_itself(case, model):
    method, _ = case
    memory = longwave.cache(model, method)
    assert not can_fork(memory)
    with pytest.raises(ValueError, match=r"positions of its own.*give it the tokens"):
        fork(prefill(model, tokens(1, 20), needs=memory.method.needs), memory)


@torch.no_grad()
def test_what_it_cannot_honour_is_refused(case, model):
    method, _ = case
    memory, ids = longwave.cache(model, method), tokens(1, 12)
    with pytest.raises(NotImplementedError, match="causal"):
        model(ids, **into(memory), is_causal=False)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    mask[..., 9, 3] = False
    with pytest.raises(NotImplementedError, match="pass a 2D mask"):
        model(ids, attention_mask=mask, **into(memory))
    with pytest.raises(ValueError, match=r"its budget is 1; got 0\.5"):
        longwave.cache(model, method, budget=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: longwave.LMInfinite(window=0), "window is a whole number"),
        (lambda: longwave.LMInfinite(sinks=-1), "sinks is a whole number"),
        (lambda: longwave.SelfExtend(group=3, window=8), r"window is a multiple of group \(3\).*got 8"),
        (lambda: longwave.SelfExtend(group=0), "group is a whole number"),
        (lambda: longwave.DualChunk(chunk=8, window=8), "chunk is a whole number.*at least 9; got 8"),
    ],
)
def test_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
