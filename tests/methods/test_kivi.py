"""kivi: plain round-to-nearest in groups, to the byte and to the number."""

import copy

import pytest
import torch

import longwave
from longwave.methods.base import CacheShape
from longwave.store.tokens import capacity
from tests.conftest import into, left_padded, shape_of, tokens

SMALL = dict(group=8, sinks=3, window=16)


def shape(dtype=torch.float32, heads=2, dim=64, layers=3):
    return CacheShape(tuple(range(layers)), (), heads, dim, dtype)


def bits_of(bound):
    return bound.plan[0].k[0].runs[0][0], bound.plan[0].v[0].runs[0][0]


# from a budget to bits

# float16, groups of 64: half a bit for scale and zero. (budget, K's and V's bits, fraction taken)
BUDGETS = [
    (1.0, (0, 0), 1.0),
    (0.99, (8, 8), 8.5 / 16),
    (8.5 / 16, (8, 8), 8.5 / 16),
    (0.53, (8, 4), 6.5 / 16),
    (0.4, (4, 4), 4.5 / 16),
    (0.28, (4, 3), 4 / 16),
    (0.25, (4, 3), 4 / 16),
    (0.24, (3, 3), 3.5 / 16),
    (0.2, (3, 2), 3 / 16),
    (0.16, (2, 2), 2.5 / 16),
    (2.5 / 16, (2, 2), 2.5 / 16),
]


@pytest.mark.parametrize(("budget", "bits", "fraction"), BUDGETS)
def test_a_budget_buys_the_most_bits_it_can(budget, bits, fraction):
    bound = longwave.Kivi().bind(shape(torch.float16), None, budget)
    assert bits_of(bound) == bits
    assert bound.page_fraction() == fraction <= budget


def test_the_least_budget_is_the_least():
    for dtype, expected in ((torch.float16, 2.5 / 16), (torch.float32, 2.5 / 32)):
        assert longwave.Kivi().least_budget(shape(dtype)) == expected
        assert bits_of(longwave.Kivi().bind(shape(dtype), None, expected)) == (2, 2)
        with pytest.raises(ValueError, match=rf"less than kivi can do.*{expected:.3f}.*Use fourier"):
            longwave.Kivi().bind(shape(dtype), None, expected * 0.999)


def test_without_a_budget_bits_are_four_or_those_given():
    assert bits_of(longwave.Kivi().bind(shape(), None, None)) == (4, 4)
    assert bits_of(longwave.Kivi(bits=2).bind(shape(), None, None)) == (2, 2)
    assert bits_of(longwave.Kivi(bits=(3, 8)).bind(shape(), None, None)) == (3, 8)
    assert not longwave.Kivi(bits=2).fits_budget()
    assert longwave.Kivi().fits_budget()


def test_groups_wider_than_a_head_are_the_head():
    bound = longwave.Kivi(bits=2, group=64).bind(shape(dim=96), None, None)
    assert bound.plan[0].v[0].group == 0
    assert longwave.Kivi(bits=2, group=32).bind(shape(dim=96), None, None).plan[0].v[0].group == 32


def test_what_it_says_of_itself():
    assert str(longwave.Kivi(bits=(4, 2)).bind(shape(), None, None)).startswith("kivi(K 4 V 2 bits, group=64")
    assert "K all V all bits" in str(longwave.Kivi().bind(shape(), None, 1.0))


# refusals


