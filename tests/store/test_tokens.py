import pytest
import torch

from longwave.store.tokens import BLOCK, TokenBuffer, capacity


def draw(batch, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, count, 4, generator=g), torch.randn(batch, 2, count, 4, generator=g)


def test_rows_of_different_lengths_stay_in_order():
    buffer = TokenBuffer(3)
    expected = [[], [], []]
    for step, count in enumerate((5, 1, 70, 1, 3)):
        k, v = draw(3, count, step)
        valid = torch.rand(3, count, generator=torch.Generator().manual_seed(step)) < 0.6
        buffer.append(k, v, valid)
        for row in range(3):
            expected[row].append(k[row][:, valid[row]])
    assert buffer.lengths == [sum(x.shape[1] for x in row) for row in expected]
    for row in range(3):
        whole = torch.cat(expected[row], 1)
        assert torch.equal(buffer.k[row, :, : whole.shape[1]], whole)
        assert not buffer.k[row, :, whole.shape[1] :].any()
    assert buffer.k.shape[2] == capacity(buffer.longest)


def test_one_token_to_rows_of_different_lengths():
    buffer = TokenBuffer(2)
    k, v = draw(2, 4)
    buffer.append(k, v, torch.tensor([[False, False, True, True], [True] * 4]))
    one_k, one_v = draw(2, 1, 9)
    buffer.append(one_k, one_v, None)
    assert buffer.lengths == [3, 5]
    assert torch.equal(buffer.k[0, :, 2], one_k[0, :, 0])
    assert torch.equal(buffer.v[1, :, 4], one_v[1, :, 0])


def test_a_prompt_is_borrowed_until_fit():
    buffer = TokenBuffer(1)
    k, v = draw(1, 100)
    buffer.append(k, v, None)
    assert buffer.k is k
    buffer.fit()
    assert buffer.k is not k
    assert buffer.k.shape[2] == capacity(100) == 2 * BLOCK
    buffer.append(*draw(1, 1), None)
    assert torch.equal(buffer.k[:, :, :100], k)


def test_appending_to_a_borrowed_prompt_does_not_write_into_it():
    buffer = TokenBuffer(1)
    k, v = draw(1, 10)
    before = k.clone()
    buffer.append(k, v, None)
    buffer.append(*draw(1, 3, 5), None)
    assert torch.equal(k, before)
    assert buffer.lengths == [13]


def test_growth_copies_once_a_block():
    buffer = TokenBuffer(1)
    buffer.append(*draw(1, 1), None)
    buffer.fit()
    storages = set()
    for _ in range(3 * BLOCK - 1):
        buffer.append(*draw(1, 1), None)
        storages.add(buffer.k.data_ptr())
    assert len(storages) == 3


def test_drop_frees_memory_and_keeps_both_ends():
    buffer = TokenBuffer(2)
    k, v = draw(2, 200)
    buffer.append(k, v, torch.stack([torch.arange(200) >= 30, torch.arange(200) >= 0]))
    buffer.drop(4, [100, 150])
    assert buffer.lengths == [70, 50]
    assert buffer.k.untyped_storage().nbytes() == 2 * 2 * capacity(70) * 4 * 4
    assert torch.equal(buffer.k[0, :, :4], k[0, :, 30:34])
    assert torch.equal(buffer.k[0, :, 4:70], k[0, :, 134:])
    assert torch.equal(buffer.v[1, :, 4:50], v[1, :, 154:])
    assert not buffer.k[1, :, 50:].any()


def test_crop_clears_what_it_leaves():
    buffer = TokenBuffer(2)
    buffer.append(*draw(2, 20), None)
    buffer.crop([5, 20])
    assert buffer.lengths == [15, 0]
    assert not buffer.k[0, :, 15:].any()
    assert not buffer.v[1].any()


@pytest.mark.parametrize("counts", [[8, 8, 8], [0, 8, 24]], ids=["alike", "ragged"])
def test_a_reserved_buffer_stays_and_holds_the_same(counts):
    plain, fixed = TokenBuffer(3), TokenBuffer(3)
    k, v = draw(3, 100)
    valid = None if len(set(counts)) == 1 else torch.arange(100) < torch.tensor([[100], [70], [31]])
    for buffer in (plain, fixed):
        buffer.append(k, v, valid)
    fixed.reserve(150)
    where = [x.data_ptr() for x in fixed.tensors()]
    assert fixed.k.shape[2] == capacity(150)
    for buffer in (plain, fixed):
        buffer.drop(5, counts)
        buffer.fit()
    assert [x.data_ptr() for x in fixed.tensors()] == where
    assert fixed.lengths == plain.lengths
    fixed.release()
    assert all(torch.equal(x, y) for x, y in zip(fixed.tensors(), plain.tensors(), strict=True))
