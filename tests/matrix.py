"""Every method, for the shared contracts: IDENTITY changes nothing (test_matrix.py), LOSSY does (test_lossy.py).

A new method adds a line to each: its name and a function from a model to an empty cache.
"""

from dataclasses import dataclass
from tempfile import gettempdir
from typing import ClassVar

import longwave
from tests.conftest import merging_profile, own_axes, random_profile
from tests.explicit import Explicit

ENDS = dict(sinks=2, window=8)


@dataclass(frozen=True)
class Often(longwave.SnapKV):
    """snapkv that chooses every few steps, so that short tests see it."""

    every: ClassVar[int] = 8


@dataclass(frozen=True)
class OftenPyramid(longwave.PyramidKV):
    """The same of pyramidkv."""

    every: ClassVar[int] = 8


@dataclass(frozen=True)
class OftenAda(longwave.AdaKV):
    """And of adakv."""

    every: ClassVar[int] = 8


@dataclass(frozen=True)
class OftenExpected(longwave.ExpectedAttention):
    """And of expected_attention."""

    every: ClassVar[int] = 8


@dataclass(frozen=True)
class OftenSir(longwave.SirLLM):
    """And of sirllm."""

    every: ClassVar[int] = 8


@dataclass(frozen=True)
class OftenKVzip(longwave.KVzip):
    """And of kvzip."""

    every: ClassVar[int] = 8


@dataclass(frozen=True)
class OftenSparse(longwave.SparseDLLM):
    """And of sparse_dllm."""

    every: ClassVar[int] = 8


@dataclass(frozen=True)
class OftenThink(longwave.ThinK):
    """think that packs a few tokens at a time."""

    segment: ClassVar[int] = 8


@dataclass(frozen=True)
class OftenMatching(longwave.AttentionMatching):
    """And of attention_matching."""

    every: ClassVar[int] = 8


@dataclass(frozen=True)
class SmallPalu(longwave.Palu):
    """palu whose tokens join by a few."""

    segment: ClassVar[int] = 8


@dataclass(frozen=True)
class OftenSpec(longwave.SpecKV):
    """And of speckv; without a draft, which tests/prefill have."""

    every: ClassVar[int] = 8
    ahead: int = 0


@dataclass(frozen=True)
class FewAlone(longwave.ReAttention):
    """longcache whose short chunks choose together too."""

    alone: ClassVar[int] = 6


@dataclass(frozen=True)
class FewInfLLM(longwave.InfLLM):
    """And infllm."""

    alone: ClassVar[int] = 6


@dataclass(frozen=True)
class FewActQKV(longwave.ActQKV):
    """And actqkv."""

    alone: ClassVar[int] = 6


FAR = dict(sinks=2, chunk=8, block=4, blocks=3, representatives=2)

