"""A method that lies outside the package, in the table of all."""

import json
import sys
from pathlib import Path

import pytest

from longwave.evals.asked import read_method
from longwave.evals.recipe import make_recipe
from longwave.evals.spec import parse_spec
from longwave.methods import METHODS, register_file
from tests.cli.calls import TEXT, refused, succeeds

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mine(tmp_path):
    """The class that docs/design.md prints, as a file of a researcher's; forgotten afterwards."""
    printed = (ROOT / "docs" / "design.md").read_text().partition("```python\n")[2]
    path, before = tmp_path / "researcher.py", dict(METHODS)
    path.write_text(printed.partition("model, tokenizer =")[0])
    yield path
    METHODS.clear()
    METHODS.update(before)
    sys.modules.pop(path.stem, None)


def test_hers_stands_beside_what_was_measured_before(mine, folder, tmp_path):
    hay = tmp_path / "hay.txt"
    hay.write_text(TEXT)
    run = ["eval", "run", "--model", folder, "--out", tmp_path / "out", "--dtype", "float32", "--json"]
    run += ["--task", f"needle:lengths=200,depths=0.1,0.9,haystack={hay}"]
    succeeds(*run, "--method", "dense", "--method", "streaming:window=16,tokens=40")
    assert "unknown method 'keydiff'" in refused(*run, "--method", "keydiff:window=16,tokens=40")
    table = json.loads(succeeds(*run, "--plugin", mine, "--method", "keydiff:window=16,tokens=40").stdout)
    held = {line["method"].partition(":")[0]: line["ratio"] for line in table}
    assert list(held) == ["dense", "streaming", "keydiff"]
    assert held["keydiff"] == pytest.approx(held["streaming"], rel=0.05)
    assert held["keydiff"] < 0.5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.py", None, "no file of methods at"),
        ("mine.txt", "", "its name ends in .py"),
        ("json.py", "", "there is a module 'json' already"),
        ("empty_one.py", "x = 1\n", "registers no method"),
    ],
)
def test_files_that_are_none(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises((OSError, ValueError), match=message):
        register_file(path)
    assert "empty_one" not in sys.modules


def test_the_recipe_of_all_methods_has_all():
    recipe = make_recipe(ROOT / "benchmarks" / "methods.yaml", out="out")
    assert [parse_spec(spec)[0] for spec in recipe.methods] == list(
        dict.fromkeys(parse_spec(s)[0] for s in recipe.methods)
    )
    assert {read_method(spec)[0].name for spec in recipe.methods} == set(METHODS), "a method was added: a line for it"
