import gzip
import json

import pytest

from longwave.evals import data
from longwave.evals.data import data_folder, field, find_records, haystack, read_records, require, texts
from tests.conftest import DATA

RECORDS = [{"a": 1, "text": "one\u2028line\x85"}, {"a": None, "text": "zwei Äpfel"}]


def lines(records=RECORDS):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


# the folder


def test_a_given_folder_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGWAVE_DATA", "/nowhere")
    assert data_folder(tmp_path) == tmp_path


def test_the_named_folder_comes_next(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGWAVE_DATA", str(tmp_path))
    assert data_folder() == tmp_path


def test_folder_beside_the_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("LONGWAVE_DATA", raising=False)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "checkout" / "longwave" / "evals" / "data.py"))
    assert data_folder() is None
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert data_folder() == tmp_path / "shared" / "data"


def test_missing_folders(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"there is no data folder .*absent"):
        data_folder(tmp_path / "absent")
    monkeypatch.setenv("LONGWAVE_DATA", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"there is no data folder .*gone, which LONGWAVE_DATA names"):
        data_folder()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="there is no data folder"):
        data_folder(tmp_path / "file")


def test_require(tmp_path):
    (tmp_path / "sub").mkdir()
    assert require(tmp_path, "sub", "a task") == tmp_path / "sub"
    with pytest.raises(ValueError, match=r"a task needs .*/sub/x.txt, which does not exist: is --data"):
        require(tmp_path, "sub/x.txt", "a task")
    with pytest.raises(ValueError, match=r"a task needs a data folder with sub/x.txt: give --data FOLDER"):
        require(None, "sub/x.txt", "a task")


# records


def test_every_format_reads_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    array = json.dumps(RECORDS).encode()
    contents = {
        ".jsonl": lines(),
        ".json": array,
        ".jsonl.gz": gzip.compress(lines()),
        ".json.gz": gzip.compress(array),
    }
    for ending, content in contents.items():
        (tmp_path / f"set{ending}").write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "set.parquet")
    for ending in data.FORMATS:
        assert read_records(tmp_path / f"set{ending}") == RECORDS, ending


@pytest.mark.parametrize("ending", data.FORMATS)
def test_find_records(tmp_path, ending):
    (tmp_path / "other.jsonl").touch()
    assert find_records(tmp_path, "set") is None
    (tmp_path / f"set{ending}").touch()
    assert find_records(tmp_path, "set") == tmp_path / f"set{ending}"


def test_blank_lines_and_carriage_returns(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert read_records(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines() + b'\n{"a": ', r"a\.jsonl:4 is not JSON: "),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2 is not a record but list"),
        ("a.jsonl", b'{"a": "caf\xe9"}\n', r"a\.jsonl is not UTF-8 text"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', r"a\.json:2 is not JSON: "),
        ("a.json", b'{"a": 1}', r"a\.json is not a list of records"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json is not a list of records"),
        ("a.json", b"", r"a\.json:1 is not JSON"),
        ("a.jsonl.gz", lines(), r"cannot read .*a\.jsonl\.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(lines(), mtime=0)[:-9], r"cannot read .*a\.jsonl\.gz"),
        ("a.jsonl.gz", gzip.compress(lines(), mtime=0)[:12] + b"\xff" * 30, r"cannot read .*a\.jsonl\.gz"),
        ("a.jsonl.gz", gzip.compress(b"{", mtime=0), r"a\.jsonl\.gz:1 is not JSON"),
        ("a.parquet", b"PAR1 no PAR1", r"a\.parquet is not a readable Parquet file"),
    ],
)
def test_broken_records(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name)


def test_missing_records(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*absent\.jsonl"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="there is no file"):
        read_records(tmp_path)


def test_field():
    assert field({"a": None}, "a", "x:1") is None
    with pytest.raises(ValueError, match="x:1 has no field 'b'; it has a, c"):
        field({"a": 1, "c": 2}, "b", "x:1")
    with pytest.raises(ValueError, match="it has none"):
        field({}, "b", "x:1")
    with pytest.raises(ValueError, match=r"x:1 has no field 'b': it is \['a'\]"):
        field(["a"], "b", "x:1")


# prose


def test_haystacks(tmp_path):
    (tmp_path / "haystack_pd").mkdir()
    for name, text in (("b.txt", "Second."), ("a.txt", "Fïrst."), ("c.md", "No.")):
        (tmp_path / "haystack_pd" / name).write_text(text, encoding="utf-8")
    assert haystack("essays", tmp_path) == "Fïrst.\n\nSecond."
    assert haystack(str(tmp_path / "haystack_pd" / "c.md"), None) == "No."
    assert haystack("pydoc", None) == data.pydoc_haystack()
    assert len(data.pydoc_haystack()) > 300_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("essays", r'haystack "essays" \(or take haystack=pydoc, .*\) needs a data folder with haystack_pd'),
        ("esays", "there is no file 'esays'"),
        (5, "there is no file 5"),
        (("a", "b.txt"), r"there is no file \('a', 'b.txt'\)"),
    ],
)
def test_missing_haystacks(name, message):
    with pytest.raises(ValueError, match=message):
        haystack(name, None)


@pytest.mark.parametrize("name", ["folder", "folder/a.txt"])
def test_prose_that_is_not_text(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"folder/a\.txt is not UTF-8 text"):
        texts(str(tmp_path / name), None)
    if name.endswith("txt"):
        with pytest.raises(ValueError, match=r"folder/a\.txt is not UTF-8 text"):
            haystack(str(tmp_path / name), None)


def test_texts(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(f"text of {name}")
    both = {"a.txt": "text of a.txt", "b.txt": "text of b.txt"}
    assert texts(str(tmp_path), None) == both
    assert list(texts(str(tmp_path), None)) == list(both)
    assert texts(str(tmp_path / "c.md"), None) == {"c.md": "text of c.md"}
    assert texts("pydoc", None) == {"pydoc": data.pydoc_haystack()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pg91", "text is one of pg19, wikitext2, mixed, pydoc, a file or a folder; there is no 'pg91'"),
        ("pg19", "needs a data folder with books/test_pg19"),
        (7, "there is no 7"),
    ],
)
def test_missing_texts(name, message):
    with pytest.raises(ValueError, match=message):
        texts(name, None)


def test_folder_without_texts(tmp_path):
    with pytest.raises(ValueError, match=r"there are no \.txt files in"):
        texts(str(tmp_path), None)


@pytest.mark.skipif(not DATA.exists(), reason="the evaluation data is not here")
def test_the_known_names_are_in_the_data_folder():
    assert len(haystack("essays", DATA)) > 100_000
    assert len(texts("pg19", DATA)) == 7
    assert list(texts("wikitext2", DATA)) == ["wiki.test.raw"]
    assert set(texts("mixed", DATA)) > set(texts("pg19", DATA))
