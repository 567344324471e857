import csv
import hashlib
import io
import json
from dataclasses import replace

import pytest

from longwave.checks import read_json
from longwave.evals import data, download
from longwave.evals.download import RECORD, Source, chosen, command_for, prompts, sources
from longwave.evals.tasks import TASKS
from tests.cli.calls import refused, succeeds
from tests.server import serving

PROGRAM = """
def get_sys_prompt(args, file_name):
    if "gsm" in file_name:
        prompt = "Count. "
    elif "exam" in args.metric:
        prompt  = "Choose. "
    else:
        prompt = "Answer. "
    return prompt
"""
MADE = {"'gsm' in file_name": "Count. ", "'exam' in args.metric": "Choose. ", "else": "Answer. "}


def sha(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def site(monkeypatch):
    """A server with the data of two tasks, one file of which is made of what it has."""
    files = {"/a/one.jsonl": b'{"x": 1}\n' * 2000, "/a/code.py": PROGRAM.encode(), "/b/two.json": b"[]"}
    made = (json.dumps(MADE, indent=1) + "\n").encode()
    with serving() as site:
        site.files = files
        one, terms = files["/a/one.jsonl"], "GPL-3.0 (of the repository)"
        known = [
            Source("leval", "leval/closed/one.jsonl", sha(one), len(one), terms, "", "/a/one.jsonl"),
            Source("leval", "leval/prompts.json", sha(made), len(made), "GPL-3.0", "prompts", "/a/code.py"),
            Source("loogle", "loogle/two.json", sha(b"[]"), 2, "MIT", "", "/b/two.json"),
        ]
        known = [replace(source, url=site.url + source.url) for source in known]
        monkeypatch.setattr(download, "sources", lambda: known)
        monkeypatch.setattr("longwave.fetch.time.sleep", lambda seconds: None)
        yield site


def test_fetched_checked_and_recorded(site, tmp_path):
    said = succeeds("eval", "data", "leval", "--out", tmp_path).stdout
    assert (
        said.splitlines()[1]
        == f"leval\t2\t2\t{18000 + len(json.dumps(MADE, indent=1)) + 1:,}\tGPL-3.0 (of the repository) / GPL-3.0"
    )
    assert str(tmp_path) in said
    assert (tmp_path / "leval/closed/one.jsonl").read_bytes() == site.files["/a/one.jsonl"]
    assert read_json(tmp_path / "leval/prompts.json", "prompts") == MADE
    assert not (tmp_path / "loogle").exists()
    succeeds("eval", "data", "--out", tmp_path)
    assert len(site.asked) == 3  # what is there is not asked for again
    recorded = list(csv.reader(io.StringIO((tmp_path / RECORD).read_text()), delimiter="\t"))
    assert [line[0] for line in recorded[1:]] == ["leval/closed/one.jsonl", "leval/prompts.json", "loogle/two.json"]
    assert recorded[1][2] == "GPL-3.0 (of the repository)"
    files = json.loads(succeeds("eval", "data", "--out", tmp_path, "--json").stdout)["files"]
    assert [file["new"] for file in files] == [False] * 3


def test_a_killed_download_goes_on(site, tmp_path):
    site.cuts["/a/one.jsonl"] = [7000, 0, 0]
    assert "7,000 bytes are kept" in refused("eval", "data", "--out", tmp_path)
    site.asked.clear()
    succeeds("eval", "data", "--out", tmp_path)
    assert site.asked[0] == ("/a/one.jsonl", "bytes=7000-")


@pytest.mark.parametrize("name", ["/a/one.jsonl", "/a/code.py"])
def test_another_file_than_was_expected(site, tmp_path, name):
    site.files[name] = site.files[name].replace(b"x", b"y").replace(b"Count", b"Add")
    assert "expected" in refused("eval", "data", "--out", tmp_path)
    assert not any((tmp_path / path).exists() for path in ("leval/prompts.json",))


def test_a_file_of_ones_own_is_left_alone(site, tmp_path):
    own = tmp_path / "loogle" / "two.json"
    own.parent.mkdir()
    own.write_text("mine")
    assert "move it away" in refused("eval", "data", "loogle", "--out", tmp_path)
    assert own.read_text() == "mine"


def test_unknown_tasks(site):
    assert "did you mean 'leval'?" in refused("eval", "data", "level")
    assert "no data to fetch for 'needle'" in refused("eval", "data", "needle")


def test_errors_name_the_command(site, tmp_path):
    with pytest.raises(ValueError, match="`longwave eval data leval` fetches it"):
        data.require(None, "leval", "leval")
    with pytest.raises(ValueError, match="`longwave eval data leval` fetches it"):
        data.require(tmp_path, "leval/prompts.json", "leval")
    with pytest.raises(ValueError, match="ruler needs a data folder with ruler/x: give --data"):
        data.require(None, "ruler/x", "ruler")


def test_what_was_fetched_is_found(site, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGWAVE_HOME", str(tmp_path))
    monkeypatch.delenv("LONGWAVE_DATA", raising=False)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "site-packages/longwave/evals/data.py"))
    assert data.data_folder() is None
    succeeds("eval", "data", "loogle")
    assert data.data_folder() == tmp_path / "data"
    assert data.require(data.data_folder(), "loogle/two.json", "loogle").read_text() == "[]"


def test_a_new_folder_may_be_named_by_the_environment(site, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGWAVE_DATA", str(tmp_path / "new"))
    succeeds("eval", "data", "loogle")
    assert data.data_folder() == tmp_path / "new"


# the table that ships


def test_every_source_is_whole():
    assert len({source.path for source in sources()}) == len(sources())
    for source in sources():
        assert source.task in TASKS
        assert len(source.sha256) == 64
        assert source.bytes > 0
        assert source.licence
        assert source.made in ("", *download.MADE)
        assert source.url.startswith("https://")
        assert any(len(part) == 40 for part in source.url.split("/"))  # at a commit
    assert command_for("longbench/config/dataset2prompt.json") == "longwave eval data longbench"
    assert command_for("longbench/mini") is None
    assert command_for("le") is None
    assert {source.task for source in chosen(["leval"])} == {"leval"}


def test_the_table_says_what_the_data_folder_has():
    """Whoever has the data has the same bytes, packed or not."""
    folder = data.data_folder()
    if folder is None:
        pytest.skip("there is no data folder")
    import gzip

    found = 0
    for source in sources():
        path, packed = folder / source.path, folder / f"{source.path}.gz"
        if path.exists() or packed.exists():
            content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
            assert (sha(content), len(content)) == (source.sha256, source.bytes), source.path
            found += 1
    assert found


def test_prompts_keep_their_order():
    assert list(json.loads(prompts(PROGRAM)).items()) == list(MADE.items())
