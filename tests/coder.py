"""A coder for tests: a segment's numbers as they are, in 16 bits or in the 32 of the tests' models; nothing else."""

import torch


class Raw:
    """`longwave.saved.Coder` without a loss where numbers fit `dtype`. layers: the model's, of which it decodes `group`
    together. calls: (start, layers) of each decoding."""

    def __init__(self, dtype=torch.float32, tokens=16, layers=0, group=1, name=b"raw"):
        self.dtype, self.tokens, self.calls = dtype, tokens, []
        if layers:
            self.groups = [range(first, min(first + group, layers)) for first in range(0, layers, group)]
        self.fingerprint, self.lossless = name + str(dtype).encode(), dtype == torch.float32

    def bound(self, n, max_bytes=None):
        return n * 1 << 16

    def encode(self, k, v, *, ids=None, start=None, out=None, max_bytes=None):
        assert out is None
        assert k.shape == v.shape
        assert ids.shape == (k.shape[1],)
        self.asked = (*getattr(self, "asked", ()), (start, ids.tolist(), max_bytes))
        shape = torch.tensor(k.shape, dtype=torch.int32)
        return b"".join(
            x.contiguous().view(torch.uint8).numpy().tobytes() for x in (shape, *(y.to(self.dtype) for y in (k, v)))
        )

    def decode(self, blob, k, v, *, layers=None, start=None):
        self.calls.append((start, tuple(layers)))
        raw = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        shape = raw[:16].view(torch.int32).tolist()
        both = raw[16:].view(self.dtype).view(2, *shape)
        if shape[1:] != list(k.shape[1:]):
            raise ValueError(f"the segment has {shape[1]} tokens, not {k.shape[1]}")
        for x, y in zip((k, v), both, strict=True):
            x.copy_(y[layers.start : layers.stop])


class Parted(Raw):
    """The same, and its groups can be coded alone."""

    def __init__(self, layers, dtype=torch.float32, tokens=16, group=1):
        super().__init__(dtype, tokens, layers, group)
        self.own = [Raw(dtype, tokens, len(own), len(own), b"%d of " % own[0]) for own in self.groups]

    def parts(self):
        return self.own


class Several(Raw):
    """The same, three segments at a time. many: how many there were in each call."""

    together = 3

    def encode_many(self, ks, vs, *, ids, starts, max_bytes):
        self.many = (*getattr(self, "many", ()), len(ks))
        every = zip(ks, vs, ids, starts, max_bytes, strict=True)
        return [self.encode(k, v, ids=i, start=start, max_bytes=most) for k, v, i, start, most in every]
