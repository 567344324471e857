import json
import re

import pytest
from PIL import Image

from tests.cli.calls import SEGMENTS, refused, succeeds


@pytest.fixture
def inspect(folder, text, profile, tmp_path):
    given = ["--model", folder, "--file", text, "--profile", profile, *SEGMENTS]
    return ["inspect", *given, "--tokens", 200, "--out", tmp_path / "made"]


def test_inspect_json(inspect, folder, text, profile, tmp_path):
    paper = ["--method", "fourier-paper"]
    channels = profile.with_name("channels.json")
    sizes = ["--tokens", 200, "--windows", 2, "-o", "states=20", "-o", "window=16"]
    succeeds("calibrate", folder, "--text", text, "--out", channels, *sizes, *paper)
    inspect[inspect.index(profile)] = channels
    for option in ("keep=0.375", "states=20", "window=16", "stretch=False"):
        paper += ["-o", option]
    result = json.loads(succeeds(*(part for part in inspect if part not in SEGMENTS), *paper, "--json").stdout)
    assert result["tokens"] == 200
    assert result["nbytes"] == sum(result["parts"].values())
    assert [entry["layer"] for entry in result["kept"]] == [0, 1, 2]
    for entry in result["kept"]:
        assert entry["k"] == entry["v"] == 0.375  # three of eight channels
        for pairs in (entry["k_by_pair"], entry["v_by_pair"]):
            assert len(pairs) == 4
            assert sum(pairs) / 4 == pytest.approx(0.375)
    channel = result["channel"]
    assert (channel["layer"], channel["side"], channel["head"], channel["kept"]) == (0, "k", 0, False)
    assert 0 < channel["variance_missed"] < 2
    for name in ("kept.png", "channel.png"):
        with Image.open(tmp_path / "made" / name) as picture:
            assert picture.format == "PNG"
    assert len(list((tmp_path / "made").iterdir())) == 2


def test_inspect_prints_plain_tables(inspect, tmp_path):
    lines = succeeds(*inspect, "--budget", 0.5, "--side", "v", "--layer", 2, "--head", 1).stdout.splitlines()
    cells = [line.split("\t") for line in lines]
    assert cells[0] == ["part", "bytes"]
    sizes = {name: int(size) for name, size in cells[1:6]}
    assert sizes["all"] == sizes["dense"] + sizes["pages"] + sizes["channel index"]
    assert sizes["all"] < sizes["dense cache"]
    assert any(line.startswith("ratio 0.") and line.endswith("after 200 tokens") for line in lines)
    assert any(
        re.fullmatch(r"expected KL \S+( ± \S+)? nats a token of text, as the plan was measured", x) for x in lines
    )
    assert any(re.fullmatch(r"measured KL .*% the same top-1: next 256 tokens of this text", x) for x in lines)
    at = cells.index(["layer", "head 0", "head 1"])
    assert [row[0] for row in cells[at + 1 : at + 4]] == ["0", "1", "2"]
    for row in cells[at + 1 : at + 4]:
        assert all(re.fullmatch(r"\d+\.\d\d \d+\.\d\d( merged)?", cell) for cell in row[1:])
    assert cells[-6][0] == "layer"
    assert [row[0] for row in cells[-5:-2]] == ["0", "1", "2"]
    assert lines[-2:] == [str(tmp_path / "made" / "kept.png"), str(tmp_path / "made" / "channel.png")]


def test_inspect_bits_of_heads(inspect):
    """They are what a page takes, but for what aligns its fields; at all bytes they are the model's own."""
    result = json.loads(succeeds(*inspect, "--budget", 0.25, "--json").stdout)
    heads = [x for row in result["bits"] for side in "kv" for x in row[side]]
    assert len(heads) == 3 * 2 * 2
    pages = (200 - 4 - 16) // 16
    taken = sum(heads) / 8 * 16 * 8 * pages
    assert 0.7 * result["parts"]["pages"] < taken <= result["parts"]["pages"]
    whole = json.loads(succeeds(*inspect, "--budget", 1, "--json").stdout)
    assert {x for row in whole["bits"] for side in "kv" for x in row[side]} == {32.0}
    assert whole["merged"] == {"heads": 0, "of_heads": 6, "segments": 0, "of_segments": 6 * pages}


def test_inspect_merged_segments(inspect):
    result = json.loads(succeeds(*inspect, "--budget", 0.07, "--json").stdout)
    merged = [x for row in result["bits"] for x in row["merged"]]
    assert any(merged)
    assert result["merged"] == {"heads": sum(merged), "of_heads": 6, "segments": 11 * sum(merged), "of_segments": 66}
    assert result["parts"]["pages"] < 0.07 * 66 * 16 * 2 * 8 * 4


