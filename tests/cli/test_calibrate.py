import json

import pytest

from tests.cli.calls import SEGMENTS, refused, succeeds


@pytest.fixture
def calibrate(folder, text, tmp_path):
    return ["calibrate", folder, "--text", text, "--out", tmp_path / "made.json", "--windows", 2]


def test_calibrate_writes_a_profile(calibrate, tmp_path):
    result = succeeds(*calibrate, "--tokens", 128, "--scored", 32, "--probes", 1, *SEGMENTS, "--json")
    summary = json.loads(result.stdout)
    assert summary["profile"] == str(tmp_path / "made.json")
    assert (summary["windows"], summary["tokens"]) == (2, 256)
    assert [path.name for path in tmp_path.iterdir()] == ["made.json"]
    data = json.loads((tmp_path / "made.json").read_text())
    assert data["method"]["segment"] == 16
    assert ("sensitivity" in data) is summary["plan"] is True
    assert data["sensitivity"]["about"]["probes"] == 1


def test_calibrate_says_what_it_wrote(calibrate, tmp_path):
    made = tmp_path / "made.json"
    result = succeeds(*calibrate, "--tokens", 128, "--scored", 32, *SEGMENTS)  # two windows: none with hidden facts
    assert result.stdout == f"wrote {made}: heads, for plans, 2 windows, 256 tokens\n"
    paper = ["--method", "fourier-paper", "-o", "states=8", "-o", "window=16"]
    result = succeeds(*calibrate, "--tokens", 128, *paper)
    assert result.stdout == f"wrote {made}: channels, 2 windows, 256 tokens\n"
    assert [path.name for path in tmp_path.iterdir()] == ["made.json"]


def test_calibrate_reads_the_packages_own_text(folder, tmp_path):
    made = tmp_path / "made.json"
    succeeds("calibrate", folder, "--out", made, "--windows", 2, "--tokens", 128, "--scored", 32, *SEGMENTS)
    assert json.loads(made.read_text())["text"]["windows"] == 2


def test_calibrate_with_too_short_a_text(calibrate, tmp_path):
    (tmp_path / "short.txt").write_text("Short.")
    short = [*calibrate[:3], tmp_path / "short.txt", *calibrate[4:]]
    assert "fewer than one window of 95" in refused(*short, "--tokens", 128, "--scored", 32, *SEGMENTS)
    assert not (tmp_path / "made.json").exists()


def test_calibrate_with_windows_too_short_to_compress(calibrate, tmp_path):
    assert "too short" in refused(*calibrate, "--tokens", 30, "--scored", 8, *SEGMENTS)
    assert not (tmp_path / "made.json").exists()


def test_calibrate_beyond_the_context(calibrate):
    assert "exceed the model's context of 512" in refused(*calibrate, "--tokens", 1000, *SEGMENTS)


def test_calibrate_into_a_missing_folder(calibrate, tmp_path):
    out = ["--out", tmp_path / "absent" / "made.json"]
    assert f"there is no folder {tmp_path / 'absent'}" in refused(*calibrate, *out)


def test_calibrate_into_a_folder(calibrate, tmp_path):
    assert f"{tmp_path} is a folder" in refused(*calibrate, "--out", tmp_path)


def test_calibrate_dense(calibrate):
    assert "dense needs no profile" in refused(*calibrate, "--method", "dense")


def test_calibrate_without_text_file(calibrate, tmp_path):
    assert "absent.txt" in refused(*calibrate, "--text", tmp_path / "absent.txt")
