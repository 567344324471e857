"""longwave sample: a text to try the other commands on."""

from __future__ import annotations

import sys

from longwave.cli.console import user_errors
from longwave.samples import sample


def command() -> None:
    """Print a document to try things on: a chapter of Walden, in the public domain."""
    with user_errors():
        sys.stdout.write(sample())
