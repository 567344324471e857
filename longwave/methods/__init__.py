"""The methods, by name. A method is one file and one line here; third parties `register` theirs."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path

from longwave.checks import check_options
from longwave.methods.actqkv import ActQKV
from longwave.methods.adakv import AdaKV
from longwave.methods.attention_matching import AttentionMatching
from longwave.methods.base import Bound, Method
from longwave.methods.cam import CaM
from longwave.methods.dense import Dense
from longwave.methods.dual_chunk import DualChunk
from longwave.methods.evicting import Evicting
from longwave.methods.expected_attention import ExpectedAttention
from longwave.methods.fourier import Fourier
from longwave.methods.fourier_paper import FourierPaper
from longwave.methods.h2o import H2O
from longwave.methods.infllm import InfLLM
from longwave.methods.kivi import Kivi
from longwave.methods.knorm import KNorm
from longwave.methods.kvzip import KVzip
from longwave.methods.lm_infinite import LMInfinite
from longwave.methods.longcache import ReAttention
from longwave.methods.longheads import LongHeads
from longwave.methods.palu import Palu
from longwave.methods.pyramidkv import PyramidKV
from longwave.methods.quest import Quest
from longwave.methods.remapped import Remapped
from longwave.methods.segmented import Segmented
from longwave.methods.selecting import Selecting
from longwave.methods.self_extend import SelfExtend
from longwave.methods.sirllm import SirLLM
from longwave.methods.snapkv import SnapKV
from longwave.methods.sparse_dllm import SparseDLLM
from longwave.methods.speckv import SpecKV
from longwave.methods.streaming import Streaming
from longwave.methods.think import ThinK
from longwave.methods.tova import Tova
from longwave.methods.treekv import TreeKV
from longwave.methods.weightedkv import WeightedKV

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(Dense, Fourier, FourierPaper, Kivi, ThinK, Palu, Quest, ReAttention),
        *(Streaming, SnapKV, PyramidKV, AdaKV, SpecKV, H2O, Tova, TreeKV, KNorm, ExpectedAttention, KVzip),
        *(WeightedKV, CaM, AttentionMatching, SirLLM, SparseDLLM),
        *(LMInfinite, SelfExtend, DualChunk),
        *(InfLLM, ActQKV, LongHeads),
    )
}


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its `name`, to longwave.cache, the command line and the evaluation. Usable as a decorator.

    Raises ValueError for a name that another method has.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"a method is a subclass of longwave.Method, got {method!r}")
    if METHODS.get(method.name, method) is not method:
        raise ValueError(f"there is a method called {method.name!r} already: {METHODS[method.name].__qualname__}")
    METHODS[method.name] = method
    return method


def register_file(path: Path) -> list[str]:
    """Run a Python file that registers methods of its own; their names.

    Raises OSError for a file that is not there, ValueError for one that registers none or whose name a module has.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of methods at {path}")
    if path.suffix != ".py":
        raise ValueError(f"a file of methods is Python, its name ends in .py; got {path}")
    if path.stem in sys.modules or path.stem in sys.stdlib_module_names:
        raise ValueError(f"there is a module {path.stem!r} already: give {path} another name")
    before = set(METHODS)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None  # its suffix is Python's
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not (new := [name for name in METHODS if name not in before]):
            raise ValueError(f"{path} registers no method: put @longwave.register above its class")
    except BaseException:
        del sys.modules[path.stem]
        raise
    return new


def get_method(name: str, /, **options: object) -> Method:
    """A method by name with its options, or an error that suggests the nearest name or option."""
    known = {each: [f.name for f in fields(cls) if not f.name.startswith("_")] for each, cls in METHODS.items()}
    check_options(name, options, known, "method")
    return METHODS[name](**options)


__all__ = [
    "H2O",
    "METHODS",
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
    "LongHeads",
    "Method",
    "Palu",
    "PyramidKV",
    "Quest",
    "Remapped",
    "Segmented",
    "Selecting",
    "SelfExtend",
    "SirLLM",
    "SnapKV",
    "SparseDLLM",
    "SpecKV",
    "Streaming",
    "ThinK",
    "Tova",
    "TreeKV",
    "WeightedKV",
    "get_method",
    "register",
    "register_file",
]
