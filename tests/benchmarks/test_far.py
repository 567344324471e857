"""What is timed on a CPU, that a row says what went wrong, and that nothing is measured twice."""

import json

import pytest
import torch

from benchmarks import choosing, far

METHODS = "transformers;dense;longcache:window=64,spans=2,chunk=32;infllm:host=True"


def run(tmp_path, *more, methods=METHODS):
    out = tmp_path / "far.json"
    call = ["--device", "cpu", "--tiny", "--contexts", "600", "--pass", "128", "--first", "200", "--steps", "2"]
    far.main([*call, "--methods", methods, "--out", str(out), *more])
    return json.loads(out.read_text())["rows"]


def test_rows_beside_dense_and_one_that_fails(tmp_path, capsys):
    stock, dense, own, failed = run(tmp_path)
    assert [row["context"] for row in (stock, dense, own, failed)] == [600] * 4
    assert stock["device_bytes"] == 2 * 2 * 2 * 16 * 4 * 600  # K and V of two layers and heads, in 32 bits
    assert own["read_tokens"] == 600
    assert len(own["passes"]) == 5
    assert "captured_s" in own
    assert "captured_s" not in stock
    assert "is on the CPU already" in failed["failed"]
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert told[2]["token_of_dense"] == own["token_s"] / stock["token_s"]
    assert told[2]["captured_of_dense"] == own["captured_s"] / dense["captured_s"]
    assert told[3]["read_of_dense"] is None


def test_what_is_there_is_not_measured_again(tmp_path, monkeypatch):
    rows = run(tmp_path, methods="transformers")
    monkeypatch.setattr(far, "measure", lambda model, spec, ids, args, row: row.update(words="made up"))
    assert run(tmp_path, methods="transformers;dense") == [
        *rows,
        {"method": "dense", "context": 600, "words": "made up"},
    ]
    with pytest.raises(SystemExit, match="other settings"):
        run(tmp_path, "--limit", "3")


def test_a_method_that_takes_too_long_says_how_far_it_came(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(far.family, "timed", lambda model, work: work() is None or 3.0)
    _, row = run(tmp_path, "--limit", "5", methods="transformers;dense")
    assert row["read_tokens"] == 256
    assert row["failed"] == "TimeoutError: 256 tokens were read in 6 s"
    assert '"read_of_dense": 1.0' in capsys.readouterr().out.splitlines()[1]


@pytest.fixture
def no_clock(monkeypatch):
    pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    from benchmarks import kernels

    monkeypatch.setattr(kernels, "timed", lambda steps: steps[0]().sum().item())
    monkeypatch.setattr(kernels, "COPIES", 1)


def test_choices_are_checked_and_recorded(no_clock, tmp_path):
    out = tmp_path / "kernel.json"
    far.main(["--kernel", "--device", "cpu", "--contexts", "400", "--stretch", "3", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["shape"], row["queries"]) for row in rows] == [("SmolLM2", 1), ("SmolLM2", 3), ("8B", 1), ("8B", 3)]
    for row in rows:
        assert row["same"] == 1
        assert 0 < row["kernel_us"] == row["at_once_us"] == row["in_blocks_us"]  # tokens that are read, here


def test_a_choice_that_differs_is_not_timed(no_clock, monkeypatch):
    best = choosing.at_once
    monkeypatch.setattr(choosing, "at_once", lambda q, k, begin, end: best(q, k, begin, torch.full_like(end, 100)))
    row = next(choosing.rows([400], 1, "cpu"))
    assert row["failed"].startswith("AssertionError")
    assert "kernel_us" not in row
