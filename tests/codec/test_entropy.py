"""rANS: the reference and the compiled loops write the same bytes, which come back, at close to the entropy.

On a CPU Triton runs in its interpreter (tests/conftest.py switches it on), on a GPU for real.
"""

import numpy as np
import pytest
import torch

from longwave.codec import entropy
from longwave.codec.quantise import ROUND

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLES = entropy.Tables.of(entropy.tabled(entropy.laplace()))


def drawn(count, seed=0, context=None):
    """Numbers and their contexts, as a quantiser finds them."""
    draw = np.random.default_rng(seed)
    contexts = draw.integers(0, entropy.CONTEXTS, count) if context is None else np.full(count, context)
    c = draw.laplace(0, 2.0 ** (contexts / entropy.PER_OCTAVE + entropy.FINEST))
    return (np.sign(c) * np.floor(np.abs(c) + ROUND)).astype(np.int32), contexts.astype(np.uint8)


@pytest.fixture(params=[4096, 16], ids=["few lanes", "many lanes"])
def per_lane(request, monkeypatch):
    monkeypatch.setattr(entropy, "PER_LANE", request.param)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 127, 5000])
def test_reference_and_numba_write_the_same_and_read_it_back(per_lane, count):
    q, contexts = drawn(count, count)
    made = entropy.encode(q, contexts, TABLES, compiled=False)
    assert entropy.encode(q, contexts, TABLES, compiled=True) == made
    for compiled in (False, True):
        assert (entropy.decode(made, contexts, TABLES, compiled) == q).all()


def on_device(streams, contexts):
    """What Triton makes of streams: the numbers of each that is right, whether it is."""
    module = pytest.importorskip("longwave.codec.entropy_triton", reason="Triton is for NVIDIA GPUs and Linux")
    decoder = module.Decoder(TABLES, DEVICE)
    found = decoder.decode(streams, torch.from_numpy(contexts).to(DEVICE))
    fine = found.fine.tolist()
    if all(fine):  # all at once are what each is
        assert torch.equal(found.numbers(0, len(fine)), torch.cat([found.numbers(i, i + 1) for i in range(len(fine))]))
    return [found.numbers(i, i + 1)[0].cpu().numpy() if ok else None for i, ok in enumerate(fine)], fine


@pytest.mark.parametrize(("count", "lanes"), [(1, 8), (9, 8), (130, 8), (300, 16), (601, 32), (2100, 128)])
def test_triton_reads_several_streams_back(count, lanes, monkeypatch):
    monkeypatch.setattr(entropy, "PER_LANE", 16)
    assert entropy.lanes(count) == lanes
    q, contexts = drawn(count, count)
    several = np.stack([np.roll(q, 1), q, q])
    several[1, count // 2] = 300  # these escape, in 16 bits and in 32
    several[2, -1] = -40_000
    made = [entropy.Stream.of(entropy.encode(one, contexts, TABLES), count) for one in several]
    found, fine = on_device(made, contexts)
    assert (found == several).all()
    assert fine == [True] * 3


def encoded_on_device(several, contexts, fine=None):
    """The bytes that Triton makes of segments [S, N], whose parts' contexts follow each other."""
    module = pytest.importorskip("longwave.codec.entropy_triton", reason="Triton is for NVIDIA GPUs and Linux")
    fine = [True] * len(several) if fine is None else fine
    placed = [torch.from_numpy(part).to(DEVICE) for part in contexts]
    numbers = torch.from_numpy(several).to(DEVICE)
    return module.Encoder(TABLES, DEVICE).encode(numbers, placed, torch.tensor(fine, device=DEVICE))()


@pytest.mark.parametrize("counts", [(1,), (9, 130), (300, 0, 601, 257), (2100, 7)], ids=str)
def test_triton_writes_the_bytes_of_the_reference(counts, monkeypatch):
    """Parts with 8 to 128 lanes and one without numbers, of segments side by side."""
    monkeypatch.setattr(entropy, "PER_LANE", 16)
    pairs = [drawn(count, count) for count in counts]
    q = np.concatenate([part for part, _ in pairs])
    several = np.stack([q, np.roll(q, 1), -q, q])
    several[1, len(q) // 2] = 300  # these escape, in 16 bits and in 32
    several[2, [0, -1]] = -40_000, 2**24
    several[3] = np.random.default_rng(0).integers(-(2**24), 2**24, len(q))  # all of them
    first = np.cumsum([0, *counts])
    expected = [
        [entropy.encode(row[a:b], c, TABLES, False) for (_, c), a, b in zip(pairs, first, first[1:], strict=False)]
        for row in several
    ]
    assert encoded_on_device(several, [c for _, c in pairs]) == expected


def test_triton_leaves_out_what_is_not_to_be_coded():
    q, contexts = drawn(40, 1)
    beyond = np.full_like(q, np.iinfo(np.int32).min)  # what a device may make of numbers that are too large
    found = encoded_on_device(np.stack([q, beyond, q]), [contexts], [True, False, True])
    assert found == [[entropy.encode(q, contexts, TABLES)], None, [entropy.encode(q, contexts, TABLES)]]
    none = np.zeros((2, 0), np.int32), [np.zeros(0, np.uint8)] * 2
    assert encoded_on_device(*none, [True, False]) == [[b"", b""], None]


def test_triton_notices_damage_of_one_stream_alone(monkeypatch):
    monkeypatch.setattr(entropy, "PER_LANE", 4)  # few rows for the interpreter
    q, contexts = drawn(150, 5)
    made, draw, damaged = entropy.encode(q, contexts, TABLES), np.random.default_rng(1), []
    for _ in range(20):
        broken = bytearray(made)
        broken[draw.integers(8, len(broken))] ^= 1 << draw.integers(8)
        damaged.append(bytes(broken))
    found, fine = on_device([entropy.Stream.of(one, 150) for one in (made, *damaged, made)], contexts)
    assert fine[0]
    assert fine[-1]
    assert all((found[i] == q).all() for i in (0, -1))
    for one, same, right in zip(damaged, found[1:-1], fine[1:-1], strict=True):
        try:
            assert (entropy.decode(one, contexts, TABLES) == same).all()
        except entropy.Broken:
            assert not right
        else:
            assert right
    assert sum(fine) < 12


def test_lanes_are_a_power_of_two_that_costs_little():
    counts = [1, 4095, 4096, 60_000, 70_000, 130_000, 600_000, 10**7]
    assert [entropy.lanes(count) for count in counts] == [8, 8, 8, 8, 16, 16, 128, 128]
    q, contexts = drawn(140_000, 2, 12)
    assert entropy.lanes(len(q)) == 32
    wide = len(entropy.encode(q, contexts, TABLES))
    assert wide < 1.002 * len(entropy.encode(q[:70_000], contexts[:70_000], TABLES)) * 2


def test_numba_is_what_answers_and_means_the_same_format():
    compiled = entropy._compiled()
    assert (compiled.BITS, compiled.LOW) == (entropy.BITS, entropy.LOW)


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
