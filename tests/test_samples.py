"""The document that comes with the package."""

from pathlib import Path

import longwave
from tests.cli.calls import succeeds


def test_the_sample_is_text_that_nothing_was_calibrated_on():
    text = longwave.sample()
    assert "John Field" in text
    assert 10_000 < len(text) < 60_000
    calibrated = (Path(longwave.__file__).parent / "plan" / "text").glob("*.txt")
    assert all("John Field" not in path.read_text() for path in calibrated)


def test_the_command_prints_it():
    assert succeeds("sample").stdout == longwave.sample()
