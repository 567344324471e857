import json
import re
from pathlib import Path

import pytest

from longwave.evals.header import FIXED
from longwave.evals.results import Results, load, merge
from tests.evals.test_results import contents, header, row


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("name", FIXED)
def test_runs_that_cannot_be_compared_share_no_folder(out, name):
    Results.open(out, header()).append([row("a")])
    (out / ".lock").unlink()  # as in a folder that was copied
    before = contents(out)
    with pytest.raises(ValueError) as error:
        Results.open(out, header(**{name: "another"}))
    expected = (
        "other weights under the same name tiny" if name == "signature" else f"{name} {header().get(name)!r}, not 'a"
    )
    assert f"{out} holds results of {expected}" in str(error.value)
    assert "name another folder, nothing was overwritten" in str(error.value)
    assert contents(out) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": {"dense": "dense(more)"}},
        {"tasks": {"echo": {"name": "echo", "version": 2, "options": {"n": [1]}}}},
        {"tasks": {"echo": {"name": "echo", "version": 1, "options": {"n": [2]}}}},
    ],
)
def test_a_label_means_one_thing(out, changes):
    Results.open(out, header()).append([row("a")])
    before = contents(out)
    with pytest.raises(ValueError, match="with other settings or another version"):
        Results.open(out, header(**changes))
    assert contents(out) == before


def test_methods_and_tasks_join_and_earlier_commands_stay(out):
    Results.open(out, header()).append([row("a")])
    lines = (out / "samples.jsonl").read_bytes()
    more = {"methods": {"fourier": "f"}, "tasks": {"other": header()["tasks"]["echo"]}, "runs": [{"command": "second"}]}
    results = Results.open(out, header(**more))
    results.append([row("a", "fourier")])
    joined = load(out).header
    assert joined["methods"] == {"dense": "dense()", "fourier": "f"}
    assert list(joined["tasks"]) == ["echo", "other"]
    assert [run["command"] for run in joined["runs"]] == ["first", "second"]
    assert (out / "samples.jsonl").read_bytes().startswith(lines)


def test_tuples_in_a_header_equal_what_is_read_back(out):
    written = header(tasks={"echo": {"name": "echo", "version": 1, "options": {"n": ((1, 2), 3)}}})
    Results.open(out, written)
    Results.open(out, written)
    assert len(load(out).header["runs"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not readable"),
        (b'{"format": "longwave-eval", ', "is not readable"),
        (b"\xff\xfe", "is not readable"),
        (b"[]", "is not of longwave eval"),
        (b'{"format": "other"}', "is not of longwave eval"),
        (json.dumps(header(version=2)).encode(), "has format version 2; this longwave reads 1"),
        (b'{"format": "longwave-eval", "version": 1}', "is damaged, it has no methods"),
        (json.dumps(header(tasks=[])).encode(), "is damaged, it has no tasks"),
        (json.dumps(header(runs=None)).encode(), "is damaged, it has no runs"),
    ],
)
def test_a_damaged_header(out, content, message):
    Results.open(out, header()).append([row("a")])
    (out / "run.json").write_bytes(content)
    before = contents(out)
    for read in (lambda: Results.open(out, header()), lambda: load(out), lambda: merge([out])):
        with pytest.raises(ValueError, match=re.escape(str(out / "run.json")) + ".*" + message):
            read()
    assert contents(out) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "it has no model"),
        ({"seed": "42"}, "it has no seed"),
        ({"question": ["after"]}, "it has no question"),
        ({"window": [512]}, "it has no number of tokens as window"),
        ({"tasks": {"echo": "echo"}}, "it has no name, version and options of task 'echo'"),
        ({"tasks": {"echo": {"name": "echo", "version": 1}}}, "it has no name, version and options of task 'echo'"),
        ({"samples": {"echo": 5}}, "it has no counts of samples of 'echo'"),
        ({"runs": ["first"]}, "it has no commands of its runs"),
        ({"runs": [{"command": 5}]}, "it has no commands of its runs"),
    ],
    ids=str,
)
def test_a_header_without_what_a_report_reads(out, changes, message):
    Results.open(out, header()).append([row("a")])
    (out / "run.json").write_text(json.dumps(header(**changes)))
    for read in (lambda: load(out), lambda: merge([out])):
        with pytest.raises(ValueError, match=re.escape(str(out / "run.json")) + " is damaged, " + message):
            read()


def test_a_process_killed_while_it_writes_the_header_leaves_the_old_one(out, monkeypatch):
    Results.open(out, header()).append([row("a")])

    def killed(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Results.open(out, header(runs=[{"command": "second"}]))
    assert load(out).header == header()
    Results.open(out, header(runs=[{"command": "third"}]))
    assert [run["command"] for run in load(out).header["runs"]] == ["first", "third"]
