"""One segment: round trips, any order, any position, any type, damage, bounds."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longwave.codec import CodecError, blob, entropy, streams
from longwave.codec.decoding import behind
from longwave.codec.segment import RAW, SegmentCodec
from tests.codec.conftest import KINDS, error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def decoded(codec, made, like, layers=None, start=None):
    k, v = (torch.full_like(like if layers is None else like[layers], float("nan")) for _ in range(2))
    codec.decode(made, k, v, layers=layers, start=start)
    return k, v


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_overwrites_all_and_codes_again_to_the_same_bytes(fitted, kind):
    one = fitted(kind)
    codec, far = one.codec.at(0.15), one.codec.at(0.06)
    for start, end in ((4, 132), (132, 260), (260, 300), (299, 300)):
        k, v, ids = one.part(start, end)
        made = codec.encode(k, v, ids=ids, start=start)
        k2, v2 = decoded(codec, made, k)
        assert error(k2, k) < 0.5
        assert error(v2, v) < 0.5
        assert codec.encode(k2, v2, ids=ids, start=start) == made
        coarse = far.encode(k, v, ids=ids, start=start)
        if end - start > 100:
            assert len(coarse) < len(made)
            assert error(decoded(far, coarse, k)[1], v) > error(v2, v)


def test_the_header_says_what_it_is(small):
    k, v, ids = small.part(132, 260)
    codec = small.codec.at(0.1)
    made = codec.encode(k, v, ids=ids, start=132)
    header = codec.peek(made)
    assert (header.tokens, header.start, header.ids) == (128, 132, tuple(ids.tolist()))
    assert header.length == len(made)
    assert header.fingerprint == codec.fingerprint[:8]
    assert header.step == codec.step
    assert codec.layers == range(3)
    assert codec.kv_heads == range(2)


def test_the_first_tokens_of_a_text_stay_as_they_are(small):
    k, v, ids = small.part(0, 100)
    codec = small.codec.at(0.06)
    made = codec.encode(k, v, ids=ids, start=0)
    k2, v2 = decoded(codec, made, k)
    assert torch.equal(k2[:, :RAW], k[:, :RAW])
    assert torch.equal(v2[:, :RAW], v[:, :RAW])
    assert 0 < error(k2[:, RAW:], k[:, RAW:]) < 1
    for n in (1, RAW, RAW + 1):
        k, v, ids = small.part(0, n)
        k2, v2 = decoded(codec, codec.encode(k, v, ids=ids, start=0), k)
        assert torch.equal(k2[:, :RAW], k[:, :RAW])
        assert bool(torch.isfinite(v2).all())


def test_segments_decode_alone_in_any_order_and_by_layer(small):
    codec, starts = small.codec.at(0.1), [4, 132]
    parts = [small.part(start, start + 128) for start in starts]
    made = codec.encode_many([p[0] for p in parts], [p[1] for p in parts], ids=[p[2] for p in parts], starts=starts)
    assert made == [codec.encode(k, v, ids=ids, start=s) for (k, v, ids), s in zip(parts, starts, strict=True)]
    back = [decoded(codec, one, parts[0][0]) for one in made]
    ks, vs = ([torch.full_like(parts[0][0], float("nan")) for _ in starts] for _ in range(2))
    codec.decode_many(made[::-1], ks, vs)
    for (k, v), k2, v2 in zip(back[::-1], ks, vs, strict=True):
        assert torch.equal(k, k2)
        assert torch.equal(v, v2)
    k, v = decoded(codec, made[1], parts[0][0], layers=[2, 0])
    assert torch.allclose(k, back[1][0][[2, 0]], atol=1e-5)
    assert torch.allclose(v, back[1][1][[2, 0]], atol=1e-5)


def test_what_is_opened_once_is_decoded_as_often_as_one_likes(small):
    codec, starts = small.codec.at(0.1), [4, 68, 132]
    parts = [small.part(start, start + 64) for start in starts]
    made = [codec.encode(k, v, ids=ids, start=start) for (k, v, ids), start in zip(parts, starts, strict=True)]
    k, v = (torch.full((1, 3 * 64, *parts[0][0].shape[2:]), float("nan")) for _ in "kv")
    opened = codec.open(made)
    assert codec.open(opened) == opened
    for layer in (0, 2):
        codec.decode_many(opened, k.split(64, 1), v.split(64, 1), layers=[layer])
        for i, one in enumerate(made):
            for mine, alone in zip((k, v), decoded(codec, one, parts[0][0], layers=[layer]), strict=True):
                assert torch.equal(mine[:, i * 64 : (i + 1) * 64], alone)
    made[1] = made[1][:-1]
    with pytest.raises(CodecError, match="was the file cut"):
        codec.open(made)


def test_targets_that_lie_one_behind_the_other_are_written_as_one():
    x, other = torch.zeros(2, 12, 3, 4), torch.zeros(2, 4, 3, 4)
    found = behind([x[:, 1:4], x[:, 4:8], other, x[:, 9:10], x[:, 10:12], x[:, 8:9]])
    assert [part.shape[1] for part in found] == [7, 4, 3, 1]
    found[0].fill_(1)
    assert x.sum() == x[:, 1:8].numel()


def test_triton_decodes_the_same(fitted, monkeypatch):
    """On a CPU in the interpreter, on a GPU for real; of products the last bit may differ, numbers may not."""
    pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    monkeypatch.setattr(entropy, "PER_LANE", 16)  # many lanes: few rows for the interpreter
    one, starts = fitted("qwen3"), [0, 132, 4]  # the first keeps raw tokens: another shape than the others'
    parts = [one.part(start, start + 60) for start in starts]
    codec = one.codec.at(0.06, device=DEVICE)
    made = [codec.encode(k, v, ids=ids, start=start) for (k, v, ids), start in zip(parts, starts, strict=True)]
    expected = [decoded(codec, blob, parts[0][0], layers=[1]) for blob in made]
    monkeypatch.setenv("LONGWAVE_KERNELS", "triton")
    codec = one.codec.at(0.06, device=DEVICE)
    ks, vs = ([torch.full_like(parts[0][0][:1], float("nan")) for _ in starts] for _ in range(2))
    codec.decode_many(made, ks, vs, layers=[1])
    for (k, v), k2, v2 in zip(expected, ks, vs, strict=True):
        torch.testing.assert_close(k, k2, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(v, v2, rtol=1e-5, atol=1e-5)
    forged = bytearray(made[1])
    forged[-9] ^= 1  # the last part's words
    forged[blob.FIXED.size : blob.SIZE] = blob.hashlib.blake2b(
        bytes(forged[: blob.FIXED.size] + forged[blob.SIZE :]), digest_size=blob.CHECK
    ).digest()
    for x in (*ks, *vs):
        x.fill_(7)
    with pytest.raises(CodecError, match="states do not end"):
        codec.decode_many([made[0], bytes(forged), made[2]], ks, vs, layers=[1])
    assert all(bool((x == 7).all()) for x in (*ks, *vs))


def test_triton_encodes_the_same(fitted, monkeypatch):
    """Segments of several forms side by side, in batches; some must fit into less, and one is stored as it is."""
    pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    monkeypatch.setattr(entropy, "PER_LANE", 16)  # many lanes: few rows for the interpreter
    one, starts, stops = fitted("qwen3"), [0, 4, 64, 124, 184, 244, 2], [60, 64, 124, 184, 244, 250, 4]
    ks, vs, ids = map(list, zip(*(one.part(*ends) for ends in zip(starts, stops, strict=True)), strict=True))
    starts[-1] = 0  # two tokens that begin a text: nothing is left to code
    ks[3] = ks[3] * 1e30
    monkeypatch.setenv("LONGWAVE_KERNELS", "reference")
    codec = one.codec.at(0.06, device=DEVICE)
    free = codec.encode(ks[2], vs[2], ids=ids[2], start=starts[2])
    limits = [None, len(free) * 2 // 3, len(free) // 2, None, len(free) * 2 // 3, None, None]
    every = list(zip(ks, vs, ids, starts, limits, strict=True))
    expected = [codec.encode(k, v, ids=i, start=s, max_bytes=most) for k, v, i, s, most in every]
    steps = [codec.peek(made).step for made in expected]
    assert steps[0] == codec.step < steps[1] < steps[2]
    assert steps[3] is None
    monkeypatch.setenv("LONGWAVE_KERNELS", "triton")
    codec = one.codec.at(0.06, device=DEVICE)
    assert codec.together > 100
    monkeypatch.setattr(streams, "NUMBERS", 2 * 2 * 128 * 2 * 2 * 8)
    assert codec.together == 4 * 2
    assert codec.encode_many(ks, vs, ids=ids, starts=starts, max_bytes=limits) == expected
    vs[4] = vs[4].clone()
    vs[4][1, -1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        codec.encode_many(ks, vs, ids=ids, starts=starts)


class Asked(TorchDispatchMode):
    """Counts what a host would have to wait for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero)
        self.count += func.overloadpacket in waits
        return func(*args, **(kwargs or {}))


