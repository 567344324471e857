"""tova: the newest query's attention, averaged over all heads, decides for all of them."""

import pytest
import torch

import longwave
from longwave.evals.fork import fork, prefill
from tests.conftest import into, tokens
from tests.methods import naive
from tests.methods.naive import SCALE, G, H, InSlots, draw, drive
from tests.methods.test_evicting import new_layer, run

SMALL = dict(sinks=2, window=7)


def by_hand(k, v, q, sizes, size, sinks, window):
    """One row, a list of places for all heads; yields them and the answers of each pass."""
    held, start = [], 0
    for count in sizes:
        answers = torch.zeros(H * G, count, v.shape[-1], dtype=torch.float64)
        for i in range(count):
            held.append(start + i)
            scores = torch.stack([q[h, start + i] @ k[h // G, held].T * SCALE for h in range(H * G)])
            p = scores.softmax(-1)  # of every query head
            for h in range(H * G):
                answers[h, i] = p[h] @ v[h // G, held]
        start += count
        worth = p.mean(0).tolist()
        last = len(held) - window
        free = sorted(range(sinks, max(sinks, last)), key=lambda i: (-worth[i], i))
        ends = [i for i in range(len(held)) if i < sinks or i >= last]
        if len(held) > size:
            held = [held[i] for i in sorted(ends + free[: size - len(ends)])]
        yield held, answers


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [25, 1, 1, 30, 3]], ids=["prompt", "steps", "chunks"])
@pytest.mark.parametrize(("sinks", "window"), [(2, 7), (0, 1), (0, 0)])
def test_the_tokens_that_stay_are_those_by_hand(sizes, sinks, window):
    k, v, q = draw(1, 60, seed=4)
    layer = new_layer(longwave.Tova(tokens=14, sinks=sinks, window=window))
    twin = by_hand(k[0], v[0], q[0], sizes, 14, sinks, window)
    for out, (held, answers) in zip(drive(layer, k, v, q, sizes), twin, strict=True):
        torch.testing.assert_close(out[0], answers, rtol=0, atol=1e-9)  # before anything goes
        assert layer.dense.column("position")[0].tolist() == [held] * H


def test_it_averages_over_query_heads_and_not_over_what_a_head_likes_best():
    """One query head in love with a token is less than what all others like a little."""
    k, v, q = (torch.zeros(1, heads, 12, naive.D, dtype=torch.float64) for heads in (H, H, H * G))
    k[:, :, 3, 0] = k[:, :, 5, 1] = 1
    q[:, 0, 11, 0] = 9 / SCALE  # all of one head's attention
    q[:, 1:, 11, 1] = 4 / SCALE
    layer = run(new_layer(longwave.Tova(tokens=4, sinks=0, window=3)), k, v, q, [12])
    assert layer.dense.column("position")[0].tolist() == [[5, 9, 10, 11]] * H


def test_nothing_is_remembered_of_earlier_queries():
    k, v, q = draw(1, 40)
    other = q.clone()
    other[:, :, :39] = draw(1, 39, seed=9)[2]
    kept = [
        run(new_layer(longwave.Tova(tokens=20, **SMALL)), k, v, x, [40]).dense.column("position") for x in (q, other)
    ]
    assert torch.equal(*kept)


def test_in_slots_the_newest_query_meets_turned_keys(llama):
    method = longwave.Tova(tokens=16, positions="slots", **SMALL)
    memory, ids = longwave.cache(llama, method), tokens(1, 40)

    class Newest(InSlots):
        def read(self, ids):
            for heads in self.held:  # `mass` of a token list is then the last query's alone, in passes of one token
                for held in heads:
                    for token in held:
                        token.mass = 0.0
            return super().read(ids)

    chosen = {}

    def keep(held):  # of all heads together, which the model by hand asks one by one
        return held if len(held) <= 16 else chosen["keep"](held)

    hand = Newest(llama, keep)
    with torch.no_grad():
        for i in range(40):
            got = llama(ids[:, i : i + 1], **into(memory)).logits[0]
            places = [layer.dense.column("position")[0, 0].tolist() for layer in memory.memory_layers()]
            turn = iter(places)
            seen = {"n": 0}

            def of_layer(held, seen=seen, turn=turn):
                if seen["n"] % H == 0:
                    seen["now"] = set(next(turn))
                seen["n"] += 1
                return [token for token in held if token.place in seen["now"]]

            chosen["keep"] = of_layer
            want = hand.read(ids[0, i : i + 1])
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)
            for layer, heads in zip(memory.memory_layers(), hand.held, strict=True):
                votes = torch.tensor([[token.mass for token in held] for held in heads])
                torch.testing.assert_close(layer.dense.column("votes1")[0], votes, rtol=1e-3, atol=1e-4)


def test_a_fork_has_seen_the_newest_query(llama):
    ids = tokens(2, 60)
    read, forked = (longwave.cache(llama, longwave.Tova(tokens=20, **SMALL)) for _ in range(2))
    with torch.no_grad():
        llama(ids, **into(read))
    fork(prefill(llama, ids, needs=longwave.TreeKV().needs() | forked.method.needs), forked)
    for ours, theirs in zip(forked.memory_layers(), read.memory_layers(), strict=True):
        assert torch.equal(ours.dense.column("position"), theirs.dense.column("position"))
    with pytest.raises(ValueError, match=r"has not observed.*votes1"):
        fork(prefill(llama, ids), longwave.cache(llama, longwave.Tova(tokens=20, **SMALL)))