def test_inspect_measures_what_the_cache_costs(inspect, tmp_path):
    """Nothing where nothing is lost, more at fewer bytes, and only where the text goes on."""
    cost = [json.loads(succeeds(*inspect, "--budget", b, "--json").stdout)["measured"] for b in (1, 0.5, 0.07)]
    assert [x["tokens"] for x in cost] == [256] * 3
    assert abs(cost[0]["kl"]) < 1e-5
    assert cost[0]["same_top1"] == 1
    assert cost[0]["kl"] < cost[1]["kl"] < cost[2]["kl"]
    rest = json.loads(succeeds(*inspect, "--tokens", 500, "--json").stdout)["measured"]
    assert rest["tokens"] == 512 - 500 - 1  # the model's context ends there
    short = tmp_path / "short.txt"
    short.write_text("It is blue. " * 12)
    inspect[inspect.index("--file") + 1] = short
    found = succeeds(*inspect, "--tokens", 100000).stdout
    assert "measured nothing: no text follows" in found


def test_inspect_kept_channel(inspect):
    whole = json.loads(succeeds(*inspect, "--budget", 1, "--channel", 5, "--json").stdout)
    assert whole["channel"] == {"layer": 0, "side": "k", "head": 0, "channel": 5, "kept": True, "variance_missed": 0.0}


def test_inspect_spends_a_size_on_the_tokens_it_reads_and_scores(inspect):
    size = [*inspect, "--budget", "160KB", "--json"]  # too small for the window of 512
    assert json.loads(succeeds(*size).stdout)["nbytes"] <= 160_000
    assert "cannot hold 1 x 456 tokens" in refused(*inspect, "--budget", "1KB")


def test_inspect_dense_has_bytes_and_no_channels(inspect, folder, text, tmp_path):
    dense = ["inspect", "--model", folder, "--file", text, "--tokens", 200, "--method", "dense"]
    result = json.loads(succeeds(*dense, "--out", tmp_path / "made", "--json").stdout)
    assert "kept" not in result
    assert result["parts"] == {"dense": result["nbytes"]}
    assert not (tmp_path / "made").exists()


def test_inspect_a_method_that_compresses_no_channel(folder, text, tmp_path):
    kivi = ["inspect", "--model", folder, "--file", text, "--tokens", 200, "--method", "kivi"]
    kivi += ["-o", "group=8", "-o", "window=16", "--out", tmp_path / "made", "--json"]
    result = json.loads(succeeds(*kivi).stdout)
    assert {entry[side] for entry in result["kept"] for side in "kv"} == {1.0}
    assert result["channel"]["kept"] is True
    assert 0 < result["channel"]["variance_missed"] < 0.1


@pytest.mark.parametrize("method", [["h2o", "-o", "tokens=100"], ["snapkv", "-o", "store=kivi"], ["think"]])
def test_inspect_a_method_without_channels(folder, text, tmp_path, method):
    given = ["inspect", "--model", folder, "--file", text, "--tokens", 300, "--out", tmp_path / "made"]
    if "store=kivi" in method:
        given += ["--budget", "0.15"]
    result = json.loads(succeeds(*given, "--method", *method, "--json").stdout)
    assert result["tokens"] == 300
    assert not {"kept", "channel"} & result.keys()
    assert not (tmp_path / "made").exists()


def test_inspect_a_method_that_reads_by_itself(folder, text):
    far = ["inspect", "--model", folder, "--file", text, "--tokens", 200, "--method", "longcache", "--json"]
    far += [part for option in ("window=16", "chunk=16", "spans=4", "span=4") for part in ("-o", option)]
    result = json.loads(succeeds(*far).stdout)
    assert result["parts"] == {"dense": result["nbytes"]}
    assert result["method"] == "longcache(reads 64 tokens: 4 spans of 4, window=16)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--side", "q"], 'side is "k" or "v"'),
        (["--layer", "3"], "choose from [0, 1, 2]"),
        (["--layer=-1"], "choose from [0, 1, 2]"),
        (["--head", "2"], "heads 0 to 1"),
        (["--channel", "8"], "heads 0 to 1 of channels 0 to 7"),
        (["--channel=-1"], "channels 0 to 7"),
        (["--tokens", "30"], "compressed nothing: give more tokens"),
        (["--tokens", "600"], "context of 512"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_inspect(inspect, arguments, message):
    assert message in refused(*inspect, *arguments)
