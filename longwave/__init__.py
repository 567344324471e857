"""longwave: a Hugging Face language model reads a long context inside a memory budget that you name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longwave.build import cache
    from longwave.decode.generate import generate
    from longwave.decode.steps import StaticDecoder
    from longwave.frame import LongCache, MemoryLayer
    from longwave.methods import (
        H2O,
        ActQKV,
        AdaKV,
        AttentionMatching,
        Bound,
        CaM,
        Dense,
        DualChunk,
        Evicting,
        ExpectedAttention,
        Fourier,
        FourierPaper,
        InfLLM,
        Kivi,
        KNorm,
        KVzip,
        LMInfinite,
        LongHeads,
        Method,
        Palu,
        PyramidKV,
        Quest,
        ReAttention,
        Remapped,
        Segmented,
        Selecting,
        SelfExtend,
        SirLLM,
        SnapKV,
        SparseDLLM,
        SpecKV,
        Streaming,
        ThinK,
        Tova,
        TreeKV,
        WeightedKV,
        register,
    )
    from longwave.models import load
    from longwave.plan.profile import Profile
    from longwave.prefill.ahead import look_ahead
    from longwave.prefill.specpc import specpc
    from longwave.prefill.xl3m import xl3m
    from longwave.rotary import extend
    from longwave.samples import sample
    from longwave.saved import SavedCacheError, restore, save

__version__ = "0.1.0"

# where a public name comes from: imported when it is first used, so that `import longwave` costs nothing
_HOMES = {
    "cache": "longwave.build",
    "StaticDecoder": "longwave.decode",
    "generate": "longwave.decode",
    "LongCache": "longwave.frame",
    "MemoryLayer": "longwave.frame",
    "load": "longwave.models",
    "Profile": "longwave.plan.profile",
    "look_ahead": "longwave.prefill.ahead",
    "specpc": "longwave.prefill.specpc",
    "xl3m": "longwave.prefill.xl3m",
    "extend": "longwave.rotary",
    "sample": "longwave.samples",
    "SavedCacheError": "longwave.saved",
    "restore": "longwave.saved",
    "save": "longwave.saved",
    **dict.fromkeys(
        (
            "ActQKV", "AdaKV", "AttentionMatching", "Bound", "CaM", "Dense", "DualChunk", "Evicting",
            "ExpectedAttention", "Fourier", "FourierPaper", "H2O", "InfLLM", "KNorm", "KVzip", "Kivi", "LMInfinite",
            "LongHeads", "Method", "Palu", "PyramidKV", "Quest", "ReAttention", "Remapped", "Segmented", "Selecting",
            "SelfExtend", "SirLLM", "SnapKV", "SparseDLLM", "SpecKV", "Streaming", "ThinK", "Tova", "TreeKV",
            "WeightedKV", "register",
        ),
        "longwave.methods",
    ),
}  # fmt: skip

__all__ = [
    "H2O",
    "ActQKV",
    "AdaKV",
    "AttentionMatching",
    "Bound",
    "CaM",
    "Dense",
    "DualChunk",
    "Evicting",
    "ExpectedAttention",
    "Fourier",
    "FourierPaper",
    "InfLLM",
    "KNorm",
    "KVzip",
    "Kivi",
    "LMInfinite",
    "LongCache",
    "LongHeads",
    "MemoryLayer",
    "Method",
    "Palu",
    "Profile",
    "PyramidKV",
    "Quest",
    "ReAttention",
    "Remapped",
    "SavedCacheError",
    "Segmented",
    "Selecting",
    "SelfExtend",
    "SirLLM",
    "SnapKV",
    "SparseDLLM",
    "SpecKV",
    "StaticDecoder",
    "Streaming",
    "ThinK",
    "Tova",
    "TreeKV",
    "WeightedKV",
    "__version__",
    "cache",
    "extend",
    "generate",
    "load",
    "look_ahead",
    "register",
    "restore",
    "sample",
    "save",
    "specpc",
    "xl3m",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
