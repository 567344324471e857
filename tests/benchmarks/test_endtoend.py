"""The whole end-to-end benchmark with a tiny model on a CPU: it must not fail first where time costs money."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
from benchmarks import endtoend
from tests.conftest import into


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 8, 31, 200, 1000])
@pytest.mark.parametrize("start", [1, 5, 64])
def test_the_largest_that_fits(limit, start):
    tried = []

    def fits(n):
        tried.append(n)
        return n <= limit

    found = endtoend.largest(fits, start, most=256)
    assert found <= min(limit, 256) <= found + max(1, found // 32)
    assert len(tried) < 20
    assert all(1 <= n <= 256 for n in tried)


def test_everything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(endtoend, "GATE_STEPS", 3)
    out = tmp_path / "endtoend.json"
    options = {"device": "cpu", "layers": 1, "contexts": 700, "batches": 1, "methods": "dense,b", "most": 2, "out": out}
    endtoend.main(["--tiny", *(f"--{name}={value}" for name, value in options.items())])
    found = json.loads(out.read_text())
    assert [row for row in found["rows"] if "error" in row] == []
    assert {row["part"] for row in found["rows"] if row["method"] == "b"} == {"gate", "decode", "prefill", "capacity"}
    held = {row["method"]: row["cache_bytes"] for row in found["rows"] if row["part"] == "prefill"}
    assert held["b"] < held["dense"]


def test_synthetic_memory_is_that_of_a_prompt():
    """Same bytes and lengths as after reading one, so that its time is too."""
    model = endtoend.build(2, True, "cpu")
    method = endtoend.Given("b")
    made = endtoend.filled(model, method, 2, 1000, seed=0)
    read = endtoend.longwave.cache(model, method)
    with torch.no_grad():
        model(torch.ones(2, 1000, dtype=torch.long), **into(read), use_cache=True, logits_to_keep=1)
    assert made.report().as_dict() == read.report().as_dict()
    for one, other in zip(made.memory_layers(), read.memory_layers(), strict=True):
        assert (one.rows, one.columns, one._run, one.store.counts) == (
            other.rows, other.columns, other._run, other.store.counts,
        )  # fmt: skip