def test_a_device_is_asked_for_no_single_number_while_it_encodes(fitted, monkeypatch):
    pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    monkeypatch.setenv("LONGWAVE_KERNELS", "triton")
    monkeypatch.setattr(entropy, "PER_LANE", 16)
    one = fitted("qwen3")
    codec, parts = one.codec.at(0.06, device=DEVICE), [one.part(start, start + 16) for start in (0, 16, 32)]
    ks, vs, ids = zip(*parts, strict=True)
    codec.encode_many(ks, vs, ids=ids, starts=[0, 16, 32])  # contexts are made
    with Asked() as asked:
        codec.encode_many(ks, vs, ids=ids, starts=[0, 16, 32], max_bytes=codec.bound(16))
    assert asked.count == 0


def test_groups_of_layers_that_nobody_asks_for_are_not_decoded(small, monkeypatch):
    from longwave.codec import build

    k, v, ids = small.part(132, 260)
    codec, seen = build(small.read, groups=((0, 1), (1, 3))).at(0.1), []
    made = codec.encode(k, v, ids=ids, start=132)
    whole = decoded(codec, made, k)
    decode = codec._streams.decode
    monkeypatch.setattr(codec._streams, "decode", lambda *given: seen.append(1) or decode(*given))
    for layers, groups in (([0], 1), ([2], 1), ([1, 2], 1), ([2, 0, 1], 2), ([2, 2], 1), ([], 0)):
        seen.clear()
        k2, v2 = decoded(codec, made, k, layers=layers)
        assert len(seen) == groups
        assert torch.allclose(k2, whole[0][layers], atol=1e-5)
        assert torch.allclose(v2, whole[1][layers], atol=1e-5)


