"""The rows that benchmarks/codec.py compares with: they code at the size asked for, and less loses more."""

import pytest
import torch

from benchmarks.codec import Coded, Kvtc, packed_bits
from tests.codec.conftest import error


@pytest.mark.parametrize(
    "row", [Kvtc, lambda read: Coded(read, "cpu"), lambda read: Coded(read, "cpu", groups="layer")]
)
def test_a_row_codes_in_place_at_its_size(small, row):
    made, losses = row(small.read), []
    for size in (0.18, 0.1):
        k, v, ids = (x.clone() for x in small.part(4, 132))
        taken = made.at(size)([(k, v, ids.tolist(), 4)])
        assert 0.7 < taken / (4 * k.numel()) / size < 1.3
        losses.append(error(v, small.part(4, 132)[1]))
    assert 0 < losses[0] < losses[1] < 1


def test_bits_are_packed():
    codes = torch.tensor([[1, 0, 3], [2, 2, 1]], dtype=torch.uint8).numpy()
    assert packed_bits(codes, 2) == bytes([0b10_00_11_01, 0b01_10_00_00])


def test_bits_go_where_they_lower_the_error(small):
    kvtc = Kvtc(small.read)
    bits = kvtc.allot(0.1)
    errors = torch.cat([part[5] for part in kvtc.parts])
    assert sum(bits) <= 0.1 * 16 * len(bits)
    index = torch.tensor([kvtc.BITS.index(b) for b in bits])
    best = float(errors.gather(1, index[:, None]).sum())
    equal = kvtc.BITS.index(1)
    assert best < float(errors[:, equal].sum())
