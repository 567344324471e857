"""longwave: a Hugging Face language model reads a long context inside a memory budget that you name."""

from longwave.build import cache
from longwave.cache import LongCache, MemoryLayer
from longwave.decode import StaticDecoder, generate
from longwave.methods import Dense, Fourier, Kivi
from longwave.models import load
from longwave.profile import Profile

__version__ = "0.1.0"
__all__ = [
    "Dense",
    "Fourier",
    "Kivi",
    "LongCache",
    "MemoryLayer",
    "Profile",
    "StaticDecoder",
    "__version__",
    "cache",
    "generate",
    "load",
]
