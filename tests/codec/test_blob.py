"""The header and its packing."""

import numpy as np
import pytest
import torch

from longwave.codec import CodecError, blob


def made(**options):
    given = dict(
        fingerprint=b"12345678", tokens=5, start=7, ids=np.arange(5), bits=3, step=-40, dtype=torch.bfloat16, raw=2,
        head=b"raw!", parts=[b"one", b""],
    )  # fmt: skip
    return blob.pack(**{**given, **options})


def test_what_is_packed_is_read():
    header, rest = blob.parse(made())
    assert header == blob.peek(memoryview(made()))
    assert (header.tokens, header.start, header.ids, header.step, header.raw) == (5, 7, (0, 1, 2, 3, 4), -40, 2)
    assert (header.dtype, header.fingerprint, header.version) == (torch.bfloat16, b"12345678", 2)
    head, parts = blob.split(rest, 4, 2)
    assert (bytes(head), [bytes(part) for part in parts]) == (b"raw!", [b"one", b""])
    assert blob.peek(made(ids=None)).ids is None
    whole = blob.peek(made(step=None))
    assert (whole.step, whole.raw) == (None, 5)


@pytest.mark.parametrize("vocabulary", [2, 97, 256, 257, 49152, 262144])
def test_ids_of_any_vocabulary(vocabulary):
    bits = blob.id_bits(vocabulary)
    ids = np.random.default_rng(0).integers(0, vocabulary, 128)
    ids[:2] = 0, vocabulary - 1
    packed = blob.packed_ids(ids, bits)
    assert len(packed) == 16 * bits
    assert (blob.unpacked_ids(packed, 128, bits) == ids).all()


def test_every_flipped_bit_is_noticed():
    good = made()
    for at in range(8 * len(good)):
        broken = bytearray(good)
        broken[at // 8] ^= 1 << at % 8
        with pytest.raises(CodecError):
            blob.parse(bytes(broken))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda b: b[:20], "at least"),
        (lambda b: b[:-1], "was the file cut"),
        (lambda b: b"RIFF" + b[4:], "no coded segment"),
        (lambda b: b[:4] + b"\x09" + b[5:], "format 9, this longwave reads 2"),
        (lambda b: b[:-1] + b"x", "tokens 7 to 11.* is damaged: bad checksum"),
    ],
)
def test_errors_name_what_is_wrong(change, why):
    with pytest.raises(CodecError, match=why):
        blob.parse(change(made(parts=[b"one", b"two"])))


def test_a_position_beyond_all_is_refused():
    with pytest.raises(CodecError, match="start 9223372036854775807"):
        blob.parse(made(start=2**63 - 1))


def test_parts_must_fill_it():
    _, rest = blob.parse(made())
    for head, groups in ((4, 1), (4, 3), (0, 2), (100, 2)):
        with pytest.raises(CodecError):
            blob.split(rest, head, groups)
