"""Saved caches: what was read once lies in a file, exactly or coded, and is never read again."""

from longwave.codec.coder import Coder
from longwave.saved.container import SavedCacheError
from longwave.saved.look import Saved, look
from longwave.saved.reading import read_coded
from longwave.saved.restoring import restore
from longwave.saved.saving import save

__all__ = ["Coder", "Saved", "SavedCacheError", "look", "read_coded", "restore", "save"]