# budget 1: nothing is dropped or compressed
IDENTITY = {
    "dense": lambda model: longwave.cache(model, "dense"),
    # all channels kept: segments are cut, nothing is projected
    "pages-kept": lambda model: longwave.cache(model, Explicit(keep=1.0, states=2, segment=8, **ENDS)),
    # nothing kept, as many states as tokens: every channel goes through the basis and comes back whole
    "pages-states": lambda model: longwave.cache(model, Explicit(keep=0.0, states=7, segment=7, sinks=3, window=5)),
    # a plan that can afford everything
    "fourier-planned": lambda model: longwave.cache(
        model, longwave.Fourier(segment=8, **ENDS), budget=1.0, profile=random_profile(model)
    ),
    "kivi": lambda model: longwave.cache(model, longwave.Kivi(group=8, **ENDS), budget=1.0),
    "streaming": lambda model: longwave.cache(model, longwave.Streaming(**ENDS), budget=1.0),
    # keys are turned back and forth, and none of them ever goes
    "streaming-slots": lambda model: longwave.cache(model, longwave.Streaming(tokens=4096, positions="slots", **ENDS)),
    "snapkv": lambda model: longwave.cache(model, longwave.SnapKV(**ENDS), budget=1.0),
    # the window votes, and every token of a span goes into its page
    "snapkv-pages": lambda model: longwave.cache(
        model, longwave.SnapKV(store=longwave.Kivi(group=8), store_budget=1.0, **ENDS), budget=1.0
    ),
    "h2o": lambda model: longwave.cache(model, longwave.H2O(**ENDS), budget=1.0),
    "quest": lambda model: longwave.cache(model, longwave.Quest(full_layers=0, chunk=8, **ENDS), budget=1.0),
    # chunks are chosen and gathered, and the window makes them all
    "quest-gathers": lambda model: longwave.cache(
        model, longwave.Quest(full_layers=0, chunk=7, sinks=2, window=4096), budget=0.5
    ),
    # keys are turned back and forth, and the scope has room for all
    "longcache": lambda model: longwave.cache(model, longwave.ReAttention(window=300, spans=10, span=5, chunk=16)),
    # and all of it comes from pages
    "longcache-pages": lambda model: longwave.cache(
        model,
        longwave.ReAttention(window=9, chunk=8, spans=100, span=5, sinks=2, store=longwave.Kivi(group=8)),
        budget=1.0,
    ),
    # all is in the window; what leaves it would go into blocks
    "infllm": lambda model: longwave.cache(model, longwave.InfLLM(sinks=2, window=300, chunk=16, block=8)),
    # every head has room for all chunks
    "longheads": lambda model: longwave.cache(model, longwave.LongHeads(chunk=16, chunks=20)),
}

