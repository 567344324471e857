"""Install PyTorch into this environment without pulling gigabytes of CUDA onto a machine that has no GPU.

    python tools/install_torch.py torch==2.13.0 https://download.pytorch.org/whl/cpu

On PyPI the Linux build of torch brings CUDA with it. The "+cpu" build is never on PyPI, so asking for it by name can
only succeed where pip has been given one, or with PyTorch's own index.
"""

import importlib.util
import platform
import shutil
import subprocess
import sys


def pip(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print("\n".join(done.stderr.splitlines()[-2:]), file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    requirement, index = sys.argv[1:]
    if importlib.util.find_spec("torch"):
        return
    if platform.system() == "Darwin" or shutil.which("nvidia-smi"):  # one build for all Macs; a GPU wants its CUDA
        done = pip(requirement)
    else:
        cpu = f"{requirement}+cpu" if "==" in requirement and "+" not in requirement else requirement
        done = pip(cpu) or pip(cpu, "--extra-index-url", index)
    if not done:
        sys.exit(
            f"could not install {requirement} for {platform.platform()}, Python {platform.python_version()}: install "
            "PyTorch for this machine yourself (pytorch.org), then run make again with VENV=<that environment>"
        )


if __name__ == "__main__":
    main()
