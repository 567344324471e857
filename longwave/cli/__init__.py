"""The command line: generate, chat, methods, sample, calibrate, inspect, eval, demo."""

from __future__ import annotations

from typing import Annotated

import typer

from longwave import __version__
from longwave.cli import calibrate, chat, demo, eval, generate, inspect, methods, sample
from longwave.cli.common import WithMethods

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("generate", cls=WithMethods)(generate.command)
app.command("chat", cls=WithMethods)(chat.command)
app.command("methods")(methods.command)
app.command("sample")(sample.command)
app.command("calibrate", cls=WithMethods)(calibrate.command)
app.command("inspect", cls=WithMethods)(inspect.command)
app.add_typer(eval.app, name="eval")
app.command("demo")(demo.command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"longwave {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Long contexts for Hugging Face models inside a memory budget that you name."""
