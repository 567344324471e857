"""Play README.md as a stranger would: clone, install, the python block, the commands; an empty home, nothing else.

    python tools/play_readme.py            # of the checkout that it lies in, as committed

Blocks marked `sh` are typed as they stand, the first to install, the others with env/bin on the path; the python block
is run; the `text` block beneath it says what has to come out, "..." for any rest. A command that fails, a line on
stderr with "warning" in it, or another answer ends with exit code 1. The last line is JSON: seconds and megabytes.
What it installs from is pip's own business, as PIP_... of the environment says.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def promised(lines: str, out: str) -> bool:
    """Whether the lines are the beginning of what came out, "..." standing for any rest of a line."""
    came = out.splitlines()
    wanted = [re.escape(line).replace(r"\.\.\.", ".*") for line in lines.splitlines()]
    return len(came) >= len(wanted) and all(re.fullmatch(w, c) for w, c in zip(wanted, came, strict=False))


def megabytes(folder: Path) -> int:
    """What the files of a folder take on disk, those that are linked once."""
    files = {(s.st_dev, s.st_ino): s.st_blocks * 512 for f in folder.rglob("*") if (s := f.lstat())}
    return round(sum(files.values()) / 1e6)


class Terminal:
    """A shell in the clone with an empty home. `problems` has what a reader would trip over."""

    def __init__(self, folder: Path, home: Path):
        self.folder, self.problems = folder, []
        python = Path(sys.base_prefix) / "bin"
        self.env = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "LANG"))}
        self.env |= {"HOME": str(home), "PATH": f"{python}:/usr/bin:/bin"}

    def type(self, command: str, stdin: str | None = None) -> tuple[str, float]:
        """What a command says, and the seconds it took."""
        print(f"$ {(stdin and 'python') or command}", flush=True)
        began = time.perf_counter()
        done = subprocess.run(
            ["bash", "-ec", command], cwd=self.folder, env=self.env, input=stdin, capture_output=True, text=True
        )
        seconds = time.perf_counter() - began
        print(done.stdout[:2000], done.stderr[-2000:], f"# {seconds:.1f} s", sep="\n", flush=True)
        if done.returncode:
            self.problems.append(f"{command!r} ended with {done.returncode}")
        self.problems += [line for line in done.stderr.splitlines() if "warning" in line.lower()]
        return done.stdout, seconds


def play(work: Path) -> dict[str, object]:
    clone, home = work / "longwave", work / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", "--no-local", str(REPOSITORY), str(clone)], check=True)
    text = (clone / "README.md").read_text()
    install, *commands = blocks(text, "sh")
    (code,), (answer,) = blocks(text, "python"), blocks(text, "text")
    terminal = Terminal(clone, home)
    # where pip looks is no matter of README's
    terminal.env["PIP_DISABLE_PIP_VERSION_CHECK"] = terminal.env["PIP_QUIET"] = "1"
    found: dict[str, object] = {"install_seconds": round(sum(terminal.type(line)[1] for line in install.splitlines()))}
    found["install_megabytes"] = megabytes(clone / "env")
    terminal.problems = [problem for problem in terminal.problems if "is ignored: it is neither a file" not in problem]
    terminal.env["PATH"] = f"{clone / 'env' / 'bin'}:{terminal.env['PATH']}"
    for name in ("first", "second"):
        out, seconds = terminal.type("python -", code)
        found[f"{name}_answer_seconds"] = round(seconds)
        if not promised(answer, out):
            terminal.problems.append(f"the python block printed {out!r}")
    found["model_megabytes"] = megabytes(home)
    for line in "\n".join(commands).splitlines():
        out, _ = terminal.type(line)
        if "generate" in line and not out.startswith(answer.splitlines()[0]):
            terminal.problems.append(f"{line!r} answered {out!r}")
    return found | {"problems": terminal.problems}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="readme-") as work:
        found = play(Path(work))
    print(json.dumps(found))
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
