"""The frame: what stands between transformers and a method."""

from longwave.frame.argument import cache_argument, cache_name
from longwave.frame.assemble import assemble, observing
from longwave.frame.attention import stored_dtype, use_longwave_attention
from longwave.frame.cache import LongCache
from longwave.frame.counting import storage_bytes
from longwave.frame.layer import MemoryLayer
from longwave.frame.observe import Needs, Pass, Step
from longwave.frame.report import Report

__all__ = [
    "LongCache",
    "MemoryLayer",
    "Needs",
    "Pass",
    "Report",
    "Step",
    "assemble",
    "cache_argument",
    "cache_name",
    "observing",
    "storage_bytes",
    "stored_dtype",
    "use_longwave_attention",
]
