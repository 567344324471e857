"""The runner without a GPU: times are made up, all else is done, in Triton's interpreter."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
from benchmarks import kernels


@pytest.fixture
def no_clock(monkeypatch):
    def once(steps, capture=True):
        steps[0]()
        return 2.0

    monkeypatch.setattr(kernels, "timed", once)
    monkeypatch.setattr(kernels, "COPIES", 1)
    monkeypatch.setattr(kernels, "NEAR", 2e-2)  # the interpreter cuts bits off


ARGS = SimpleNamespace(seed=0, rebuild=True, rivals=False)


def test_a_case_is_checked_and_recorded(no_clock, tmp_path):
    sources = [kernels.Source(layout, 0) for layout in kernels.layouts("a")]
    results = kernels.Table({"copy_bytes_per_s": 1e12}, tmp_path / "new" / "kernels.json")
    kernels.measure((2, 600), {"a": sources}, results, ARGS)
    results.write()
    (row,) = json.loads(results.out.read_text())["rows"]
    assert (row["batch"], row["context"], row["us"], row["layers_us"]) == (2, 600, 2.0, [2.0])
    assert row["error"] < 2e-2
    given = kernels.Input(sources[0], 2, 600, 0)
    assert row["bytes"] == sum(x.nbytes for x in (given.pages, given.k, given.v))


def test_a_wrong_answer_is_not_timed_and_the_rest_goes_on(no_clock, monkeypatch):
    monkeypatch.setattr(kernels, "NEAR", 0.0)
    sources = [kernels.Source(layout, 0) for layout in kernels.layouts("a")]
    results = kernels.Table({"copy_bytes_per_s": 1e12}, None)
    kernels.measure((1, 600), {"a": sources, "again": sources}, results, ARGS)
    assert results.rows == []
    assert [row["layout"] for row in results.skipped] == ["a", "again"]
    assert "relative error" in results.skipped[0]["reason"]


def test_rivals_are_checked_and_recorded(no_clock, monkeypatch):
    monkeypatch.setattr(kernels.rivals, "LAUNCHES", {"segments": kernels.rivals.LAUNCHES["segments"]})
    results = kernels.Table({"copy_bytes_per_s": 1e12}, None)
    kernels.measure((1, 2304), {}, results, SimpleNamespace(seed=0, rebuild=False, rivals=True))
    assert results.skipped == []
    assert [row["name"] for row in results.rivals] == ["rebuild, segments", "cuFFT"]


def test_what_does_not_fit_says_so(no_clock):
    with pytest.raises(MemoryError, match="are free"):
        kernels.measure((64, 1 << 20), {}, kernels.Table({}, None), ARGS)
