"""A model's rotary embedding: its keys and queries turned, back and forth (turning.py), and read beyond the length that
it was trained on (extension.py, laws.py)."""

from longwave.rotary.extension import RULES, Extension, extend
from longwave.rotary.laws import critical_dimension, ntk_factor, ntk_reach
from longwave.rotary.turning import Rotary

__all__ = ["RULES", "Extension", "Rotary", "critical_dimension", "extend", "ntk_factor", "ntk_reach"]
