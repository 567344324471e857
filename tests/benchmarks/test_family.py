"""What is timed, and that a run goes on where it ended."""

import json

import pytest
import torch

from benchmarks import family
from longwave.evals.spec import parse_spec
from longwave.methods import METHODS

TINY = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(family, "SMOLLM2", dict(TINY, vocab_size=49152, max_position_embeddings=4096))


def test_a_budget_names_every_method():
    lines = [parse_spec(line) for line in family.at_budget(0.25)]
    assert {name for name, _ in lines} == {name for name, method in METHODS.items() if not method().beforehand()}
    assert not any("store" in options for _, options in lines)


def test_what_is_there_is_not_measured_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "family.json"
    call = ["--tokens", "300", "--steps", "2", "--out", str(out), "--methods"]
    family.main([*call, "transformers;streaming:budget=0.25"])
    told = capsys.readouterr().out
    assert "`streaming:budget=0.25` |" in told
    assert "`transformers` (plain) |" in told
    rows = json.loads(out.read_text())["rows"]
    assert rows[1]["ratio"] < 0.5 < rows[0]["ratio"]
    monkeypatch.setattr(family, "measure", lambda model, spec, ids, steps: {**rows[0], "method": spec})
    family.main([*call, "streaming:budget=0.25;dense"])
    assert json.loads(out.read_text())["rows"] == [*rows, {**rows[0], "method": "dense"}]
    with pytest.raises(SystemExit, match="other settings"):
        family.main([*call, "dense", "--steps", "3"])


def test_wrong_results_are_not_timed(monkeypatch):
    run = family.run
    shift = {"sdpa": 0, "longwave": 1}
    monkeypatch.setattr(
        family, "run", lambda model, *rest: run(model, *rest) + shift[model.config._attn_implementation]
    )
    with pytest.raises(SystemExit, match="nothing is timed on wrong results"):
        family.main(["--tokens", "64", "--methods", "dense"])


def test_a_peak_is_what_was_taken_above(tmp_path):
    with family.Peak(torch.device("cpu")) as peak:
        torch.ones(64 << 18).sum()  # 64 MiB
    assert peak.mib is None or 60 < peak.mib < 100