def test_keys_can_be_put_at_another_position(small):
    codec, rotation = small.codec.at(0.15), small.read.rotation
    for start, raw in ((0, True), (132, False)):
        k, v, ids = small.part(start, start + 100)
        made = codec.encode(k, v, ids=ids, start=start)
        here, there = decoded(codec, made, k), decoded(codec, made, k, start=300)
        at = torch.arange(100)
        expected = rotation.rotate(rotation.unrotate(here[0], at + start), at + 300)
        assert torch.allclose(there[0], expected, atol=1e-4)
        assert torch.equal(there[1], here[1])
        assert not torch.allclose(there[0], here[0], atol=1e-2)
        assert raw == (codec.peek(made).raw > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(small, dtype):
    codec = small.codec.at(0.1)
    k, v, ids = (x.to(dtype) if x.is_floating_point() else x for x in small.part(0, 128))
    made = codec.encode(k, v, ids=ids, start=0)
    k2, v2 = decoded(codec, made, k)
    assert k2.dtype == v2.dtype == dtype
    exact = small.part(0, 128)
    k3, _ = decoded(codec, codec.encode(*exact[:2], ids=ids, start=0), exact[0])
    assert error(k2[:, RAW:], k3[:, RAW:]) < 0.1
    assert torch.equal(k2[:, :RAW], k[:, :RAW].to(torch.float32).to(dtype))
    other = decoded(codec, made, exact[0])  # into another type than was coded
    assert error(other[0], k2) < 0.01


def test_strides_and_outputs(small):
    k, v, ids = small.part(4, 132)
    codec = small.codec.at(0.1)
    made = codec.encode(k, v, ids=ids, start=4)
    strided = [x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in (k, v)]
    assert codec.encode(*strided, ids=ids.tolist(), start=4) == made
    for out in (bytearray(codec.bound(128)), torch.zeros(codec.bound(128), dtype=torch.uint8)):
        count = codec.encode(k, v, ids=ids, start=4, out=out)
        assert bytes(memoryview(out.numpy() if isinstance(out, torch.Tensor) else out)[:count]) == made
    with pytest.raises(ValueError, match="out has 10 bytes"):
        codec.encode(k, v, ids=ids, start=4, out=bytearray(10))
    k2, v2 = (torch.full((2, 128, 3, 8), float("nan")).permute(2, 1, 0, 3) for _ in range(2))
    codec.decode(made, k2, v2)
    expected = decoded(codec, made, k)
    assert torch.equal(k2, expected[0])
    assert torch.equal(v2, expected[1])


def test_in_float64_it_is_the_reference(small):
    k, v, ids = small.part(132, 260)
    single, double = small.codec.at(0.15), small.codec.at(0.15, dtype=torch.float64)
    made = single.encode(k, v, ids=ids, start=132)
    ours, exact = decoded(single, made, k), decoded(double, made, k.double())
    assert error(ours[0], exact[0]) < 1e-5
    assert error(ours[1], exact[1]) < 1e-5
    assert double.encode(k.double(), v.double(), ids=ids, start=132)[blob.SIZE :] == made[blob.SIZE :]


def test_without_ids_they_are_found_or_it_codes_without(small, fitted):
    k, v, ids = small.part(132, 260)
    codec = small.codec.at(0.1)
    made = codec.encode(k, v, ids=ids, start=132)
    assert codec.encode(k, v) == made
    assert codec.encode(k, v, ids=ids) == made
    other = fitted("gemma3")  # its first layer slides
    k, v, ids = other.part(132, 260)
    codec = other.codec.at(0.1)
    with pytest.raises(ValueError, match="give start="):
        codec.encode(k, v, ids=ids)
    blind = codec.encode(k, v, start=132)
    assert codec.peek(blind).ids is None
    assert error(decoded(codec, blind, k)[1], v) < 0.5


def test_max_bytes_is_kept_with_a_larger_step(small):
    k, v, ids = small.part(0, 128)
    codec = small.codec.at(0.2)
    free = codec.encode(k, v, ids=ids, start=0)
    with pytest.raises(
        ValueError, match=r"max_bytes=100 is too few for 128 tokens of this model: at least (\d+) bytes"
    ) as e:
        codec.encode(k, v, ids=ids, start=0, max_bytes=100)
    least = int(str(e.value).split()[-2])
    for most in (len(free) - 1, len(free) // 2, least + 700, least):
        if most < least:
            continue
        made = codec.encode(k, v, ids=ids, start=0, max_bytes=most)
        assert len(made) <= most == codec.bound(128, most)
        assert codec.peek(made).step > codec.step
        assert bool(torch.isfinite(decoded(codec, made, k)[0]).all())
    assert codec.encode(k, v, ids=ids, start=0, max_bytes=10**9) == free


def test_noise_is_kept_whole_within_the_bound(small):
    codec = small.codec.at(0.2)
    for size in (1e3, 1e30):
        k, v = torch.randn(2, 3, 128, 2, 8, generator=torch.Generator().manual_seed(0)) * size
        made = codec.encode(k, v, ids=small.ids[:128], start=40)
        assert len(made) <= codec.bound(128)
        k2, v2 = decoded(codec, made, k)
        if codec.peek(made).step is None:
            assert torch.equal(k, k2)
            assert torch.equal(v, v2)
            assert error(decoded(codec, made, k, layers=[1])[0], k[1:2]) == 0
        assert len(codec.encode(k, v, ids=small.ids[:128], start=40, max_bytes=3000)) <= 3000
    assert codec.peek(made).step is None


def test_arguments_are_refused_with_what_to_do(small, fitted):
    k, v, ids = small.part(4, 132)
    codec = small.codec.at(0.1)
    made = codec.encode(k, v, ids=ids, start=4)
    bad, first = k.clone(), k.clone()
    bad[1, 5, 0, 3], first[1, 1, 0, 3] = float("nan"), float("inf")
    for pattern, call in {
        "not finite": lambda: codec.encode(bad, v, ids=ids, start=4),
        "is not finite": lambda: codec.encode(first, v, ids=ids, start=0),  # of what stays as it is
        r"k is \[layers, n, kv_heads, head_dim\] = \[3, n": lambda: codec.encode(k[:2], v[:2], ids=ids, start=4),
        "1 to 128 tokens, got 300": lambda: codec.encode(small.k, small.v, ids=small.ids, start=0),
        "must be alike": lambda: codec.encode(k, v.half(), ids=ids, start=4),
        "128 of them; got 3": lambda: codec.encode(k, v, ids=[1, 2, 3], start=4),
        "between 0 and 96; got 97 to 97": lambda: codec.encode(k, v, ids=[97] * 128, start=4),
        "0 to 1099511627776; got -1": lambda: codec.encode(k, v, ids=ids, start=-1),
        "these layers make": lambda: codec.decode(made, k[:2], v[:2]),
        "0 to 2": lambda: codec.decode(made, k, v, layers=[0, 1, 3]),
    }.items():
        with pytest.raises(ValueError, match=pattern):
            call()
    with pytest.raises(CodecError, match="another codec"):
        fitted("qwen3").codec.at(0.1).decode(made, torch.empty(2, 128, 2, 8), torch.empty(2, 128, 2, 8))


def test_damage_is_refused_or_right_and_writes_nothing(small):
    k, v, ids = small.part(0, 128)
    codec, draw, untouched = small.codec.at(0.06), random.Random(0), 7.0
    made = codec.encode(k, v, ids=ids, start=0)
    for number in range(400):
        broken = bytearray(made)
        if number % 4 == 0:
            broken = broken[: draw.randrange(len(made))]
        elif number % 4 == 1:
            broken += bytes(draw.randrange(1, 9))
        else:
            for _ in range(draw.choice([1, 1, 2, 30])):
                broken[draw.randrange(len(made) if number % 4 == 2 else blob.SIZE)] ^= 1 << draw.randrange(8)
        if broken == made:
            continue
        target = torch.full_like(k, untouched), torch.full_like(v, untouched)
        with pytest.raises(CodecError):
            codec.decode(bytes(broken), *target)
        assert all(bool((x == untouched).all()) for x in target)


def test_damage_behind_a_checksum_that_holds_never_leaves_its_bounds(small, monkeypatch):
    """What a forger may write: the numbers are anybody's, but no other exception comes and nothing is half written."""
    k, v, ids = small.part(0, 128)
    codec, draw, refused = small.codec.at(0.06), random.Random(1), 0
    made = codec.encode(k, v, ids=ids, start=0)
    for _ in range(300):
        broken = bytearray(made)
        for _ in range(draw.choice([1, 2, 5])):
            at = draw.choice([draw.randrange(8, blob.FIXED.size), draw.randrange(blob.SIZE, len(made))])
            broken[at] = draw.randrange(256)
        fixed, tail = bytes(broken[: blob.FIXED.size]), bytes(broken[blob.SIZE :])
        check = blob.hashlib.blake2b(fixed + tail, digest_size=blob.CHECK).digest()
        target = torch.full_like(k, 7.0), torch.full_like(v, 7.0)
        try:
            codec.decode(fixed + check + tail, *target)
        except CodecError:
            refused += 1
            assert all(bool((x == 7.0).all()) for x in target)
        except ValueError as error:
            assert "this segment and these layers make" in str(error)  # noqa: PT017  # its number of tokens
    assert refused > 150


def test_grouped_layers_and_left_out_steps(small):
    from longwave.codec import build

    k, v, ids = small.part(132, 260)
    for options in ({"groups": ((0, 1), (1, 3))}, {"weigh": False}, {"predict": False}, {"cosines": False}):
        codec = build(small.read, **options).at(0.1)
        made = codec.encode(k, v, ids=ids, start=132)
        k2, v2 = decoded(codec, made, k)
        assert error(k2, k) < 0.8
        assert error(v2, v) < 0.8
        assert codec.encode(k2, v2, ids=ids, start=132) == made


def test_find(small, fitted):
    codec = small.codec.at(0.1)
    k, v, ids = small.part(40, 90)
    for dtype in (torch.float32, torch.bfloat16):
        assert codec.find(k[0].to(dtype), v[0].to(dtype)) == (ids.tolist(), 40)
    assert codec.find(k[0, :1], v[0, :1]) == (ids[:1].tolist(), 40)
    assert codec.find(k[1], v[1]) is None
    assert fitted("qwen3next").codec.at(0.1).find(torch.randn(5, 2, 8), torch.randn(5, 2, 8)) is None


def test_threads_share_it(small):
    import threading

    k, v, ids = small.part(4, 132)
    codec: SegmentCodec = small.codec.at(0.1)
    expected, found = codec.encode(k, v, ids=ids, start=4), []
    threads = [threading.Thread(target=lambda: found.append(codec.encode(k, v, ids=ids, start=4))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
