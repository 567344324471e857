"""h2o: what it counts is the attention that tokens got, and it travels with them."""

import pytest
import torch

import longwave
from tests.conftest import into, left_padded, tokens
from tests.methods import naive
from tests.methods.naive import SCALE, D, G, H, InSlots, draw, drive
from tests.methods.test_evicting import new_layer, run

SMALL = dict(sinks=2, window=7)


def column_sums(q, k, valid):
    """Attention of every query of a row's real tokens, summed by key: [H, n]."""
    q, k = q[:, valid].double(), k[:, valid].double()
    count = k.shape[1]
    scores = q @ k.repeat_interleave(G, 0).mT * SCALE
    p = scores.masked_fill(~torch.ones(count, count, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    return p.view(H, G, count, count).sum((1, 2))


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [25, 1, 1, 30, 3]], ids=["prompt", "steps", "chunks"])
@pytest.mark.parametrize("pads", [[0, 0], [0, 23]], ids=["even", "padded"])
def test_mass_is_the_column_sum_of_attention(sizes, pads):
    """However the tokens came, as long as none is evicted; summed, not averaged, over queries and a group's heads."""
    k, v, q = draw(2, 60)
    valid = torch.arange(60) >= torch.tensor(pads)[:, None]
    layer = run(new_layer(longwave.H2O(tokens=64, sinks=2, window=7)), k, v, q, sizes, valid if any(pads) else None)
    for row, pad in enumerate(pads):
        expected = column_sums(q[row], k[row], valid[row])
        got = layer.dense.column("mass")[row, :, : 60 - pad]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
        # every query spreads 1 a query head
        assert float(got.sum()) == pytest.approx(H * G * (60 - pad), rel=1e-5)
        assert not layer.dense.column("mass")[row, :, 60 - pad :].any()


def test_a_new_token_starts_with_what_it_gives_itself():
    k, v, q = draw(1, 20)
    layer = run(new_layer(longwave.H2O(**SMALL)), k, v, q, [19, 1])
    own = column_sums(q[0], k[0], torch.ones(20, dtype=torch.bool))[:, -1]
    p = torch.softmax(q[0, :, -1:].double() @ layer.dense.view()[0][0].repeat_interleave(G, 0).mT * SCALE, -1)[..., -1]
    got = layer.dense.column("mass")[0, :, -1].double()
    torch.testing.assert_close(got, p.view(H, G).sum(1), rtol=1e-5, atol=1e-7)
    assert (got >= own * 0.999).all()  # fewer tokens share it


def test_sums_are_not_averages():
    """An old token that every query saw a little outweighs a new one that one query saw much."""
    count, old, new = 30, 3, 20
    k = torch.zeros(1, H, count, D, dtype=torch.float64)
    q = torch.zeros(1, H * G, count, D, dtype=torch.float64)
    k[:, :, old, 0] = 3
    q[..., 0] = 1 / SCALE
    k[:, :, new, 1] = 50
    q[:, :, 22, 1] = 1 / SCALE
    layer = run(new_layer(longwave.H2O(tokens=10, **SMALL)), k, k, q, [count])
    assert layer.dense.column("position").tolist() == [[[0, 1, old, *range(23, 30)]] * H]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mass_of_other_types_is_float32(dtype):
    k, v, q = draw(1, 60, dtype=dtype)
    layer = run(new_layer(longwave.H2O(tokens=64, sinks=2, window=7), dtype), k, v, q, [50, *[1] * 10])
    mass = layer.dense.column("mass")
    assert mass.dtype == torch.float32
    expected = column_sums(q[0], k[0], torch.ones(60, dtype=torch.bool))
    torch.testing.assert_close(mass[0].double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


def test_in_slots_it_counts_what_the_turned_keys_got(llama):
    """Against a model written out by hand: heads keep tokens of their own, turned to their places."""
    method = longwave.H2O(tokens=20, positions="slots", **SMALL)
    policy = longwave.H2O(tokens=20, **SMALL)

    def keep(held):
        if len(held) <= 20:
            return held
        return naive.best([token.mass for token in held], held, policy, 20)

    hand, memory, ids, start = InSlots(llama, keep), longwave.cache(llama, method), tokens(1, 80), 0
    with torch.no_grad():
        for size in (40, 1, 1, 1, 17, *[1] * 20):
            part = ids[:, start : start + size]
            got = llama(part, **into(memory)).logits[0]
            torch.testing.assert_close(got.double(), hand.read(part[0]), rtol=0, atol=1e-4)
            start += size
            for layer, heads in zip(memory.memory_layers(), hand.held, strict=True):
                places = [[token.place for token in held] for held in heads]
                assert layer.dense.column("position")[0].tolist() == places
                mass = torch.tensor([[token.mass for token in held] for held in heads])
                torch.testing.assert_close(layer.dense.column("mass")[0], mass, rtol=1e-3, atol=1e-4)
    assert any(len({tuple(token.place for token in held) for held in heads}) > 1 for heads in hand.held)


def test_padding_gives_nothing(llama):
    ids, mask = left_padded(2, 60, [0, 37])
    together, alone = (longwave.cache(llama, longwave.H2O(tokens=100, **SMALL)) for _ in range(2))
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        llama(ids, attention_mask=mask, position_ids=places, **into(together))
        llama(ids[1:, 37:], **into(alone))
    for ours, theirs in zip(together.memory_layers(), alone.memory_layers(), strict=True):
        torch.testing.assert_close(
            ours.dense.column("mass")[1:, :, :23], theirs.dense.column("mass"), rtol=1e-3, atol=1e-4
        )


# over pages


def test_pages_take_their_share_of_what_is_counted():
    """A token in a page takes part in the softmax, but its own mass is not kept any more."""
    method = longwave.H2O(store=longwave.Kivi(group=8, bits=8), sinks=2, window=7)
    layer = method.bind(naive.shape(), None, 0.05).layer(0)
    k, v, q = draw(1, 90)
    run(layer, k, v, q, [60])
    assert layer.store.tokens[0] > 0
    held, before = layer.dense.lengths[0], layer.dense.column("mass").clone()
    keys = layer.materialize()[0][0]
    pages = layer.store.tokens[0]
    for _ in drive(layer, k, v, q, [1], start=60):
        pass
    assert layer.dense.lengths[0] == held + 1
    keys = torch.cat([keys, k[0, :, 60:61]], 1)
    p = torch.softmax(q[0, :, 60:61] @ keys.repeat_interleave(G, 0).mT * SCALE, -1).view(H, G, -1).sum(1)
    expected = torch.cat([p[:, :2], p[:, 2 + pages :]], 1)
    expected[:, :held] += before[0].double()
    torch.testing.assert_close(layer.dense.column("mass")[0].double(), expected, rtol=1e-5, atol=1e-6)
