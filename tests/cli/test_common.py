import json
import subprocess
import sys

import pytest

from longwave.cli.common import first_line, options_of, parse_options
from longwave.methods import METHODS
from tests.cli.calls import call, succeeds


def test_options_are_literals_or_text():
    items = ["segment=512", "keep=(0.1, 0.4)", "gain=None", "basis=dct", "a==b", "quota=head", "x="]
    assert parse_options(items) == {
        **{"segment": 512, "keep": (0.1, 0.4), "gain": None, "basis": "dct"},
        **{"a": "=b", "quota": "head", "x": ""},
    }
    assert parse_options(None) == {}


def test_no_command_shows_help():
    result = call("--help")
    assert result.exit_code == 0
    for command in ("generate", "calibrate", "inspect", "eval", "demo"):
        assert command in result.stdout


@pytest.mark.parametrize("command", ["generate", "calibrate", "inspect"])
def test_help_lists_the_methods(command):
    shown = " ".join(succeeds(command, "--help").stdout.split())
    for name, cls in METHODS.items():
        said = f"{name}: {first_line(cls)} Options: {', '.join(options_of(cls)) or 'none'}."
        assert " ".join(said.split()) in shown


def test_every_method_says_what_it_is_in_one_line():
    for name, cls in METHODS.items():
        assert first_line(cls).endswith("."), name
        assert not first_line(cls).startswith(cls.__name__ + "("), f"{name} has only the docstring dataclass gives"


def test_the_command_line_starts_without_torch():
    code = """
import json, sys
from longwave.cli import app
print(json.dumps([name for name in ("torch", "transformers", "matplotlib", "numpy") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "longwave.cli", "--help"], capture_output=True, text=True, check=True)
    assert "Answer a prompt" in done.stdout
