"""Plans: the ways to store a head and their bytes, what each costs on a model, and the choice under a budget."""

from longwave.plan.options import (
    KEY_BITS,
    KEY_MORE,
    KEY_OPTIONS,
    NOISE,
    OWN_TYPE,
    VALUE_MORE,
    VALUE_OPTIONS,
    Shape,
    code_bytes,
    key_code,
    key_runs,
    value_code,
)
from longwave.plan.planner import EIGHT, Menu, TooSmall, Unit, choose, extended, joined, lower_hull, planned, units
from longwave.plan.profile import RECALL

__all__ = [
    "EIGHT",
    "KEY_BITS",
    "KEY_MORE",
    "KEY_OPTIONS",
    "NOISE",
    "OWN_TYPE",
    "RECALL",
    "VALUE_MORE",
    "VALUE_OPTIONS",
    "Menu",
    "Shape",
    "TooSmall",
    "Unit",
    "choose",
    "code_bytes",
    "extended",
    "joined",
    "key_code",
    "key_runs",
    "lower_hull",
    "planned",
    "units",
    "value_code",
]
