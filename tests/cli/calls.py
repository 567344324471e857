"""Calling the commands as a shell does, and what their tests share."""

from typer.testing import CliRunner

from longwave.cli import app

TEXT = "".join(f"Line {i} says that the sky is blue. Does it? It does! " for i in range(40))  # some 2,100 tokens
SEGMENTS = ["-o", "segment=16", "-o", "window=16"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def refused(*arguments):
    """The message of a command that must end with one line for the user."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("longwave: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr
