"""The frame: what stands between transformers and a method."""

from longwave.frame.assemble import assemble, observing
from longwave.frame.attention import use_longwave_attention
from longwave.frame.cache import LongCache, Report
from longwave.frame.counting import storage_bytes
from longwave.frame.layer import MemoryLayer
from longwave.frame.observe import Needs, Pass, Step

__all__ = [
    "LongCache",
    "MemoryLayer",
    "Needs",
    "Pass",
    "Report",
    "Step",
    "assemble",
    "observing",
    "storage_bytes",
    "use_longwave_attention",
]
