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


# side columns

COLUMNS = {"position": torch.int32, "mass": torch.float32}


def with_columns(batch, count, valid=None, seed=0):
    """A buffer whose columns say of each token where it is: position its number, mass that and its head."""
    buffer, (k, v) = TokenBuffer(batch, COLUMNS), draw(batch, count, seed)
    position = torch.arange(count).expand(batch, 1, count)
    mass = position + 1000 * torch.arange(2)[None, :, None]
    buffer.append(k, v, valid, {"position": position, "mass": mass})
    return buffer, k, v


def check_columns(buffer, row, head, kept, k, v):
    """The tokens `kept` of k and v, in order, with their columns, and nothing after them."""
    count = len(kept)
    assert buffer.lengths[row] == count
    assert torch.equal(buffer.k[row, head, :count], k[row, head, kept])
    assert torch.equal(buffer.v[row, head, :count], v[row, head, kept])
    assert buffer.columns["position"][row, head, :count].tolist() == list(kept)
    assert buffer.columns["mass"][row, head, :count].tolist() == [i + 1000 * head for i in kept]
    for x in (buffer.k, buffer.v, *buffer.columns.values()):
        assert not x[row, head, count:].any()


def test_columns_travel_with_their_tokens():
    valid = torch.stack([torch.arange(100) >= 30, torch.arange(100) >= 0])
    buffer, k, v = with_columns(2, 100, valid)
    kept = [list(range(30, 100)), list(range(100))]

    def check():
        for row in range(2):
            for head in range(2):
                check_columns(buffer, row, head, kept[row], k, v)
        assert {name: x.dtype for name, x in buffer.columns.items()} == COLUMNS
        assert all(x.shape == (2, 2, capacity(buffer.longest)) for x in buffer.columns.values())

    check()
    buffer.drop(4, [10, 40])
    kept = [row[:4] + row[4 + count :] for row, count in zip(kept, (10, 40), strict=True)]
    check()
    buffer.crop([3, 0])
    kept[0] = kept[0][:-3]
    check()
    buffer.select(torch.tensor([1, 0]))
    kept, k, v = kept[::-1], k.flip(0), v.flip(0)
    check()
    buffer.move("cpu")
    check()
    buffer.reserve(200)
    assert buffer.columns["mass"].shape[2] == capacity(200)
    buffer.release()
    check()


def test_columns_that_are_not_given_start_at_zero():
    buffer = TokenBuffer(1, COLUMNS)
    buffer.append(*draw(1, 5), None, {"position": torch.arange(5).view(1, 1, 5)})
    buffer.append(*draw(1, 2, 1), None)
    assert buffer.column("position").tolist() == [[[0, 1, 2, 3, 4, 0, 0]] * 2]
    assert not buffer.column("mass").any()


def test_columns_of_a_borrowed_prompt_are_the_buffers_own():
    position = torch.arange(5).view(1, 1, 5).int()
    buffer = TokenBuffer(1, {"position": torch.int32})
    buffer.append(*draw(1, 5), None, {"position": position})
    buffer.fit()
    buffer.columns["position"] += 1
    assert position.tolist() == [[[0, 1, 2, 3, 4]]]
    assert buffer.column("position").tolist() == [[[1, 2, 3, 4, 5]] * 2]


# keep


@pytest.mark.parametrize("reserved", [False, True])
def test_keep_takes_what_each_head_chose(reserved):
    valid = torch.stack([torch.arange(150) >= 50, torch.arange(150) >= 0])
    buffer, k, v = with_columns(2, 150, valid)
    if reserved:
        buffer.reserve(150)
        where = buffer.k.data_ptr()
    g = torch.Generator().manual_seed(3)
    lengths = [20, 60]
    index = torch.zeros(2, 2, 60, dtype=torch.long)
    chosen = {}
    for row, count in enumerate(lengths):
        for head in range(2):
            held = buffer.lengths[row]
            mine = torch.randperm(held, generator=g)[:count].sort().values
            index[row, head, :count] = mine
            chosen[row, head] = (mine + (50 if row == 0 else 0)).tolist()
    buffer.keep(index, lengths)
    assert buffer.uniform is False
    for (row, head), kept in chosen.items():
        check_columns(buffer, row, head, kept, k, v)
    if reserved:
        assert buffer.k.data_ptr() == where
        assert buffer.k.shape[2] == capacity(150)
        buffer.release()
    assert buffer.k.untyped_storage().nbytes() == 2 * 2 * capacity(60) * 4 * 4
    for (row, head), kept in chosen.items():
        check_columns(buffer, row, head, kept, k, v)


