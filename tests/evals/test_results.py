import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longwave.evals import causal, runner
from longwave.evals import results as module
from longwave.evals.results import Results, key_of, load, merge
from longwave.evals.tasks import Needle
from tests.cli.calls import TEXT, call, refused, succeeds
from tests.conftest import build

TASK = "needle:lengths=180,200,depths=0.1,0.9,haystack={}"
MANY = "needle:lengths=180,200,depths=0,0.1,0.2,0.4,0.6,0.8,0.9,1,haystack={}"


def header(**changes):
    return {
        **{"format": "longwave-eval", "version": 1, "model": "tiny", "signature": "ab", "dtype": "float32"},
        **{"seed": 42, "question": "after", "chat": True, "chat_template": None, "max_tokens": None},
        **{"methods": {"dense": "dense()"}, "tasks": {"echo": {"name": "echo", "version": 1, "options": {"n": [1]}}}},
        **{"runs": [{"command": "first"}], **changes},
    }


def row(sample, method="dense", task="echo", **changes):
    return {
        **{"task": task, "method": method, "id": sample, "prompt": f"hash of {sample}", "meta": {"length": 5}},
        **{"output": "Äpfel\nund \u2028", "score": 0.5, "metrics": {"loss": 0.25}, "bytes": 10, "dense_bytes": 20},
        **changes,
    }


