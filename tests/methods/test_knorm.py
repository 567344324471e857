"""knorm: short keys stay."""

import pytest
import torch

import longwave
from tests.methods import naive
from tests.methods.naive import draw, limit
from tests.methods.test_evicting import COMINGS, new_layer
from tests.reading import read_in

SMALL = dict(sinks=2, window=7)


def by_length(head):
    return [-float(token.k.norm()) for token in head.tokens]


@pytest.mark.parametrize("coming", list(COMINGS))
@pytest.mark.parametrize("pads", [[0], [0, 31, 108]], ids=["alone", "padded"])
def test_the_tokens_that_stay_are_the_twins(coming, pads):
    method = longwave.KNorm(**SMALL)
    valid = None if pads == [0] else torch.arange(110) >= torch.tensor(pads)[:, None]
    naive.check(new_layer(method), by_length, limit(method, 0.3, 4), *draw(len(pads), 110), COMINGS[coming], valid)


def test_in_slots_the_same_tokens_stay_in_the_first_layer(llama):
    """Rotation changes no length, and the first layer's keys do not depend on what was dropped."""
    kept = []
    torch.manual_seed(3)
    ids = torch.randperm(60)[None] + 1  # no two alike
    for positions in ("true", "slots"):
        memory = longwave.cache(llama, longwave.KNorm(tokens=20, positions=positions, **SMALL))
        read_in(llama, memory, ids, (40, *[1] * 20))
        kept.append(memory.layers[0].dense.column("position"))
    assert torch.equal(*kept)


def test_pages_take_the_short_ones():
    method = longwave.KNorm(store=longwave.Kivi(group=8, bits=8), **SMALL)
    layer = method.bind(naive.shape(), None, 0.05).layer(0)
    k, v, q = draw(1, 120)
    for _ in naive.drive(layer, k, v, q, [120]):
        pass
    span = layer.bound.span
    assert layer.store.tokens[0] == (120 - 9) // span * 8
    keep = layer.store.tokens[0]
    lengths = k[0].norm(dim=-1)[:, 2 : 2 + keep // 8 * span]
    short = lengths.argsort(-1)[:, :keep].sort(-1).values + 2
    want = k[0].gather(1, short[..., None].expand(-1, -1, naive.D))
    torch.testing.assert_close(layer.materialize()[0][0, :, 2 : 2 + keep], want, rtol=0, atol=0.05)