def test_keep_does_not_write_into_a_borrowed_prompt():
    buffer, k, _ = with_columns(1, 40)
    before = k.clone()
    buffer.keep(torch.arange(10).expand(1, 2, 10), [10])
    buffer.append(*draw(1, 3, 5), None)
    assert torch.equal(k, before)
    assert buffer.lengths == [13]


# steps on the device


def test_a_step_writes_where_the_device_says():
    buffer, _, _ = with_columns(2, 40, torch.stack([torch.arange(40) >= 15, torch.arange(40) >= 0]))
    buffer.reserve(50)
    where = [x.data_ptr() for x in (*buffer.tensors(), *buffer.columns.values())]
    buffer.columns["mass"][:] = 5  # of a token that stood there before
    new_k, new_v = draw(2, 1, 9)
    at = torch.tensor([25, 40])
    buffer.write_step(torch.arange(2), at, new_k, new_v, {"position": torch.tensor([[77], [78]])})
    for row, place in enumerate(at.tolist()):
        assert torch.equal(buffer.k[row, :, place], new_k[row, :, 0])
        assert torch.equal(buffer.v[row, :, place], new_v[row, :, 0])
        assert buffer.columns["position"][row, :, place].tolist() == [77 + row] * 2
        assert buffer.columns["mass"][row, :, place].tolist() == [0, 0]
    assert [x.data_ptr() for x in (*buffer.tensors(), *buffer.columns.values())] == where
    assert buffer.lengths == [25, 40]  # the host's to bring up


def test_a_step_drops_a_token_of_each_head_in_place():
    buffer, k, _ = with_columns(3, 40)
    buffer.reserve(50)
    where = [x.data_ptr() for x in (*buffer.tensors(), *buffer.columns.values())]
    slot = torch.tensor([[0, 39], [7, 20], [3, 3]])
    over = torch.tensor([True, True, False])
    buffer.drop_step(slot, over)
    assert [x.data_ptr() for x in (*buffer.tensors(), *buffer.columns.values())] == where
    for row in range(3):
        for head in range(2):
            kept = [i for i in range(40) if not over[row] or i != slot[row, head]]
            assert torch.equal(buffer.k[row, head, : len(kept)], k[row, head, kept])
            assert buffer.columns["position"][row, head, : len(kept)].tolist() == kept
            assert buffer.columns["mass"][row, head, : len(kept)].tolist() == [i + 1000 * head for i in kept]


# side columns


DECLARED = {"position": torch.int32, "mass": torch.float32}


def watched(batch, counts, valid=None):
    """A buffer filled in several calls, K's first channel being the token's number in its row, as its position is."""
    buffer, start = TokenBuffer(batch, DECLARED), 0
    for count in counts:
        k, v = draw(batch, count, start)
        numbers = torch.arange(start, start + count).expand(batch, count)
        k[..., 0] = numbers[:, None]
        new = None if valid is None else valid[:, start : start + count]
        buffer.append(k, v, new, {"position": numbers[:, None], "mass": (numbers * 0.5)[:, None].expand(-1, 2, -1)})
        start += count
    return buffer


def check_together(buffer):
    """Each token with its own columns, and nothing behind a row's end."""
    for name, dtype in DECLARED.items():
        column = buffer.columns[name]
        assert column.dtype == dtype
        assert column.shape == buffer.k.shape[:3]
        for row, length in enumerate(buffer.lengths):
            want = buffer.k[row, :, :length, 0] * (1 if name == "position" else 0.5)
            assert torch.equal(column[row, :, :length].float(), want)
            assert not column[row, :, length:].any()
            assert not buffer.k[row, :, length:].any()


RAGGED = torch.arange(100) >= torch.tensor([[0], [30], [77]])


@pytest.mark.parametrize("valid", [None, RAGGED], ids=["even", "ragged"])
def test_columns_stay_beside_their_tokens(valid):
    buffer = watched(3, (60, 1, 30, 1, 8), valid)
    buffer.fit()
    check_together(buffer)
    buffer.drop(4, [10, 20, 0])
    check_together(buffer)
    buffer.crop([0, 5, 7])
    check_together(buffer)
    buffer.select(torch.tensor([2, 0, 0, 1]))
    check_together(buffer)
    buffer.move("meta")
    assert all(column.device.type == "meta" for column in buffer.columns.values())


def test_columns_that_are_not_given_start_at_nothing():
    buffer = TokenBuffer(2, DECLARED)
    buffer.append(*draw(2, 5), None, {"position": torch.arange(5)[None, None]})
    buffer.append(*draw(2, 3), None)
    assert buffer.column("position").tolist() == [[[0, 1, 2, 3, 4, 0, 0, 0]] * 2] * 2
    assert not buffer.column("mass").any()