def contents(folder):
    """Every file of a folder and what is in it."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder):
    """The lines of samples.jsonl, every one of which has to be whole."""
    text = (folder / "samples.jsonl").read_bytes()
    assert text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def measured(rows):
    """What two runs must agree on."""
    kept = {key_of(r): {name: value for name, value in r.items() if not name.endswith("_seconds")} for r in rows}
    assert len(kept) == len(rows), "a sample is there twice"
    return kept


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# rows


def test_rows_are_appended_once_and_read_back(out):
    results = Results.open(out, header())
    assert results.append([row("a"), row("b")]) == 2
    assert results.append([row("b"), row("c")]) == 1
    assert results.append([row("a")]) == 0
    assert results.append([]) == 0
    assert [r["id"] for r in rows_of(out)] == ["a", "b", "c"]
    assert load(out).rows == [row("a"), row("b"), row("c")]
    assert load(out).problems == []
    assert Results.open(out, header()).done == results.done == {("echo", "dense", x): f"hash of {x}" for x in "abc"}


def test_a_missing_folder_is_made_with_its_header_and_no_rows(tmp_path):
    out = tmp_path / "deep" / "down"
    results = Results.open(out, header())
    assert load(out).header == header()
    assert load(out).rows == []
    assert results.done == {}
    assert not (out / "samples.jsonl").exists()


def test_what_is_not_finite_becomes_null(out):
    results = Results.open(out, header())
    bad = row("a", score=float("nan"), metrics={"loss": float("inf"), "kl": 1.5}, curve={"loss": [1.0, float("-inf")]})
    results.append([bad, row("b")])
    text = (out / "samples.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    first, second = load(out).rows
    assert first == {**bad, "score": None, "metrics": {"loss": None, "kl": 1.5}, "curve": {"loss": [1.0, None]}}
    assert second == row("b")
    assert Results.open(out, header()).done.keys() == {key_of(bad), key_of(row("b"))}


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b'{"task": "echo", "method": "dense", "id": "b", ',
        b"[1, 2]",
        b'"text"',
        b"null",
        b"3",
        b"{}",
        b"\xff\xfe\x00\x80",
        b"\x00\x00\x00\x00",
        json.dumps(row("b", score="0.5")).encode(),
        json.dumps(row("b", score=float("nan"))).encode(),
        json.dumps(row("b", task=["echo"])).encode(),
        json.dumps(row("b", meta=None)).encode(),
        json.dumps(row("b", metrics={"loss": "0.25"})).encode(),
        json.dumps(row("b", metrics={"kl": float("inf")})).encode(),
        json.dumps(row("b", curve={"loss": 0.25})).encode(),
        json.dumps(row("b", curve={"loss": [0.25, "0.5"]})).encode(),
        json.dumps(row("b", rows=0)).encode(),
        json.dumps(row("b", dense_bytes=0)).encode(),
        json.dumps(row("b", scored=[128])).encode(),
        json.dumps(row("b", prefill_seconds=None)).encode(),
        json.dumps({name: value for name, value in row("b").items() if name != "prompt"}).encode(),
        json.dumps({name: value for name, value in row("b").items() if name != "score"}).encode(),
        json.dumps({name: value for name, value in row("b").items() if name != "bytes"}).encode(),
        json.dumps(row("b"), ensure_ascii=False).encode("latin-1", errors="replace"),
    ],
)
def test_a_line_that_is_no_result_is_reported_and_measured_again(out, line):
    results = Results.open(out, header())
    results.append([row("a"), row("c")])
    first, last = (out / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (out / "samples.jsonl").write_bytes(first + line + b"\n" + last)
    again = Results.open(out, header())
    problem = f"{out / 'samples.jsonl'}, line 2: not a result, ignored (its sample will be measured again)"
    assert again.problems == load(out).problems == [problem]
    assert [r["id"] for r in load(out).rows] == ["a", "c"]
    assert again.append([row("a"), row("b"), row("c")]) == 1
    assert again.problems == [problem]
    assert [r["id"] for r in load(out).rows] == ["a", "c", "b"]
    assert (out / "samples.jsonl").read_bytes().startswith(first + line + b"\n" + last), "nothing is taken away"


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_half_a_line_at_the_end(out, kept):
    Results.open(out, header()).append([row("a"), row("b")])
    whole = (out / "samples.jsonl").read_bytes()
    first, last = whole.splitlines(keepends=True)
    (out / "samples.jsonl").write_bytes(first + last[:kept])
    results = Results.open(out, header())
    assert [problem.split(": ")[0] for problem in results.problems] == [f"{out / 'samples.jsonl'}, line 2"]
    assert results.append([row("b"), row("c")]) == 2
    assert len(results.problems) == 1
    assert (out / "samples.jsonl").read_bytes().split(b"\n")[:2] == [first.strip(), last[:kept]]
    assert [r["id"] for r in load(out).rows] == ["a", "b", "c"]
    assert [problem.split(": ")[0] for problem in load(out).problems] == [f"{out / 'samples.jsonl'}, line 2"]


def test_a_last_line_that_only_lacks_its_end_counts(out):
    Results.open(out, header()).append([row("a"), row("b")])
    whole = (out / "samples.jsonl").read_bytes()
    (out / "samples.jsonl").write_bytes(whole[:-1])
    results = Results.open(out, header())
    assert results.problems == []
    assert results.append([row("b"), row("c")]) == 1
    assert [r["id"] for r in rows_of(out)] == ["a", "b", "c"]


def test_line_numbers_hold_after_several_refreshes(out):
    def damage(text):
        with (out / "samples.jsonl").open("ab") as file:
            file.write(text)

    reader, writer = Results.open(out, header()), Results.open(out, header())
    writer.append([row("a"), row("b")])
    damage(b"one\n")  # line 3
    reader.refresh()
    writer.append([row("c")])  # line 4
    damage(b"\n\ntwo")  # line 7, half of it
    reader.refresh()
    reader.refresh()
    writer.append([row("d")])  # line 8
    damage(b"\xff\n")  # line 9
    reader.refresh()
    expected = [f"{out / 'samples.jsonl'}, line {number}" for number in (3, 7, 9)]
    assert [problem.split(": ")[0] for problem in reader.problems] == expected
    assert [problem.split(": ")[0] for problem in load(out).problems] == expected
    assert [key[2] for key in reader.done] == ["a", "b", "c", "d"]
    writer.refresh()
    assert writer.problems == reader.problems


def test_of_two_lines_of_one_sample_the_first_counts(out):
    results = Results.open(out, header())
    results.append([row("a", score=0.1)])
    with (out / "samples.jsonl").open("a") as file:
        file.write(json.dumps(row("a", score=0.9)) + "\n")
    assert [r["score"] for r in load(out).rows] == [0.1]


def test_another_prompt_is_refused_whatever_the_method(out):
    results = Results.open(out, header())
    results.append([row("a")])
    assert results.check_prompt(("echo", "dense", "a"), "hash of a")
    assert not results.check_prompt(("echo", "fourier", "a"), "hash of a")
    assert not results.check_prompt(("echo", "dense", "b"), "anything")
    assert not results.check_prompt(("other", "dense", "a"), "anything")
    for method in ("dense", "fourier"):
        with pytest.raises(ValueError, match="holds sample a of echo measured on another prompt: data or tokenizer"):
            results.check_prompt(("echo", method, "a"), "changed")


def test_leftovers_of_a_process_killed_at_its_start_do_not_matter(out):
    out.mkdir()
    (out / ".lock").touch()
    (out / "run.tmp").write_text('{"form')
    Results.open(out, header())
    assert load(out).header == header()


@pytest.mark.parametrize("name", ["notes.txt", "samples.jsonl", ".hidden", "sub/file"])
def test_a_folder_of_something_else(out, name):
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine\n")
    before = contents(out)
    with pytest.raises(ValueError, match="is not empty and holds no results of longwave eval: name another folder"):
        Results.open(out, header())
    assert contents(out) == before


def test_a_file_and_an_empty_folder(out, tmp_path):
    out.write_text("mine")
    with pytest.raises(ValueError, match="is a file: name a folder for the results"):
        Results.open(out, header())
    assert out.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    Results.open(tmp_path / "empty", header())
    assert load(tmp_path / "empty").header == header()


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results: there is no run\.json in it"):
        load(tmp_path)


# several folders


def test_merge(tmp_path):
    Results.open(tmp_path / "a", header()).append([row("a"), row("b")])
    more = header(methods={"fourier": "f"}, runs=[{"command": "second"}])
    Results.open(tmp_path / "b", more).append([row("a", "fourier"), row("b", score=0.75)])
    with (tmp_path / "b" / "samples.jsonl").open("a") as file:
        file.write("half")
    whole = merge([tmp_path / "a", tmp_path / "b"])
    assert whole.rows == [row("a"), row("b"), row("a", "fourier")]
    assert whole.header["methods"] == {"dense": "dense()", "fourier": "f"}
    assert [run["command"] for run in whole.header["runs"]] == ["first", "second"]
    assert len(whole.problems) == 1
    assert whole.problems[0].startswith(f"{tmp_path / 'b' / 'samples.jsonl'}, line 3")
    assert merge([tmp_path / "a"]) == load(tmp_path / "a")
    three = merge(iter([tmp_path / "a", tmp_path / "b", tmp_path / "a"]))
    assert three.rows == whole.rows


def test_folders_that_do_not_go_together(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    Results.open(a, header()).append([row("a")])
    Results.open(b, header(seed=43))
    with pytest.raises(ValueError) as error:
        merge([a, b])
    assert str(error.value) == f"{b} does not go with {a}, which holds results of seed 42, not 43"
    Results.open(c, header(methods={"fourier": "f"})).append([row("a", "fourier", prompt="changed")])
    with pytest.raises(ValueError, match="sample a of echo has another prompt"):
        merge([a, c])
    with pytest.raises(ValueError, match="holds no results"):
        merge([a, tmp_path / "absent"])


# at once


def threads(count, work):
    """Run work(number) in threads that start together; a lock of its own in each is a lock between processes."""
    start, failed = threading.Barrier(count), []

    def guarded(number):
        try:
            start.wait()
            work(number)
        except BaseException as error:
            failed.append(error)

    all_threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in all_threads:
        thread.start()
    for thread in all_threads:
        thread.join()
    assert failed == []


def test_many_open_a_new_folder_at_once(out):
    threads(8, lambda n: Results.open(out, header(methods={f"m{n}": "m"}, runs=[{"command": str(n)}])))
    found = load(out).header
    assert sorted(found["methods"]) == [f"m{n}" for n in range(8)]
    assert sorted(run["command"] for run in found["runs"]) == list("01234567")


def test_many_append_at_once(out, monkeypatch):
    real = module.jsonable
    monkeypatch.setattr(module, "jsonable", lambda row: time.sleep(0.001) or real(row))  # others get their turn
    long = "x" * 20_000  # more than any buffer
    wrote = []

    def work(number):
        results = Results.open(out, header())
        names = list(range(40))
        random.Random(number).shuffle(names)
        for first in range(0, 40, 4):
            wrote.append(results.append([row(str(n), output=long) for n in names[first : first + 4]]))
        assert len(results.done) == 40
        assert results.problems == []

    threads(4, work)
    assert sum(wrote) == 40
    assert sorted(int(r["id"]) for r in rows_of(out)) == list(range(40))


# a real model, real processes


@pytest.fixture
def evaluate(folder, hay, out):
    """The arguments of a short run; what is added to them wins."""
    task = TASK.format(hay)
    return ["eval", "run", "--model", folder, "--dtype", "float32", "--method", "dense", "--task", task, "--out", out]


def start(arguments, cwd):
    """A process of the command line. It makes the file `ready` in `cwd`, and begins once the file `go` is there."""
    program = """
