"""What pyproject.toml promises: what the core needs, and which extra brings the rest."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import longwave
from longwave.cli.console import EXTRAS
from tests.cli.calls import refused

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}


def test_the_core_answers_without_the_extras(tmp_path):
    """numba, matplotlib, gguf, jieba and accelerate cannot be imported; generate compresses and answers."""
    code = """
import sys
for name in ("numba", "matplotlib", "gguf", "jieba", "accelerate", "rouge", "rouge_score", "pyarrow", "rapidfuzz"):
    sys.modules[name] = None
import torch, longwave
from tests.conftest import build, into
model = build("llama")
memory = longwave.cache(model, longwave.Kivi(group=16, window=16), 0.5)
model.generate(torch.arange(99)[None] % 32, **into(memory), max_new_tokens=4, do_sample=False)
print(memory.report())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "plain torch (numba is not installed: pip install 'longwave[cpu]')" in done.stdout, done.stderr


def test_extras_that_errors_name_are_there():
    extras = PROJECT["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert package.replace("_", "-") in names(extras[extra])
    assert {"cpu", "eval", *EXTRAS.values()} == set(re.findall(r"[\w-]+", extras["all"][0])) - {"longwave"}
    assert not names(PROJECT["dependencies"]) & {"numba", "matplotlib", "gguf", "jieba"}


def test_pictures_without_matplotlib_say_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "longwave.cli.pictures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused("inspect") == "longwave: matplotlib is not installed: pip install 'longwave[plot]'\n"


def test_the_package_says_that_it_is_typed():
    assert (Path(longwave.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("page", ["CITATION.cff", "CHANGELOG.md"])
def test_the_version_is_one(page):
    assert longwave.__version__ in (ROOT / page).read_text()
