"""rANS: the reference and the compiled loops write the same bytes, which come back, at close to the entropy."""

import numpy as np
import pytest

from longwave.codec import entropy
from longwave.codec.quantise import ROUND

TABLES = entropy.Tables.of(entropy.tabled(entropy.laplace()))


def drawn(count, seed=0, context=None):
    """Numbers and their contexts, as a quantiser finds them."""
    draw = np.random.default_rng(seed)
    contexts = draw.integers(0, entropy.CONTEXTS, count) if context is None else np.full(count, context)
    c = draw.laplace(0, 2.0 ** (contexts / entropy.PER_OCTAVE + entropy.FINEST))
    return (np.sign(c) * np.floor(np.abs(c) + ROUND)).astype(np.int32), contexts.astype(np.uint8)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 127, 5000])
def test_reference_and_numba_write_the_same_and_read_it_back(count):
    q, contexts = drawn(count, count)
    made = entropy.encode(q, contexts, TABLES, compiled=False)
    assert entropy.encode(q, contexts, TABLES, compiled=True) == made
    for compiled in (False, True):
        assert (entropy.decode(made, contexts, TABLES, compiled) == q).all()


def test_numba_is_what_answers_and_means_the_same_format():
    compiled = entropy._compiled()
    assert (compiled.LANES, compiled.BITS, compiled.LOW) == (entropy.LANES, entropy.BITS, entropy.LOW)


def test_no_numbers_take_no_bytes():
    none = np.zeros(0, np.int32), np.zeros(0, np.uint8)
    assert entropy.encode(*none, TABLES) == b""
    assert len(entropy.decode(b"", none[1], TABLES)) == 0
    with pytest.raises(entropy.Broken, match="3 bytes for no numbers"):
        entropy.decode(b"abc", none[1], TABLES)


@pytest.mark.parametrize("context", [2, 8, 14, 20, 26])
def test_bytes_are_close_to_the_entropy(context):
    q, contexts = drawn(100_000, 3, context)
    share = np.unique(q, return_counts=True)[1] / len(q)
    ideal = -(share * np.log2(share)).sum() * len(q) / 8
    assert ideal < len(entropy.encode(q, contexts, TABLES)) < 1.02 * ideal + 60


@pytest.mark.parametrize("large", [200, 40_000, 2**24])
def test_what_no_table_holds_escapes(large):
    q, contexts = np.array([0, large, -large, 3], np.int32), np.zeros(4, np.uint8)
    assert (entropy.decode(entropy.encode(q, contexts, TABLES), contexts, TABLES) == q).all()


def test_tables_sum_and_can_escape():
    frequency = TABLES.frequency.astype(int)
    assert (frequency.sum(1) == 2**entropy.BITS).all()
    assert (frequency[:, entropy.ESCAPE] > 0).all()
    broken = TABLES.frequency.copy()
    broken[3, 127] -= 1
    with pytest.raises(ValueError, match="sum to 16384"):
        entropy.Tables.of(broken)


def test_learned_tables_are_symmetric_and_follow_what_was_seen():
    counts = np.zeros((entropy.CONTEXTS, 256), np.int64)
    counts[10, entropy.REACH] = 10**6
    counts[10, entropy.REACH + 2] = 10**6
    found = entropy.learned(counts).astype(int)
    assert abs(found[10, entropy.REACH] - 8192) < 50
    assert abs(found[10, entropy.REACH + 2] - found[10, entropy.REACH - 2]) <= 1
    assert (found[11] == entropy.learned(np.zeros_like(counts))[11]).all()


def test_contexts_are_whole_numbers_of_size_over_step():
    sizes = np.arange(-400, 400)
    found = entropy.context(sizes, 0)
    assert found.min() == 0
    assert found.max() == entropy.CONTEXTS - 1
    assert (entropy.context(sizes + 56, 56) == found).all()
    assert found[400] == -entropy.FINEST * entropy.PER_OCTAVE  # a size of one step


def test_damage_is_noticed_or_decodes_in_bounds():
    q, contexts = drawn(3000, 5)
    made, draw, seen = entropy.encode(q, contexts, TABLES), np.random.default_rng(1), 0
    for _ in range(200):
        broken = bytearray(made)
        broken[draw.integers(len(broken))] ^= 1 << draw.integers(8)
        try:
            entropy.decode(bytes(broken), contexts, TABLES)
        except entropy.Broken:
            seen += 1
    assert seen > 100
    for cut in (0, 5, 39, 41, len(made) - 1):
        with pytest.raises(entropy.Broken):
            entropy.decode(made[:cut], contexts, TABLES)
