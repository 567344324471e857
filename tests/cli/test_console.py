"""What the commands show on a terminal, and how they end."""

import os
import pty
import re
import signal
import subprocess
import sys

import pytest
import typer

from longwave.cli.console import user_errors

ROW = ["needle:lengths=1000", "all", "fourier:budget=0.25", "0.332", "0.210..0.440", "88", "0.223"]
COLUMNS = ["task", "set", "method", "score", "95 %", "samples", "bytes ratio"]


def on_terminal(code, width, **environment):
    """What a program prints on a terminal of a width."""
    ours, theirs = pty.openpty()
    known = {**os.environ, "COLUMNS": str(width), "TERM": "xterm-256color", **environment}
    known = {name: value for name, value in known.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=known, timeout=60)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # all is read
        pass
    os.close(ours)
    assert done.returncode == 0, shown.decode()
    return shown.decode().replace("\r\n", "\n")


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


TABLE = f"from longwave.cli.console import show_table; show_table('results', {COLUMNS}, [{ROW}, {ROW}])"


@pytest.mark.parametrize("width", [40, 60, 100, 140])
def test_tables_fit_the_terminal_and_lose_no_word(width):
    shown = plain(on_terminal(TABLE, width))
    assert all(len(line) <= width for line in shown.splitlines())
    assert "…" not in shown
    for cell in ROW:
        assert shown.count(cell) == 2


def test_long_cells_fold():
    words = " ".join(f"word{i}" for i in range(30))
    code = f"from longwave.cli.console import show_table; show_table('t', ['name', 'what'], [['x', {words!r}]])"
    shown = plain(on_terminal(code, 40))
    assert all(len(line) <= 40 for line in shown.splitlines())
    assert all(f"word{i}" in shown for i in range(30))


def test_no_color():
    code = "from longwave.cli import app; app(['--help'], standalone_mode=False)"
    colours = re.compile(r"\x1b\[[0-9;]*3[0-7][0-9;]*m")
    assert colours.search(on_terminal(code, 80, NO_COLOR=None))
    assert not colours.search(on_terminal(code, 80, NO_COLOR="1"))


@pytest.fixture
def interruptible():
    """Python leaves the signal alone where whoever started it has it ignored, as a shell does in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_says_how_to_go_on(capsys, interruptible):
    with pytest.raises(typer.Exit) as end, user_errors("what was measured is kept"):
        signal.raise_signal(signal.SIGINT)
    assert end.value.exit_code == 130
    assert capsys.readouterr().err == "\nlongwave: stopped; what was measured is kept\n"


def test_a_reader_that_closes_the_pipe_is_no_error():
    """More than a pipe holds, so that the writer is still at it."""
    code = """
from typer import Typer
from longwave.cli.console import show_json, user_errors
app = Typer()
@app.command()
def command():
    with user_errors():
        show_json("x" * 1_000_000)
app()
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer.stdout.read(10)
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait() == 1
    writer.stderr.close()
