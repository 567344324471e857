"""Pages answer as the K and V they stand for, and are the same however the tokens came."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from longwave.frame.cache import storage_bytes
from longwave.ops.spectral import reference
from longwave.ops.spectral.basis import BASES
from longwave.ops.spectral.layout import OWN, Code, Layout
from longwave.store.pages import PageStore
from tests.ops.spectral.test_layout import random_code

STATES = 4


def draw(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made_layout(seed, heads, dim, segment, dtype=torch.float64, even=False):
    """even: no code has 3 states, for which BLAS rounds one product otherwise than the same in a batch."""
    source = random.Random(seed)
    k, v = ([random_code(source, dim, segment) for _ in range(heads)] for _ in range(2))
    if even:
        k, v = ([replace(code, states=4 if code.states == 3 else code.states) for code in side] for side in (k, v))
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(dim, generator=g) for _ in range(2 * heads)])
    return Layout(k, v, order[:heads], order[heads:], segment, dtype)


def new_store(layout, batch=1, basis="dct"):
    return PageStore(batch, layout, basis, STATES, torch.device("cpu"))


# every kind of field once, heads that differ and an odd number of them
MIXED = [
    Code(((8, 3), (4, 5), (3, 2), (2, 4), (1, 1), (16, 2), (OWN, 3)), 4, state_bits=8),
    Code(((2, 24),), 1, axis="token", residual=True, state_bits=8, zero=False),
    Code(((4, 8), (1, 8)), 2, axis="token", state_bits=16),
]


def mixed(dtype=torch.float64):
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    return Layout(MIXED, MIXED[::-1], order[:3], order[3:], 16, dtype)


# answers


@pytest.mark.parametrize("seed", range(30))
def test_scores_and_mix_are_those_of_what_pages_stand_for(seed):
    source = random.Random(seed)
    heads, dim = source.choice([1, 2, 3, 5]), source.choice([8, 24, 41])
    segment, pages = source.choice([8, 16, 40, 13]), source.choice([1, 3])
    layout = made_layout(seed, heads, dim, segment)
    store = new_store(layout, batch=2, basis=source.choice(list(BASES)))
    store.append(None, *draw(2, 2, heads, pages * segment, dim, seed=seed).add(0.5))
    k, v = store.materialize()
    assert k.shape == v.shape == (2, heads, pages * segment, dim)
    q, p = draw(2, heads, 3, dim, seed=seed + 1), draw(2, heads, 3, pages * segment, seed=seed + 2).softmax(-1)
    torch.testing.assert_close(store.scores(q), q @ k.mT, rtol=0, atol=1e-12 * float(1 + k.abs().max() * dim))
    torch.testing.assert_close(store.mix(p), p @ v, rtol=0, atol=1e-12 * float(1 + v.abs().max()))


@pytest.mark.parametrize("bits", [16, OWN, 8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", ["time", "token"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("state_bits", [8, 16, OWN])
def test_every_code_answers_and_comes_back_as_fine_as_its_bits(bits, axis, residual, state_bits):
    code = Code(((bits, 24),), 2, axis, residual, state_bits, fit=False)
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    store = new_store(Layout([code] * 3, [code] * 3, order[:3], order[3:], 16, torch.float64))
    exact_k, exact_v = draw(2, 1, 3, 32, 24)
    store.append(None, exact_k, exact_v)
    k, v = store.materialize()
    q, p = draw(1, 3, 2, 24, seed=1), draw(1, 3, 2, 32, seed=2).softmax(-1)
    torch.testing.assert_close(store.scores(q), q @ k.mT, rtol=0, atol=1e-12 * 24 * 4)
    torch.testing.assert_close(store.mix(p), p @ v, rtol=0, atol=1e-12 * 4)
    # the whole range of some 24 normal numbers is about 6, and half a step is the largest error of a code
    allowed = {OWN: 1e-12, 16: 2e-3}.get(bits, 8 / (2 ** (bits or 1) - 1) / 2 * (2 if residual else 1))
    for held, exact in ((k, exact_k), (v, exact_v)):
        rms = float((held - exact).square().mean().sqrt())
        assert rms <= allowed
        if bits not in (OWN, 16):
            assert rms >= allowed / 16  # it is really that coarse


@pytest.mark.parametrize("state_bits", [8, 16, OWN])
def test_states_are_least_squares_in_their_bits(state_bits):
    order = torch.arange(6).expand(2, -1)
    store = new_store(
        Layout([Code((), 3, state_bits=state_bits)] * 2, [Code((), 3)] * 2, order, order, 20, torch.float64)
    )
    k, v = draw(2, 1, 2, 40, 6)
    store.append(None, k, v)
    held_k, held_v = store.materialize()
    t = torch.arange(20, dtype=torch.float64)
    basis = torch.stack([torch.cos(torch.pi * n * (t + 0.5) / 20) for n in range(3)], dim=1)
    fine = {8: 2 / 127, 16: 2e-3, OWN: 1e-12}[state_bits]
    for held, exact, atol in ((held_k, k, fine), (held_v, v, 1e-12)):
        for segment in (slice(0, 20), slice(20, 40)):
            expected = basis @ torch.linalg.lstsq(basis.expand(2, -1, -1), exact[0, :, segment]).solution
            torch.testing.assert_close(held[0, :, segment], expected, rtol=0, atol=atol)


def test_a_kept_channel_lies_at_its_own_place():
    order = torch.tensor([[3, 1, 0, 2]])
    layout = Layout([Code(((OWN, 2),), 1)], [Code(((OWN, 1),), 1)], order, order, 8, torch.float64)
    store = new_store(layout)
    k, v = draw(2, 1, 1, 8, 4)
    store.append(None, k, v)
    held_k, held_v = store.materialize()
    for held, exact, kept in ((held_k, k, [3, 1]), (held_v, v, [3])):
        for channel in range(4):
            mean = exact[..., channel].mean(-1, keepdim=True).expand_as(exact[..., channel])
            expected = exact[..., channel] if channel in kept else mean
            torch.testing.assert_close(held[..., channel], expected, rtol=0, atol=1e-12)


def test_numbers_that_all_vanish_come_back_as_zero():
    layout = mixed()
    store = new_store(layout)
    store.append(None, *torch.zeros(2, 1, 3, 16, 24, dtype=torch.float64))
    for held in store.materialize():
        assert bool(torch.isfinite(held).all())
        # symmetric codes have no zero: half of the smallest step, 24 channels at once
        assert held.abs().max() <= 24 * 2.0**-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_row_unpacks_into_part_of_a_larger_tensor(dtype, kernels, monkeypatch):
    """Between sinks and window, where a turn has them; rows of other lengths, one of none."""
    monkeypatch.setenv("LONGWAVE_KERNELS", kernels)
    store, lengths = new_store(mixed(dtype), 3), [48, 16, 0]
    k, v = draw(2, 3, 3, 48, 24).to(dtype)
    for row, length in enumerate(lengths[:2]):
        store.append(row, k[row : row + 1, :, :length], v[row : row + 1, :, :length])
    held = store.materialize()
    for row, length in enumerate(lengths):
        wholes = [torch.full((1, 3, length + 11, 24), 7.0, dtype=dtype) for _ in range(2)]
        store.expand(row, *(whole[:, :, 4 : 4 + length] for whole in wholes))
        for whole, expected in zip(wholes, held, strict=True):
            fine = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-2)
            torch.testing.assert_close(whole[0, :, 4 : 4 + length], expected[row, :, :length], rtol=fine, atol=fine)
            assert (whole[:, :, :4] == 7).all()
            assert (whole[:, :, 4 + length :] == 7).all()


@pytest.mark.parametrize(
    ("rows", "queries", "expands"), [(3, 64, False), (3, 65, True), (12, 16, False), (12, 17, True)]
)
def test_many_query_rows_a_head_are_better_unpacked_for(rows, queries, expands):
    assert new_store(mixed()).expands(torch.zeros(1, rows, queries, 24)) is expands


@pytest.mark.parametrize(
    ("code", "segment", "message"),
    [
        (Code(((4, 8),), 1), 12, "codes of 4 bits are packed by eights: segments of 12 tokens do not fit"),
        (Code(((2, 4),), 1, axis="token"), 16, "codes of 2 bits are packed by eights: 4 channels do not fit"),
    ],
    ids=["segment", "channels"],
)
def test_bits_that_do_not_fill_bytes_are_refused_before_any_token(code, segment, message):
    order = torch.arange(24).expand(1, -1)
    with pytest.raises(ValueError, match=message):
        Layout([code], [Code()], order, order, segment, torch.float32)


# how tokens came


def test_segment_by_segment_equals_at_once():
    for seed in range(10):
        layout = made_layout(seed, 3, 24, 16, even=True)
        k, v = draw(2, 2, 3, 80, 24, seed=seed)
        once, bit_by_bit, mixed_up = (new_store(layout, 2) for _ in range(3))
        once.append(None, k, v)
        for start in range(0, 80, 16):
            bit_by_bit.append(None, k[:, :, start : start + 16], v[:, :, start : start + 16])
        for row, cuts in ((1, (0, 48, 80)), (0, (0, 16, 32, 80))):
            for start, end in pairwise(cuts):
                mixed_up.append(row, k[row : row + 1, :, start:end], v[row : row + 1, :, start:end])
        assert once.tokens == bit_by_bit.tokens == mixed_up.tokens == [80, 80]
        assert torch.equal(once.pages, bit_by_bit.pages)
        assert torch.equal(once.pages, mixed_up.pages)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_rows_pages_do_not_depend_on_the_other_rows(dtype):
    layout = mixed(dtype)
    k, v = draw(2, 3, 3, 48, 24).to(dtype)
    k[1] *= 30
    together = new_store(layout, 3)
    together.append(None, k, v)
    for row in range(3):
        alone = new_store(layout)
        alone.append(None, k[row : row + 1], v[row : row + 1])
        assert torch.equal(alone.pages[0], together.pages[row])


def test_rows_of_different_lengths():
    layout = mixed()
    k, v = draw(2, 3, 3, 64, 24)
    store, lengths = new_store(layout, 3), [32, 0, 64]
    for row, length in enumerate(lengths):
        if length:
            store.append(row, k[row : row + 1, :, :length], v[row : row + 1, :, :length])
    assert store.tokens == lengths
    q, p = draw(3, 3, 2, 24, seed=1), draw(3, 3, 2, 64, seed=2).softmax(-1)
    for row, length in enumerate(lengths):
        p[row, ..., length:] = 0  # as the layer does
    scores, mixes = store.scores(q), store.mix(p)
    held = store.materialize()
    for row, length in enumerate(lengths):
        if not length:
            assert not mixes[row].any()
            continue
        alone = new_store(layout)
        alone.append(None, k[row : row + 1, :, :length], v[row : row + 1, :, :length])
        for whole, own in zip(held, alone.materialize(), strict=True):
            torch.testing.assert_close(whole[row, :, :length], own[0], rtol=0, atol=1e-12)
        one = slice(row, row + 1)
        torch.testing.assert_close(scores[one, ..., :length], alone.scores(q[one]), rtol=0, atol=1e-11)
        torch.testing.assert_close(mixes[one], alone.mix(p[one, ..., :length]), rtol=0, atol=1e-12)
    store.append(None, k[:, :, :16], v[:, :, :16])  # all of them again, from where each stands
    assert store.tokens == [48, 16, 80]
    first = new_store(layout, 3)
    first.append(None, k[:, :, :16], v[:, :, :16])
    for row, count in enumerate(store.counts):
        assert torch.equal(store.pages[row, count - 1], first.pages[row, 0])


def test_select_takes_rows_and_gives_memory_back():
    layout = mixed()
    k, v = draw(2, 3, 3, 64, 24)
    store, lengths = new_store(layout, 3), [32, 16, 64]
    for row, length in enumerate(lengths):
        store.append(row, k[row : row + 1, :, :length], v[row : row + 1, :, :length])
    before = store.pages.clone()
    store.select(torch.tensor([1, 0, 0]))
    assert store.tokens == [16, 32, 32]
    assert torch.equal(store.pages, before[[1, 0, 0], :2])
    assert storage_bytes([store.pages]) == 3 * 2 * layout.page_bytes
    store.append(2, k[2:, :, 48:], v[2:, :, 48:])  # copies do not share memory
    assert torch.equal(store.pages[2, 2], before[2, 3])
    assert torch.equal(store.pages[1, :2], before[0, :2])


def test_nothing_is_held_but_pages():
    layout = mixed()
    store = new_store(layout, 2)
    assert store.tokens == [0, 0]
    for count in (1, 2, 5):
        store = new_store(layout, 2)
        for start in range(0, 16 * count, 16):
            store.append(None, *draw(2, 2, 3, 16, 24, seed=start))
        held = [x for tensors in store.parts().values() for x in tensors]
        assert storage_bytes(held) == 2 * count * layout.page_bytes
        assert storage_bytes(list(store.index())) == layout.index_bytes


@pytest.mark.parametrize(("waiting", "due"), [(0, 0), (15, 0), (16, 16), (47, 32)])
def test_only_whole_segments_are_due(waiting, due):
    assert new_store(mixed()).due(0, waiting) == due


def test_pages_made_in_inference_mode_can_grow_outside_it():
    layout = mixed()
    k, v = draw(2, 2, 3, 32, 24)
    store = new_store(layout, 2)
    with torch.inference_mode():
        store.append(0, k[:1], v[:1])
        store.append(1, k[1:, :, :16], v[1:, :, :16])
    store.append(1, k[1:, :, 16:], v[1:, :, 16:])  # into a place that is there already
    once = new_store(layout, 2)
    once.append(None, k, v)
    assert torch.equal(store.pages, once.pages)


# the kernel, where the store takes it


def test_the_store_answers_alike_with_and_without_its_kernel():
    layout = mixed(torch.float32)
    store = new_store(layout, 2)
    store.append(None, *draw(2, 2, 3, 48, 24).float())
    q, p = draw(2, 3, 2, 24, seed=1).float(), draw(2, 3, 2, 48, seed=2).float().softmax(-1)
    table = store._table(q.dtype, q.device)
    torch.testing.assert_close(store.scores(q), reference.scores(layout, store.pages, q, table), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(store.mix(p), reference.mix(layout, store.pages, p, table), rtol=1e-4, atol=1e-5)


def test_reserved_pages_are_filled_in_place():
    plain, fixed = (new_store(mixed(), batch=2) for _ in range(2))
    k, v = draw(2, 3, 32, 24), draw(2, 3, 32, 24, seed=1)
    for store in (plain, fixed):
        store.append(None, k, v)
    fixed.reserve(6)
    where = fixed.pages.data_ptr()
    for store in (plain, fixed):
        store.append(1, k[:1, :, :16], v[:1, :, :16])
        store.append(None, k, v)
    assert fixed.pages.data_ptr() == where
    assert fixed.pages.shape[1] == 6
    fixed.release()
    assert fixed.counts == plain.counts == [4, 5]
    assert torch.equal(fixed.pages, plain.pages)
