"""Files from the network: taken up again where a download broke, checked, and whole or not there at all.

Nothing here imports more than the standard library.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

TRIES = 3
PIECE = 2**20
TIMEOUT = 30.0  # seconds without a byte


def cache_folder() -> Path:
    """Where longwave keeps models, profiles and data: $LONGWAVE_HOME, or longwave under the user's cache folder."""
    if home := os.environ.get("LONGWAVE_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longwave"


def opened(url: str, **headers: str) -> http.client.HTTPResponse:
    """An answer to read. Raises OSError (urllib's are) for what is not there or cannot be reached."""
    told = {"User-Agent": "longwave", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return urllib.request.urlopen(urllib.request.Request(url, headers=told), timeout=TIMEOUT)


def fetch(
    url: str, path: Path, sha256: str, advance: Callable[[int, int], None] = lambda done, total: None, wait: float = 1.0
) -> Path:
    """`url` as the file `path`, whose sha256 (hex) is checked. `path` with .part holds what came so far: a later call
    goes on there. advance: told (bytes, bytes in all, 0 where nobody knows). wait: seconds before a second try.

    Raises OSError where it is not there, the network fails for good, or the bytes are others than was expected.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in reversed(range(TRIES)):
        try:
            _more(url, part, advance)
            break
        except urllib.error.HTTPError as error:
            if error.code == 416:  # all of it was there
                break
            raise OSError(f"{url}: {error.code} {error.reason}") from None
        except ssl.SSLCertVerificationError as error:
            raise OSError(f"{url}: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            if not left:
                kept = f"{part.stat().st_size:,} bytes are kept, and a next try goes on there" if part.exists() else ""
                raise OSError(f"{url} broke off ({getattr(error, 'reason', error)}). {kept}".strip()) from None
            time.sleep(wait)
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise OSError(f"{url} has sha256 {found}, expected {sha256}: a broken download or another file")
    part.replace(path)
    return path


def _more(url: str, part: Path, advance: Callable[[int, int], None]) -> None:
    """Append what is missing of `url`, or begin anew where the server gives the whole of it."""
    held = part.stat().st_size if part.exists() else 0
    with opened(url, **({"Range": f"bytes={held}-"} if held else {})) as answer:
        if answer.status != 206:
            held = 0
        coming = int(answer.headers.get("Content-Length") or 0)
        total = held + coming if coming else 0
        with part.open("ab" if held else "wb") as file:
            while piece := answer.read(PIECE):
                file.write(piece)
                held += len(piece)
                advance(held, total)
    if held < total:
        raise http.client.IncompleteRead(b"", total - held)