def random_choice(buffer, lengths, seed=0):
    """For each row and head, lengths[row] of its tokens, rising; anything behind them."""
    g, n = torch.Generator().manual_seed(seed), max(lengths)
    index = torch.zeros(len(lengths), 2, n, dtype=torch.long)
    for row, (held, kept) in enumerate(zip(buffer.lengths, lengths, strict=True)):
        for head in range(2):
            index[row, head, :kept] = torch.randperm(held, generator=g)[:kept].sort().values
    return index


@pytest.mark.parametrize("fixed", [False, True], ids=["free", "reserved"])
@pytest.mark.parametrize("lengths", [[40, 40, 40], [70, 3, 23]], ids=["alike", "ragged"])
def test_keep_takes_each_heads_own_tokens(fixed, lengths):
    buffer = watched(3, (100,), RAGGED)
    if fixed:
        buffer.reserve(130)
        where = [x.data_ptr() for x in (buffer.k, buffer.v, *buffer.columns.values())]
    lengths = [min(kept, held) for kept, held in zip(lengths, buffer.lengths, strict=True)]
    index, k, v = random_choice(buffer, lengths), buffer.k.clone(), buffer.v.clone()
    buffer.keep(index, lengths)
    assert buffer.lengths == lengths
    for row, kept in enumerate(lengths):
        for head in range(2):
            chosen = index[row, head, :kept]
            assert torch.equal(buffer.k[row, head, :kept], k[row, head, chosen])
            assert torch.equal(buffer.v[row, head, :kept], v[row, head, chosen])
    check_together(buffer)
    if fixed:
        assert [x.data_ptr() for x in (buffer.k, buffer.v, *buffer.columns.values())] == where
        buffer.release()
    assert buffer.k.untyped_storage().nbytes() == 3 * 2 * capacity(max(lengths)) * 4 * 4
    check_together(buffer)


def test_steps_write_and_drop_where_the_device_says():
    """As `append` and `keep` would: columns too, and rows that drop nothing stay."""
    plain, steps = (watched(3, (50,), RAGGED[:, :50]) for _ in range(2))
    assert plain.lengths == [50, 20, 0]
    steps.reserve(70)
    where = [x.data_ptr() for x in (steps.k, steps.v, *steps.columns.values())]
    at, rows = torch.tensor(plain.lengths), torch.arange(3)
    g = torch.Generator().manual_seed(3)
    for number in range(50, 62):
        k, v = draw(3, 1, number)
        k[..., 0] = number
        columns = {"position": torch.full((3, 1), number), "mass": torch.full((3, 1), number * 0.5)}
        steps.write_step(rows, at, k, v, columns)
        plain.append(k, v, None, {name: x[:, None] for name, x in columns.items()})
        over = torch.rand(3, generator=g) < 0.6
        lengths = [n - int(o) for n, o in zip(plain.lengths, over, strict=True)]
        slot = torch.stack([torch.randint(n, (2,), generator=g) for n in plain.lengths])
        steps.drop_step(slot, over)
        at += 1 - over.long()
        index = torch.arange(max(plain.lengths)).expand(3, 2, -1).clone()
        index += (index >= slot[..., None]) & over[:, None, None]
        plain.keep(index[..., : max(lengths)].clamp(max=max(plain.lengths) - 1), lengths)
        assert at.tolist() == plain.lengths
    assert [x.data_ptr() for x in (steps.k, steps.v, *steps.columns.values())] == where
    steps.lengths = list(plain.lengths)
    steps.release()
    for name in ("k", "v"):
        assert torch.equal(getattr(steps, name), getattr(plain, name))
    for name in DECLARED:
        assert torch.equal(steps.columns[name], plain.columns[name])
    check_together(steps)


def test_a_reserved_buffer_drops_columns_too():
    plain, fixed = (watched(3, (100,), RAGGED) for _ in range(2))
    fixed.reserve(120)
    for buffer in (plain, fixed):
        buffer.drop(5, [8, 0, 16])
        buffer.crop([1, 2, 0])
        check_together(buffer)
    fixed.release()
    assert torch.equal(fixed.k, plain.k)


def test_columns_made_in_inference_mode_are_written_to_outside():
    with torch.inference_mode():
        buffer = watched(2, (10,))
        buffer.fit()
    buffer.append(*draw(2, 1), None, {"position": torch.full((1, 1, 1), 10)})
    buffer.columns["mass"][:, :, :11] += 1
    buffer.columns["position"][:, :, 0] = 3
    assert buffer.column("position")[0, 0, -1] == 10
