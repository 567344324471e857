"""Every case answers and is written down, one that fails beside the others, and what is read wrongly is not timed."""

import json

import pytest
import torch

from benchmarks import diffusion_pair, diffusion_speed

SMALL = ["--tiny", "--prompts", "300", "--new", "16", "--block", "8", "--repeats", "2"]


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "rows.jsonl"

    def go(*more):
        diffusion_speed.main([*SMALL, "--out", str(path), *more])
        return [json.loads(line) for line in path.read_text().splitlines()]

    return go


def of_part(rows, part):
    return [row for row in rows if row["part"] == part]


def test_random_weights_go_through_every_case(run, capsys):
    rows = run("--shape", "8b", "--layers", "1")
    assert "random weights" in rows[0]["model"]
    assert [row["case"] for row in of_part(rows, "answer")] == [*diffusion_speed.NAMES] * 2
    found = {row["case"]: row for row in of_part(rows, "speed")}
    assert [*found] == [*diffusion_speed.NAMES]
    assert all(len(row["times"]) == 2 and row["passes"] == row["new"] == 16 for row in found.values())
    assert found["no cache"]["held_bytes"] == 0
    assert found["sparse_dllm 0.5"]["held_bytes"] < found["dual"]["held_bytes"]
    assert found["dual"]["error"] < 0.05 < found["sparse_dllm 0.5"]["error"]
    assert found["dual, threshold 0.9"]["steps"] is None
    assert "one a pass" in found["dual, threshold 0.9"]["note"]
    assert diffusion_speed.UNSURE in capsys.readouterr().out


def test_the_pair_is_read_beyond_its_length(run, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion_speed, "load_tokenizer", lambda _: tokenizer)
    torch.manual_seed(0)
    model = diffusion_pair.untrained("diffusion", tokenizer, diffusion_pair.TINY)
    diffusion_pair.save(diffusion_pair.rounded(model), "diffusion", tmp_path / "models")
    rows = run("--load", str(tmp_path / "models"), "--only", "prefix", "--repeats", "1")
    (row,) = of_part(rows, "speed")
    assert row["factor"] > 1
    assert row["tokens_a_second"] > 0
    assert row["error"] == pytest.approx(0, abs=0.05)


def test_a_case_that_fails_is_recorded(run, monkeypatch, capsys):
    answer = diffusion_speed.answer

    def failing(model, prompt, args, case, warm=False):
        if case.how.get("keep") == "dual" and not warm:
            raise torch.OutOfMemoryError("no room")
        return answer(model, prompt, args, case, warm)

    monkeypatch.setattr(diffusion_speed, "answer", failing)
    rows = run("--shape", "8b", "--layers", "1", "--only", "dual", "--only", "prefix")
    assert [row["case"] for row in of_part(rows, "failed")] == ["dual"]
    prefix, dual = of_part(rows, "speed")
    assert len(prefix["times"]) == 2
    assert dual["failed"] == "OutOfMemoryError: no room"
    assert "no room" in capsys.readouterr().out


def test_what_is_read_wrongly_is_not_timed(run, monkeypatch):
    monkeypatch.setattr(diffusion_speed, "FAR", 0.0)
    rows = run("--shape", "8b", "--layers", "1", "--only", "prefix")
    assert not of_part(rows, "answer")
    assert "not timed" in of_part(rows, "speed")[0]["failed"]


def test_what_does_not_add_up_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--shape", "8b", "--new", "12")
    assert "whole number of blocks" in capsys.readouterr().err