@pytest.mark.parametrize("bits", [1, 5, 16, 0, True, 2.0, "4", (4,), (4, 2, 2), (4, 5), (4, None), [4, 2]], ids=repr)
def test_bits_that_do_not_exist_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits are 8, 4, 3 or 2, or a pair \(K, V\) of them; got"):
        longwave.Kivi(bits=bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(group=12), "multiple of 8; got 12"),
        (dict(group=0), "group is a whole number of tokens, at least 8; got 0"),
        (dict(group=8.0), "group is a whole number"),
        (dict(sinks=-1), "sinks is a whole number of tokens, at least 0; got -1"),
        (dict(window=0), "window is a whole number of tokens, at least 1; got 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.Kivi(**options)


def test_a_budget_beside_bits_is_refused(llama):
    with pytest.raises(ValueError, match="give a budget or bits, not both"):
        longwave.cache(llama, longwave.Kivi(bits=4), budget=0.5)


# bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [(8, 8), (4, 2), (3, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("count", [10, 27, 28, 43, 90])
def test_bytes_to_the_byte(llama, bits, dtype, count):
    """2 heads of 8 channels, 3 layers; groups of 8 tokens, 3 + 16 dense ones."""
    model = copy.deepcopy(llama).to(dtype)
    cache = longwave.cache(model, longwave.Kivi(bits=bits, **SMALL))
    model(tokens(2, count), **into(cache), use_cache=True)
    groups = max(0, count - 19) // 8

    def up(n):
        return -(-n // 16) * 16

    codes = sum(up(2 * 8 * 8 * b // 8) for b in bits)
    scales = 2 * 8 * 2 * 2 + 2 * 8 * 2 * 2  # K: of 8 channels; V: of 8 tokens; scale and zero of 2 bytes, 2 heads
    index = 2 * (2 * 8 + 2 * 8 * 2) if groups else 0  # a head's number in 8 bytes, its channels' in 2 each
    dense = capacity(count - 8 * groups) * 2 * 2 * 8 * dtype.itemsize
    assert cache.nbytes == 3 * (2 * (groups * (codes + scales) + dense) + index)
    assert cache.method.layer_bytes(0, count) == groups * (codes + scales) + dense + index
    assert cache.method.nbytes(count, 2) == cache.nbytes


# numbers


def naive(x, bits):
    """Round to nearest over the whole range of a list of numbers; scale and lowest as float16."""
    low, high = float(x.min()), float(x.max())
    scale = torch.tensor(max((high - low) / (2**bits - 1), 2.0**-14)).half().item()
    zero = torch.tensor((low + high) / 2 - scale * (2**bits - 1) / 2).half().item()
    return torch.tensor([min(max(round((v - zero) / scale), 0), 2**bits - 1) * scale + zero for v in x.tolist()])


def prefilled(model, method, ids):
    cache = longwave.cache(model, method)
    with torch.no_grad():
        model(ids, **into(cache), use_cache=True)
    return list(cache.memory_layers())


@pytest.mark.parametrize("bits", [(8, 4), (4, 2), (3, 3), (2, 8)], ids=str)
@pytest.mark.parametrize("group", [8, 16])
def test_numbers_are_those_of_a_loop_over_groups(llama, bits, group):
    ids, kbits, vbits = tokens(2, 71), *bits
    options = dict(group=group, sinks=3, window=16)
    dense = prefilled(llama, longwave.Dense(), ids)
    held = prefilled(llama, longwave.Kivi(bits=bits, **options), ids)
    groups = (71 - 19) // group
    assert groups >= 3
    for exact_layer, layer in zip(dense, held, strict=True):
        (exact_k, exact_v), (k, v) = exact_layer.materialize(), layer.materialize()
        expected_k, expected_v = exact_k.clone(), exact_v.clone()
        for row in range(2):
            for head in range(2):
                for n in range(groups):
                    at = slice(3 + n * group, 3 + (n + 1) * group)
                    for channel in range(8):  # K: a channel's tokens
                        expected_k[row, head, at, channel] = naive(exact_k[row, head, at, channel], kbits)
                    for token in range(at.start, at.stop):  # V: a token's channels
                        expected_v[row, head, token] = naive(exact_v[row, head, token], vbits)
        for got, wanted, exact in ((k, expected_k, exact_k), (v, expected_v, exact_v)):
            # rounding in float32 may put a number half-way between two codes on the other one
            close = (got - wanted).abs() <= 1e-4 * (1 + wanted.abs())
            assert float(close.float().mean()) > 0.998
            middle = slice(3, 3 + groups * group)
            assert not torch.equal(got[:, :, middle], exact[:, :, middle])
            # what is not due stays bit for bit
            assert torch.equal(got[:, :, :3], exact[:, :, :3])
            assert torch.equal(got[:, :, middle.stop :], exact[:, :, middle.stop :])


def test_the_last_tokens_stay_exact_while_it_decodes():
    layer = longwave.Kivi(bits=2, **SMALL).bind(shape(dim=8, layers=1), None, None).layer(0)
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 80, 8, generator=g) for _ in range(2))
    for i in range(80):
        layer.write(k[:, :, i : i + 1], v[:, :, i : i + 1])
        layer.settle()
        for held, exact in zip(layer.materialize(), (k, v), strict=True):
            assert held.shape[2] == i + 1
            first = max(3, i + 1 - 16)
            assert torch.equal(held[:, :, first:], exact[:, :, first : i + 1])
            assert torch.equal(held[:, :, :3], exact[:, :, : min(3, i + 1)])
    assert layer.store.tokens == [56]  # 80 - 19 = 61: seven groups of 8
    assert not torch.equal(layer.materialize()[0][:, :, 3:59], k[:, :, 3:59])


def test_groups_do_not_depend_on_how_tokens_came():
    k, v = torch.randn(2, 1, 2, 80, 8, generator=torch.Generator().manual_seed(0)).unbind()
    bound = longwave.Kivi(bits=(3, 2), **SMALL).bind(shape(dim=8, layers=1), None, None)
    held = []
    for sizes in ([80], [30, 50], [1] * 80, [19, 8, 53]):
        layer, start = bound.layer(0), 0
        for size in sizes:
            layer.write(k[:, :, start : start + size], v[:, :, start : start + size])
            layer.settle()
            start += size
        held.append(layer.store.pages)
    assert all(torch.equal(held[0], other) for other in held[1:])


# whole models


def test_left_padding_equals_row_by_row(llama):
    ids, mask = left_padded(3, 60, [0, 7, 31])
    options = dict(max_new_tokens=12, do_sample=False)
    method = longwave.Kivi(bits=(4, 2), **SMALL)
    together = llama.generate(ids, attention_mask=mask, **into(longwave.cache(llama, method)), **options)
    plain = llama.generate(ids, attention_mask=mask, **into(longwave.cache(llama, "dense")), **options)
    for row, pad in enumerate([0, 7, 31]):
        alone = llama.generate(ids[row : row + 1, pad:], **into(longwave.cache(llama, method)), **options)
        assert torch.equal(alone[0, -12:], together[row, -12:])
    assert not torch.equal(together, plain)  # two bits are not nothing


def test_more_bits_are_nearer_to_dense(llama):
    ids = tokens(2, 90)
    scores = {}
    for bits in (2, 3, 4, 8, None):
        method = longwave.Dense() if bits is None else longwave.Kivi(bits=bits, **SMALL)
        cache = longwave.cache(llama, method)
        with torch.no_grad():
            llama(ids[:, :80], **into(cache), use_cache=True)
            scores[bits] = llama(ids[:, 80:], **into(cache), use_cache=True).logits
    errors = [float((scores[bits] - scores[None]).square().mean()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[0] / 1000
    assert errors[0] > 1e-4


def test_by_name_and_with_a_size(llama):
    cache = longwave.cache(llama, "kivi", bits=4, **SMALL)
    assert str(cache.method).startswith("kivi(K 4 V 4 bits")
    dense_bytes = 400 * shape_of(llama).token_bytes * 3
    size = int(dense_bytes * 0.8)  # a third of it is one of three layers unpacked, while a turn is read
    cache = longwave.cache(llama, "kivi", budget=f"{size}B", max_tokens=400, **SMALL)
    with torch.no_grad():
        llama(tokens(1, 330), **into(cache), use_cache=True)
        llama(tokens(1, 70, seed=2), **into(cache), use_cache=True)
    report = cache.report()
    assert report.scratch == dense_bytes / 3
    assert report.nbytes + report.scratch <= size
