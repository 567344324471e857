"""Where a page keeps what: nothing overlaps, nothing is left out, and the bytes are those of a sum done by hand."""

import random

import pytest
import torch

from longwave.ops.spectral.layout import OWN, Code, Layout


def straight(heads, dim):
    return torch.arange(dim).expand(heads, -1)


def layout(k, v, dim, segment=32, dtype=torch.float32):
    return Layout(k, v, straight(len(k), dim), straight(len(v), dim), segment, dtype)


def field_list(made):
    return [field for fields in made.fields().values() for field in fields]


def random_code(draw, dim, segment, axis=None):
    axis = axis or draw.choice(["time", "token"])
    eights = segment % 8 == 0 if axis == "time" else True
    residual = draw.random() < 0.3 and (eights if axis == "time" else dim % 8 == 0)
    if residual:
        runs = ((draw.choice([8, 4, 3, 2, 1, 16, OWN]), dim),)
    else:
        runs, left = (), dim
        for bits in draw.sample([16, OWN, 8, 4, 3, 2, 1], draw.randint(0, 4)):
            n = draw.randint(1, max(1, left // 2))
            if bits in (8, 4, 3, 2, 1) and axis == "token":
                n -= n % 8
            if bits in (8, 4, 3, 2, 1) and not eights:
                continue
            if n and n <= left:
                runs, left = (*runs, (bits, n)), left - n
    whole = sum(n for _, n in runs) == dim and not residual
    states = 0 if whole and draw.random() < 0.5 else draw.randint(1, 4)
    group = 8 if axis == "token" and all(n % 8 == 0 for _, n in runs) and draw.random() < 0.3 else 0
    return Code(
        runs, states, axis, residual, draw.choice([8, 16, OWN]), draw.random() < 0.5, draw.random() < 0.5, group
    )


@pytest.mark.parametrize("seed", range(20))
def test_fields_are_aligned_and_apart(seed):
    draw = random.Random(seed)
    heads, dim, segment = draw.randint(1, 5), draw.choice([8, 24, 40, 41]), draw.choice([8, 24, 32, 13])
    k, v = ([random_code(draw, dim, segment) for _ in range(heads)] for _ in range(2))
    made = layout(k, v, dim, segment, draw.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    fields = field_list(made)
    assert fields
    covered = torch.zeros(made.page_bytes, dtype=torch.int)
    for field in fields:
        assert field.offset % 16 == 0
        assert field.offset + field.nbytes <= made.page_bytes
        covered[field.offset : field.offset + field.nbytes] += 1
    assert covered.max() == 1
    assert made.page_bytes == sum(-(-field.nbytes // 16) * 16 for field in fields)
    assert made.page_bytes % 16 == 0


def test_k_lies_before_v():
    made = layout([Code((), 2)], [Code(((4, 8),), 1)], dim=16)
    (k,), (v,) = made.k, made.v
    assert k.states.offset == 0
    assert min(field.offset for field in (v.values[0], v.scales[0], v.states)) == k.states.nbytes


def up(n):
    return -(-n // 16) * 16


# (code, bytes of three heads' part of a page; 24 channels, segments of 40 tokens, float32)
BY_HAND = {
    "a mean in 8 bits": (Code((), 1, state_bits=8), up(3 * 24) + up(3 * 2)),
    "4 states, own type": (Code((), 4), 3 * 4 * 24 * 4),
    "4 states, 16 bits": (Code((), 4, state_bits=16), 3 * 4 * 24 * 2),
    "own numbers": (Code(((OWN, 24),), 0), 3 * 40 * 24 * 4),
    "half the channels at 16 bits": (Code(((16, 12),), 2), 3 * 40 * 12 * 2 + 3 * 2 * 12 * 4),
    "3 bits along time": (Code(((3, 24),), 0), up(3 * 24 * 15) + 3 * 2 * 24 * 2),
    "4 and 2 bits along time, a mean": (
        Code(((4, 8), (2, 8)), 1, state_bits=8),
        (3 * 8 * 20 + 3 * 2 * 8 * 2) + (up(3 * 8 * 10) + 3 * 2 * 8 * 2) + up(3 * 8) + up(3 * 2),
    ),
    "2 bits a token": (Code(((2, 24),), 0, axis="token"), 3 * 40 * 6 + 3 * 2 * 40 * 2),
    "2 bits a token, groups": (Code(((2, 24),), 0, axis="token", group=8), 3 * 40 * 6 + 3 * 2 * 40 * 3 * 2),
    "1 bit a token, no zero": (Code(((1, 24),), 0, axis="token", zero=False), up(3 * 40 * 3) + 3 * 40 * 2),
    "residual": (
        Code(((3, 24),), 1, axis="token", residual=True, state_bits=8, zero=False),
        up(3 * 40 * 9) + up(3 * 40 * 2) + up(3 * 24) + up(3 * 2),
    ),
}


@pytest.mark.parametrize("name", list(BY_HAND))
def test_page_bytes_equal_a_sum_by_hand(name):
    code, expected = BY_HAND[name]
    assert layout([code] * 3, [], dim=24, segment=40).page_bytes == expected
    assert layout([code] * 3, [code] * 3, dim=24, segment=40).page_bytes == 2 * expected


def test_own_numbers_take_the_models_own_bytes():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert layout([Code(((OWN, 8),), 0)], [], 8, 10, dtype).page_bytes == 10 * 8 * dtype.itemsize
        assert layout([Code(((16, 8),), 0)], [], 8, 10, dtype).page_bytes == 10 * 8 * 2
    kinds = {  # a 16-bit model keeps its own kind of 16 bits
        dtype: layout([Code(((16, 8),), 0)], [], 8, 10, dtype).k[0].values[0].dtype
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    }
    assert list(kinds.values()) == [torch.float16, torch.float16, torch.bfloat16, torch.float16]


def test_heads_stored_alike_share_a_group():
    a, b = Code((), 1), Code(((4, 8),), 1)
    made = layout([a, b, a, b, b], [a] * 5, dim=16)
    assert [group.heads.tolist() for group in made.k] == [[0, 2], [1, 3, 4]]
    assert [group.heads.tolist() for group in made.v] == [[0, 1, 2, 3, 4]]
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    made = Layout([a, b, a, b, b], [a] * 5, order, order, 32, torch.float32)
    assert torch.equal(made.k[1].order.long(), order[[1, 3, 4]])
    assert made.index_bytes == 2 * 5 * (8 + 16 * 2)


def test_a_view_is_the_same_memory():
    made = layout([Code(((4, 8),), 2)], [Code((), 1)], dim=16)
    pages = torch.zeros(2, 3, made.page_bytes, dtype=torch.uint8)
    for number, field in enumerate(field_list(made), 1):
        view = field.view(pages)
        assert view.shape == (2, 3, *field.shape)
        assert view.dtype == field.dtype
        view.view(torch.uint8).fill_(number)
    counts = [int((pages == number).sum()) for number in range(1, 1 + len(field_list(made)))]
    assert counts == [6 * field.nbytes for field in field_list(made)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (Code(((4, 17),)), "17 channels are kept of a head of 16"),
        (Code(((4, 8), (2, 9))), "17 channels are kept of a head of 16"),
        (Code(((5, 8),)), "got 5"),
        (Code(((4, 8),), residual=True), "all channels of a head at once"),
        (Code(((4, 8), (2, 8)), residual=True), "all channels of a head at once"),
        (Code(((4, 12),), axis="token"), "12 channels do not fit"),
        (Code(((4, 16),), axis="token", group=5), "groups of 5"),
        (Code(((4, 8),), states=0), "at least one state"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_codes_that_fit_no_page_are_refused(code, message):
    with pytest.raises(ValueError, match=message):
        layout([code], [], dim=16)


def test_segments_that_do_not_pack_are_refused():
    with pytest.raises(ValueError, match="segments of 20 tokens do not fit"):
        layout([Code(((4, 8),))], [], dim=16, segment=20)
    layout([Code(((8, 8),), 1, axis="token")], [], dim=16, segment=20)
