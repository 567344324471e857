"""The codec: K and V of a cache that waits, in a twentieth of their bytes (docs/codec.md)."""

from longwave.codec.blob import CodecError, Header, peek
from longwave.codec.calibrate import Calibration, Effort, calibrate
from longwave.codec.file import Codec
from longwave.codec.fit import build, fit
from longwave.codec.kept import codec_for, kept_codec
from longwave.codec.segment import SegmentCodec

__all__ = [
    "Calibration",
    "Codec",
    "CodecError",
    "Effort",
    "Header",
    "SegmentCodec",
    "build",
    "calibrate",
    "codec_for",
    "fit",
    "kept_codec",
    "peek",
]
