"""Which blocks lie on the device, and that they are what lies in host memory."""

import pytest
import torch

from longwave.store.resident import Resident
from longwave.store.tokens import TokenBuffer

BLOCK, SLOTS = 4, 3


@pytest.fixture
def tokens():
    made = TokenBuffer(2)
    made.append(*torch.randn(2, 2, 3, 40, 8), None)
    made.fit()
    return made


@pytest.fixture
def resident(tokens):
    return Resident(tokens, BLOCK, SLOTS, torch.device("cpu"))


def ask(resident, tokens, *rows):
    """Read whole blocks of each row, and look at them."""
    places = [[n * BLOCK + i for n in row for i in range(BLOCK)] for row in rows]
    count = torch.tensor([len(row) for row in places])
    index = torch.tensor([row + [0] * (int(count.max()) - len(row)) for row in places])
    k, v = resident.read(index, count)
    for row, some in enumerate(places):
        assert torch.equal(k[row, :, : len(some)], tokens.k[row][:, some])
        assert torch.equal(v[row, :, : len(some)], tokens.v[row][:, some])


def test_what_is_read_is_what_lies_in_host_memory(resident, tokens):
    ask(resident, tokens, [2, 0], [9])
    ask(resident, tokens, [5, 2, 7], [])
    assert resident.k.shape == (2, 3, SLOTS * BLOCK, 8)


def test_what_was_asked_for_longest_ago_gives_way(resident, tokens):
    ask(resident, tokens, [0, 1, 2], [4])
    ask(resident, tokens, [0], [4])
    ask(resident, tokens, [3], [4])  # for 1
    assert set(resident.held[0]) == {0, 2, 3}
    ask(resident, tokens, [1, 2, 3], [4])  # 0 gives way, though 2 was asked for longer ago
    assert set(resident.held[0]) == {1, 2, 3}


def test_never_more_than_there_is_room_for(resident, tokens):
    for first in range(6):
        ask(resident, tokens, range(first, first + 3), [first])
        assert sorted(resident.held[0].values()) == [0, 1, 2]
    with pytest.raises(ValueError, match="4 blocks are read at once, and there is room for 3"):
        ask(resident, tokens, [0, 1, 2, 3], [0])


def test_what_changed_is_copied_again(resident, tokens):
    ask(resident, tokens, [0, 1], [1])
    tokens.k[0, :, 6:] = 1.0
    resident.forget([6, 40])
    assert set(resident.held[0]) == {0}
    ask(resident, tokens, [0, 1], [1])