# budgets that bite after a few dozen tokens
LOSSY = {
    "kivi": lambda model: longwave.cache(model, longwave.Kivi(bits=4, group=8, sinks=3, window=5)),
    "pages-values": lambda model: longwave.cache(
        model, Explicit(keep=0.5, states=2, segment=8, **ENDS), profile=random_profile(model)
    ),
    "fourier": lambda model: longwave.cache(
        model, longwave.Fourier(segment=8, **ENDS), budget=0.5, profile=random_profile(model)
    ),
    "fourier-merged": lambda model: longwave.cache(
        model, longwave.Fourier(segment=8, **ENDS), budget=0.3, profile=merging_profile(model)
    ),
    "fourier-paper": lambda model: longwave.cache(
        model, longwave.FourierPaper(keep=0.5, states=4, reserve=16, **ENDS), profile=random_profile(model)
    ),
    "streaming": lambda model: longwave.cache(model, longwave.Streaming(**ENDS), budget=0.3),
    "streaming-slots": lambda model: longwave.cache(model, longwave.Streaming(tokens=24, positions="slots", **ENDS)),
    "snapkv": lambda model: longwave.cache(model, Often(**ENDS), budget=0.3),
    "snapkv-pages": lambda model: longwave.cache(
        model, longwave.SnapKV(store=longwave.Kivi(bits=4, group=8), **ENDS), budget=0.06
    ),
    "h2o": lambda model: longwave.cache(model, longwave.H2O(**ENDS), budget=0.3),
    "quest": lambda model: longwave.cache(model, longwave.Quest(full_layers=0, chunk=4, **ENDS), budget=0.3),
    "longcache": lambda model: longwave.cache(model, FewAlone(chunk=8, top=2, spans=3, span=4, sinks=2, window=9)),
    "longcache-looks": lambda model: longwave.cache(
        model, FewAlone(chunk=8, top=2, spans=3, span=4, sinks=2, window=9, look=7)
    ),
    "longcache-pages": lambda model: longwave.cache(
        model,
        FewAlone(chunk=8, top=2, spans=3, span=4, sinks=2, window=9, store=longwave.Kivi(bits=4, group=8)),
    ),
    "longcache-mapped": lambda model: longwave.cache(
        model, FewAlone(chunk=8, top=2, spans=3, span=4, sinks=2, window=9, host=gettempdir())
    ),
    "tova": lambda model: longwave.cache(model, longwave.Tova(**ENDS), budget=0.3),
    "treekv": lambda model: longwave.cache(model, longwave.TreeKV(block=4, **ENDS), budget=0.3),
    "treekv-slots": lambda model: longwave.cache(
        model, longwave.TreeKV(tokens=21, positions="slots", index_rule="printed", block=1, **ENDS)
    ),
    "weightedkv": lambda model: longwave.cache(model, longwave.WeightedKV(tokens=24, **ENDS)),
    "cam": lambda model: longwave.cache(model, longwave.CaM(reach=3, **ENDS), budget=0.3),
    "knorm": lambda model: longwave.cache(model, longwave.KNorm(**ENDS), budget=0.3),
    "expected_attention": lambda model: longwave.cache(
        model, OftenExpected(queries=6, stride=2, ahead=20, eps=0.01, **ENDS), budget=0.3
    ),
    "pyramidkv": lambda model: longwave.cache(model, OftenPyramid(**ENDS), budget=0.3),
    "think": lambda model: longwave.cache(model, OftenThink(queries=6, **ENDS), budget=0.8),
    "snapkv-think": lambda model: longwave.cache(
        model, longwave.SnapKV(store=OftenThink(queries=6), store_budget=0.8, **ENDS), budget=0.45
    ),
    "sirllm": lambda model: longwave.cache(model, OftenSir(decay=0.7, **ENDS), budget=0.3),
    "sirllm-slots": lambda model: longwave.cache(model, OftenSir(tokens=24, positions="slots", **ENDS)),
    "adakv": lambda model: longwave.cache(model, OftenAda(**ENDS), budget=0.3),
    "speckv": lambda model: longwave.cache(model, OftenSpec(**ENDS), budget=0.3),
    "sparse_dllm": lambda model: longwave.cache(model, OftenSparse(**ENDS), budget=0.3),
    "kvzip": lambda model: longwave.cache(model, OftenKVzip(chunk=20, lead=3, ask=(5, 6), **ENDS), budget=0.3),
    "kvzip-uniform": lambda model: longwave.cache(model, OftenKVzip(chunk=20, uniform=True, **ENDS), budget=0.3),
    "attention_matching": lambda model: longwave.cache(model, OftenMatching(queries=8, stride=3, **ENDS), budget=0.3),
    "lm_infinite": lambda model: longwave.cache(model, longwave.LMInfinite(sinks=2, window=16)),
    "self_extend": lambda model: longwave.cache(model, longwave.SelfExtend(group=4, window=16)),
    "dual_chunk": lambda model: longwave.cache(model, longwave.DualChunk(chunk=24, window=8)),
    "longheads": lambda model: longwave.cache(model, longwave.LongHeads(chunk=10, chunks=3)),
    "infllm": lambda model: longwave.cache(model, FewInfLLM(**FAR, window=20)),
    "actqkv": lambda model: longwave.cache(model, FewActQKV(**FAR, window=20, warm=2)),
    "palu": lambda model: longwave.cache(model, SmallPalu(axes=own_axes(model), **ENDS), budget=0.5),
}

# Methods that share a base with one in IDENTITY: everything is observed as if it were needed, and there is room for all
ROOMY = {
    method.name: lambda model, method=method: longwave.cache(model, method(tokens=4096))
    for method in (
        *(longwave.H2O, longwave.PyramidKV, longwave.AdaKV, longwave.Tova, longwave.TreeKV, longwave.WeightedKV),
        *(longwave.CaM, longwave.KNorm, longwave.ExpectedAttention, longwave.SirLLM, OftenSpec),
        *(longwave.KVzip, longwave.AttentionMatching, longwave.SparseDLLM),
    )
} | {
    "think": lambda model: longwave.cache(model, longwave.ThinK(window=4096)),
    "actqkv": lambda model: longwave.cache(model, longwave.ActQKV(window=300, chunk=16)),
    "lm_infinite": lambda model: longwave.cache(model, longwave.LMInfinite(window=4096)),
    "self_extend": lambda model: longwave.cache(model, longwave.SelfExtend(window=4096)),
    "dual_chunk": lambda model: longwave.cache(model, longwave.DualChunk(chunk=4096)),
}
