from pathlib import Path

import longwave
from longwave.cli.listing import from_source, methods
from longwave.methods import METHODS


def test_source_says_what_importing_says():
    read = from_source(Path(longwave.__file__).parent / "methods")
    assert read == methods()
    assert list(read) == list(METHODS)


def test_a_registered_method_is_listed(monkeypatch):
    class Own(longwave.Dense):
        """One's own."""

        name = "own"

    monkeypatch.setitem(METHODS, "own", Own)
    assert methods()["own"].what == "One's own."
