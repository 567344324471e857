"""What is found out about a model once: made with a bar of progress, and kept for the next process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm
from transformers import PreTrainedModel


class Kept(Protocol):
    """What has a file."""

    def save(self, path: Path) -> Any: ...


Made = TypeVar("Made", bound=Kept)


def name_of(model: PreTrainedModel) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def made_once(
    make: Callable[[Callable[[int, int], None]], Made], path: Path, says: str, verbs: tuple[str, str, str], unit: str
) -> Made:
    """What `make` makes, given whom to tell (done, total) of its progress, and kept at `path` where the disk allows.

    says: what is said on stderr before. verbs: "measuring", "measured", "measures". unit: of progress.
    """
    doing, done, again = verbs
    began = time.perf_counter()
    print(f"longwave: {says}", file=sys.stderr)
    with tqdm(desc=f"longwave: {doing}", unit=unit, leave=False, disable=None) as bar:

        def advance(so_far: int, total: int) -> None:
            bar.total = total
            bar.update(so_far - bar.n)

        made = make(advance)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)
        where = f"kept in {path}"
    except OSError as error:
        where = f"not kept, so the next process {again} again: {error}"
    print(f"longwave: {done} in {time.perf_counter() - began:.0f} s, {where}", file=sys.stderr)
    return made
