"""The file of a saved cache: a safetensors container whose every byte is accounted for.

The header's metadata has the format's name and version, `facts` (JSON) and a digest of them; the facts have a digest of
each tensor, over its name, type, shape and bytes. Written beside and renamed, so that a path holds a whole file or the
old one. Knows nothing about caches.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch

from longwave.threads import side_by_side

FORMAT, VERSION = "longwave-cache", "2"
HEADER = 1 << 28  # bytes at most, so that a damaged length asks for no memory
HELD = 1 << 29  # bytes that are copied to the host at a time
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TYPES.items()}


class SavedCacheError(ValueError):
    """A file of a saved cache that is cut, damaged, foreign, of another version, or of another model or codec."""


def _digest(name: str, dtype: str, shape: list[int], data: Any) -> str:
    found = hashlib.blake2b(f"{name} {dtype} {shape}\0".encode(), digest_size=16)
    found.update(data)
    return found.hexdigest()


def _bytes(x: torch.Tensor) -> Any:
    """A tensor's numbers as a buffer of bytes."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_place(path: Path) -> None:
    """OSError where no file can be."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}: make it first")


def write(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> int:
    """Write a file, whole or not at all; its bytes. Half a gigabyte is copied to the host at a time, or a tensor.

    The file is readable for its owner alone: it is a text in clear. OSError leaves the old file and no other.
    """
    check_place(path)
    kinds = {name: (_NAMES[x.dtype], list(x.shape)) for name, x in tensors.items()}
    index, end = {}, 0
    for name, x in tensors.items():
        index[name] = {"dtype": kinds[name][0], "shape": kinds[name][1], "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes

    def digest(name: str, data: Any) -> str:
        return _digest(name, *kinds[name], data)

    header = _header(facts, dict.fromkeys(tensors, "0" * 32), index)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            digests: dict[str, str] = {}
            for some in _together(tensors):
                datas = [_bytes(tensors[name]) for name in some]
                digests.update(zip(some, side_by_side(digest, some, datas), strict=True))
                for data in datas:
                    file.write(data)
            file.seek(0)
            file.write(_header(facts, digests, index))  # as long as the first one
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
    with suppress(OSError):  # some systems cannot sync a folder; the file itself is there
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return len(header) + end


def _together(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names in their order, in runs of HELD bytes at most, or of one."""
    runs: list[list[str]] = []
    held = HELD
    for name, x in tensors.items():
        if held + x.nbytes > HELD:
            runs.append([])
            held = 0
        runs[-1].append(name)
        held += x.nbytes
    return runs


def _header(facts: Mapping[str, Any], digests: dict[str, str], index: Mapping[str, Any]) -> bytes:
    text = json.dumps({**facts, "tensors": digests})
    about = {"format": FORMAT, "version": VERSION, "facts": text, "digest": _digest("facts", "JSON", [], text.encode())}
    made = json.dumps({"__metadata__": about, **index}).encode()
    made += b" " * (-len(made) % 8)
    return struct.pack("<Q", len(made)) + made


class Reader:
    """An open file whose header was found right. facts: as they were given to `write`; nbytes: of the file.

    where: says what a tensor of some name is, in words for a person, by the facts.
    """

    def __init__(self, file: BinaryIO, path: Path, where: Callable[[str, Mapping[str, Any]], str]):
        self._file, self.path, self._where = file, path, where
        self._place = Lock()  # in the file
        self.nbytes = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER + 1
        if length > min(HEADER, max(0, self.nbytes - 8)):
            raise SavedCacheError(f"{path} is not a saved cache, or is cut in its first bytes: it has {self.nbytes:,}")
        self._start = 8 + length
        header = self._parse(file.read(length))
        text = self._about(header.pop("__metadata__", None))
        self.facts: dict[str, Any] = json.loads(text)
        self.digests: dict[str, str] = self.facts.pop("tensors")
        self.index = header
        if header.keys() != self.digests.keys():
            odd = sorted(header.keys() ^ self.digests.keys())
            raise SavedCacheError(
                f"{path} is damaged: its header and its list of tensors differ in {', '.join(odd[:4])}"
            )
        self._check_places()

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            header = json.loads(raw.decode())
        except (ValueError, RecursionError):
            raise SavedCacheError(f"{self.path} is not a saved cache, or its header is damaged") from None
        if not isinstance(header, dict):
            raise SavedCacheError(f"{self.path} is not a saved cache: its header is a {type(header).__name__}")
        return header

    def _about(self, about: Any) -> str:
        """The facts' text."""
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise SavedCacheError(f"{self.path} is not a saved cache: longwave.save writes those")
        if about.get("version") != VERSION:
            raise SavedCacheError(
                f"{self.path} is a saved cache of format {about.get('version')!r}, and this longwave reads {VERSION}: "
                "read the text again and save it with this one"
            )
        text = about.get("facts")
        if not isinstance(text, str) or _digest("facts", "JSON", [], text.encode("utf-8", "replace")) != about.get(
            "digest"
        ):
            raise SavedCacheError(f"{self.path} is damaged: what it says of itself does not fit its checksum")
        return text

    def _check_places(self) -> None:
        """Tensors lie one behind the other, and fill the file."""
        end, held = 0, self.nbytes - self._start
        for name, entry in self.index.items():
            try:
                dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
                fits = all(type(n) is int and n >= 0 for n in (*shape, first, last))
                size = math.prod(shape) * TYPES[dtype].itemsize
            except (TypeError, KeyError, ValueError):
                raise self._odd(name) from None
            if not fits or first != end or last - first != size or len(entry) != 3:
                raise self._odd(name)
            end = last
            if end > held:
                raise SavedCacheError(
                    f"{self.path} is cut: {self.nbytes:,} bytes are there, and {self.what(name)} ends behind them"
                )
        if end != held:
            raise SavedCacheError(f"{self.path} is damaged: {held - end:,} bytes more than it says follow its end")

    def _odd(self, name: str) -> SavedCacheError:
        return SavedCacheError(f"{self.path} is damaged: its header says odd things of {self.what(name)}")

    def what(self, name: str) -> str:
        try:
            return self._where(name, self.facts)
        except (KeyError, IndexError, ValueError, TypeError):  # the name itself may be damaged
            return name

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the host, in storage of its own; SavedCacheError that says what it is where it is damaged."""
        entry = self.index[name]
        first, last = entry["data_offsets"]
        raw = torch.empty(last - first, dtype=torch.uint8)
        data = raw.numpy().data
        read = self._read(data, self._start + first) if last > first else 0
        if read != last - first or _digest(name, entry["dtype"], entry["shape"], data) != self.digests[name]:
            raise SavedCacheError(
                f"{self.path} is damaged in {self.what(name)}: its checksum does not fit. Read the text again"
            )
        dtype = TYPES[entry["dtype"]]
        return raw.view(dtype).reshape(entry["shape"]) if last > first else torch.empty(entry["shape"], dtype=dtype)

    def _read(self, data: memoryview, start: int) -> int:
        """Fill `data` from byte `start` on, as far as the file goes; how many bytes these are. For several threads."""
        if not hasattr(os, "preadv"):  # Windows
            with self._place:
                self._file.seek(start)
                return int(self._file.readinto(data))  # type: ignore[attr-defined]
        done = 0
        while done < len(data) and (found := os.preadv(self._file.fileno(), [data[done:]], start + done)):
            done += found
        return done

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, their checksums side by side."""
        return dict(zip(self.index, side_by_side(self.tensor, self.index), strict=True))
