import json
import subprocess
import sys

import pytest

from longwave.checks import nearest, read_json, read_text, whole


def test_nearest():
    assert nearest("nedle", ["needle", "ruler"]) == "did you mean 'needle'?"
    assert nearest("zzz", ["needle", "ruler"]) == "choose from needle, ruler"
    assert nearest("zzz", iter(["needle"])) == "choose from needle"
    assert nearest("zzz", []) == "choose from none"


def test_whole_numbers_come_back():
    assert whole("batch", 8, 1) == 8
    assert whole("sinks", 0, 0, "tokens") == 0
    assert whole("seed", -3, None) == -3


@pytest.mark.parametrize("value", [0, -1, True, 1.0, 2.5, "3", None, (1,)], ids=repr)
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError) as error:
        whole("batch", value, 1)
    assert str(error.value) == f"batch is a whole number, at least 1; got {value!r}"


def test_units_and_bounds_are_named():
    with pytest.raises(ValueError, match=r"^segment is a whole number of tokens, at least 8; got 7$"):
        whole("segment", 7, 8, "tokens")
    with pytest.raises(ValueError, match=r"^seed is a whole number; got False$"):
        whole("seed", False, None)


def test_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("zwei Äpfel\n".encode())
    assert read_text(path) == read_text(path, blank=False) == "zwei Äpfel\n"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text$"):
        read_text(path)


def test_blank_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" \n")
    assert read_text(path) == " \n"
    with pytest.raises(ValueError, match=r"a\.txt is empty$"):
        read_text(path, blank=False)


def test_what_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(OSError, match=path.name):
            read_text(path)


def test_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"ä": 1}', encoding="utf-8")
    assert read_json(path, "a recipe") == {"ä": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a"', r"a\.json:2 is not JSON: "),
        (b"", r"a\.json:1 is not JSON: "),
        (b"\xff", r"a\.json is not UTF-8 text"),
        (b"[1]", r"a\.json is not a recipe: it holds a list, not an object"),
        (b"[" * 100_000, r"a\.json is nested too deeply"),
    ],
    ids=["half", "empty", "not UTF-8", "a list", "deep"],
)
def test_broken_json(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(tmp_path / "a.json", "a recipe")
    assert "\n" not in str(error.value)


def test_nothing_heavy_is_imported():
    code = "import json, sys, longwave.checks; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    foreign = {name for name in json.loads(found) if name not in sys.stdlib_module_names}
    assert not foreign & {"torch", "transformers", "numpy", "typer"}