import pathlib, time
from longwave.cli import app
import longwave.evals.causal
pathlib.Path("ready").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.001)
app()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait(process, condition):
    """Until `condition()` is true, which has to be while `process` runs."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def unkilled(folder, tmp_path_factory):
    """A run of 16 samples with two methods that nothing disturbed: its arguments, its rows."""
    path = tmp_path_factory.mktemp("unkilled")
    (path / "hay.txt").write_text(TEXT)
    methods = ["--method", "dense", "--method", "fourier:budget=1,segment=16,window=16"]
    arguments = ["eval", "run", "--model", folder, "--task", MANY.format(path / "hay.txt"), *methods, "--batch", 1]
    succeeds(*arguments, "--out", path / "out")
    assert len(rows_of(path / "out")) == 32
    return arguments, measured(rows_of(path / "out"))


def test_a_killed_run_goes_on_where_it_ended(unkilled, out, tmp_path):
    arguments, expected = unkilled
    lines = out / "samples.jsonl"
    (tmp_path / "go").touch()
    process = start([*arguments, "--out", out], tmp_path)
    wait(process, lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 3)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    held = lines.read_bytes()
    assert 3 <= held.count(b"\n") < 32
    assert load(out).header["runs"][0]["limit"] is None, "the header was there first"
    result = succeeds(*arguments, "--out", out)
    assert lines.read_bytes().startswith(held)
    assert load(out).problems == [problem.removeprefix("longwave: ") for problem in result.stderr.splitlines()]
    assert measured(load(out).rows) == expected
    assert len(load(out).header["runs"]) == 2


def test_two_processes_share_a_folder(unkilled, out, tmp_path):
    arguments, expected = unkilled
    arguments = [*arguments, "--out", out, "--json"]
    process = start(arguments, tmp_path)
    wait(process, (tmp_path / "ready").exists)
    (tmp_path / "go").touch()
    mine = succeeds(*arguments)  # the other process is this one
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert stderr == mine.stderr == ""
    assert stdout == mine.stdout
    assert measured(rows_of(out)) == expected
    assert len(load(out).header["runs"]) == 2


def test_the_header_is_written_before_anything_is_measured(evaluate, out, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", killed)
    call(*evaluate)
    assert load(out).header["methods"] == {"dense": "dense"}
    assert not (out / "samples.jsonl").exists()


def test_damaged_lines_are_told_and_measured_again(evaluate, out):
    evaluate += ["--batch", 1]
    first = succeeds(*evaluate)
    whole = (out / "samples.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4
    (out / "samples.jsonl").write_bytes(lines[0] + b"\xff\n" + lines[2] + lines[3][:-20])
    again = succeeds(*evaluate)
    told = [line.split(":")[1].strip() for line in again.stderr.splitlines()]
    assert told == [f"{out / 'samples.jsonl'}, line {number}" for number in (2, 4)]
    assert again.stdout == first.stdout
    assert measured(load(out).rows) == measured([json.loads(line) for line in lines])


@pytest.fixture
def copied(folder, tmp_path):
    """The small model in a folder of its own."""
    return shutil.copytree(folder, tmp_path / "copied")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model", "{copied}"], "model "),
        (["--seed", 43], "seed 42, not 43"),
        (["--dtype", "bfloat16"], "dtype 'float32', not 'bfloat16'"),
        (["--question", "with"], "question 'after', not 'with'"),
        (["--no-chat"], "chat True, not False"),
        (["--max-tokens", 400], "max_tokens None, not 400"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_another_run_is_refused_and_changes_nothing(evaluate, copied, out, changes, message):
    succeeds(*evaluate, "--limit", 1)
    before = contents(out)
    changes = [copied if change == "{copied}" else change for change in changes]
    assert f"{out} holds results of {message}" in refused(*evaluate, *changes)
    assert contents(out) == before


def test_other_weights_under_the_same_name(evaluate, copied, out):
    arguments = [*evaluate, "--model", copied, "--limit", 1]
    succeeds(*arguments)
    before = contents(out)
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight *= 1.01
    model.save_pretrained(copied)
    assert AutoModelForCausalLM.from_pretrained(copied).config.vocab_size == 97
    assert f"other weights under the same name {copied}" in refused(*arguments)
    assert contents(out) == before


def test_another_version_of_a_task(evaluate, out, monkeypatch):
    succeeds(*evaluate, "--limit", 1)
    before = contents(out)
    monkeypatch.setattr(Needle, "version", 2)
    assert "with other settings or another version" in refused(*evaluate, "--limit", 1)
    assert contents(out) == before


def test_another_profile_under_the_same_label(evaluate, folder, hay, out, tmp_path):
    profiles = [tmp_path / "one.json", tmp_path / "two.json"]
    succeeds(
        "calibrate",
        folder,
        "--text",
        hay,
        "--out",
        profiles[0],
        "--tokens",
        128,
        "--windows",
        2,
        *("--method", "fourier-paper", "-o", "states=20", "-o", "window=16"),
    )
    made = json.loads(profiles[0].read_text())
    made["k_error"] = [[head[::-1] for head in layer] for layer in made["k_error"]]
    profiles[1].write_text(json.dumps(made))
    arguments = [*evaluate, "--method", "fourier-paper:keep=0.5,states=20,window=16", "--limit", 1]
    succeeds(*arguments, "--profile", profiles[0])
    before = contents(out)
    assert "with other settings" in refused(*arguments, "--profile", profiles[1])
    assert contents(out) == before
    profiles[1].write_bytes(profiles[0].read_bytes())
    succeeds(*arguments, "--profile", profiles[1])  # another name, the same channels


@pytest.mark.parametrize("method", ["dense", "fourier:budget=1"])
def test_data_that_changed_since(evaluate, hay, out, method):
    succeeds(*evaluate)
    before = contents(out)
    hay.write_text(TEXT.replace("blue", "grey"))
    evaluate[evaluate.index("dense")] = method
    message = refused(*evaluate)
    assert "measured on another prompt: data or tokenizer changed since. Use a new folder" in message
    assert contents(out) == before


def test_folders_of_something_else_on_the_command_line(evaluate, out, tmp_path):
    out.write_text("mine")
    assert "is a file: name a folder for the results" in refused(*evaluate)
    assert out.read_text() == "mine"
    assert str(out) in refused(*evaluate, "--out", out / "below")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    assert "is not empty and holds no results" in refused(*evaluate, "--out", other)
    assert contents(other) == {Path("thesis.tex"): b"mine"}


def test_methods_and_tasks_can_be_added(evaluate, hay, out):
    succeeds(*evaluate)
    rows = (out / "samples.jsonl").read_bytes()
    one = load(out).header
    loss = f"perplexity:lengths=200,scored=40,windows=1,text={hay}"
    succeeds(*evaluate, "--method", "fourier:budget=1", "--task", loss)
    two = load(out).header
    assert (out / "samples.jsonl").read_bytes().startswith(rows)
    assert list(two["methods"]) == ["dense", "fourier:budget=1"]
    assert list(two["tasks"]) == [TASK.format(hay), loss]
    assert two["runs"][0] == one["runs"][0]
    assert len(two["runs"]) == 2
    assert len(measured(rows_of(out))) == 2 * (4 + 1)


def test_a_smaller_limit_finds_its_samples_measured(evaluate, out, monkeypatch):
    succeeds(*evaluate, "--limit", 1)
    assert [r["id"] for r in rows_of(out)] == ["200/0.1/0", "180/0.1/0"]
    succeeds(*evaluate)
    assert len(measured(rows_of(out))) == 4
    before = (out / "samples.jsonl").read_bytes()
    monkeypatch.setattr(causal, "run_text", lambda *arguments: pytest.fail("measured again"))
    succeeds(*evaluate, "--limit", 1)
    assert (out / "samples.jsonl").read_bytes() == before


def test_a_long_wait_is_not_a_failure(out):
    results, other = Results.open(out, header()), Results.open(out, header())
    with results._lock:
        thread = threading.Thread(target=other.append, args=([row("a")],))
        thread.start()
        time.sleep(0.2)
        assert not (out / "samples.jsonl").exists()
    thread.join()
    assert [r["id"] for r in rows_of(out)] == ["a"]
