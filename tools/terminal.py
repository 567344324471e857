"""docs/terminal.svg: the first two commands of README, run, as a terminal shows them: `python tools/terminal.py`."""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools.play_readme import blocks  # noqa: E402


def main() -> None:
    commands = blocks((ROOT / "README.md").read_text(), "sh")[1].splitlines()[:2]
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    longwave = f'longwave() {{ {shlex.quote(sys.executable)} -m longwave.cli "$@"; }}'
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            typed = command.partition("  #")[0].rstrip()
            console.print(Text.assemble(("$ ", "bold green"), (typed, "bold")))
            env = os.environ | {"COLUMNS": "100"}
            done = subprocess.run(
                ["bash", "-ec", f"{longwave}; {typed}"],
                cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
            )  # fmt: skip
            if done.stdout:
                console.print(Text(done.stdout.rstrip()))
    (ROOT / "docs" / "terminal.svg").write_text(console.export_svg(title="longwave"))


if __name__ == "__main__":
    main()
