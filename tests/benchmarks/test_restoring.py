"""Every work runs and is written down, and nothing is timed where what is restored is wrong."""

import json
import os

import pytest

from benchmarks import restoring
from tests.codec.conftest import Fitted


@pytest.fixture(scope="module")
def fitted(tokenizer):
    return Fitted("llama", tokenizer)


@pytest.fixture
def run(fitted, tokenizer, monkeypatch, tmp_path):
    """Rows of a run over the small model."""
    monkeypatch.setattr(restoring, "loaded", lambda args: (fitted.model, tokenizer))
    monkeypatch.setattr(restoring, "codec_of", lambda *given: (fitted.codec, None))
    path = tmp_path / "rows.json"

    def go(*more):
        restoring.main(["--contexts", "400", "--chunks", "100,200", "--size", "0.15", "--out", str(path), *more])
        return json.loads(path.read_text())["rows"]

    return go


def test_every_work_is_timed_against_reading(run, capsys):
    rows = run("--repeats", "2")
    works = [row["work"] for row in rows]
    assert works[:3] == ["reading", "reading coded, chunks of 100", "reading coded, chunks of 200"]
    assert works[-2:] == ["parking", "waking"]
    assert all(len(row["times"]) == 2 and row["seconds"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1
    assert rows[0]["file_bytes"]["coded"] < rows[0]["file_bytes"]["exact"]
    assert "restoring coded" in capsys.readouterr().out


def test_what_is_restored_wrongly_is_not_timed(run, monkeypatch):
    monkeypatch.setattr(restoring, "error", lambda one, other: 1.0)
    with pytest.raises(SystemExit, match="not what was read"):
        run()


def test_other_bytes_than_the_hosts_are_not_timed(run, fitted, monkeypatch):
    """Told even where the host itself is compared."""
    device, host = fitted.codec.at(0.15), fitted.codec.at(0.1)

    def at(self, size, **_):
        return host if os.environ.get("LONGWAVE_KERNELS") == "reference" else device

    monkeypatch.setattr(type(device), "together", 2)
    monkeypatch.setattr(type(fitted.codec), "at", at)
    with pytest.raises(SystemExit, match="other bytes than the host"):
        run()
