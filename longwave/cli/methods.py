"""longwave methods: the methods there are, with their options."""

from __future__ import annotations

from longwave.cli.common import Json
from longwave.cli.console import show_json, show_table
from longwave.cli.listing import methods


def command(as_json: Json = False) -> None:
    """The methods there are, and what can be set of each."""
    known = methods()
    if as_json:
        show_json([{"method": name, "what": it.what, "options": it.options} for name, it in known.items()])
    else:
        show_table(
            "methods", ["method", "what", "options"], [[n, m.what, ", ".join(m.options)] for n, m in known.items()]
        )
