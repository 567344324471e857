import json
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from longwave.cli import app, parse_options

TEXT = "".join(f"Line {i} says that the sky is blue. Does it? It does! " for i in range(40))  # some 2,100 tokens
SEGMENTS = ["-o", "segment=16", "-o", "states=2", "-o", "window=16"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def refused(*arguments):
    """The message of a command that must end with one line for the user."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("longwave: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def profile(folder, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "tiny.json"
    sizes = ["--tokens", 500, "--windows", 3, "--scored", 64]
    succeeds("calibrate", folder, "--text", text, "--out", path, *sizes, *SEGMENTS)
    return path


@pytest.fixture
def generate(folder):
    return ["generate", "--model", folder, "--max-new-tokens", 8]


# generate


@pytest.mark.parametrize("prompt", [[], [""], ["  \n"]], ids=["none", "empty", "blank"])
def test_empty_prompt(generate, prompt):
    assert "the prompt is empty" in refused(*generate, *prompt)


def test_missing_file(generate, tmp_path):
    assert "absent.txt" in refused(*generate, "--file", tmp_path / "absent.txt")


def test_folder_as_file(generate, tmp_path):
    assert str(tmp_path) in refused(*generate, "--file", tmp_path)


def test_file_that_is_not_text(generate, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00caf\xe9")
    assert "is not UTF-8 text" in refused(*generate, "--file", tmp_path / "bytes")


def test_empty_file(generate, tmp_path):
    (tmp_path / "empty").write_text(" \n")
    assert "is empty" in refused(*generate, "--file", tmp_path / "empty")


@pytest.mark.parametrize("name", ["furier", "Fourier", "fourier_paper"])
def test_unknown_method_suggests(generate, name):
    assert "did you mean 'fourier" in refused(*generate, "Hello", "--method", name)


def test_unknown_method_without_a_near_name(generate):
    assert "choose from dense, fourier, kivi, fourier-paper" in refused(*generate, "Hello", "--method", "xyz")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("segment", "a method option is NAME=VALUE, got 'segment'"),
        ("=3", "a method option is NAME=VALUE, got '=3'"),
        ("segmnt=3", "did you mean 'segment'?"),
        ("states=300", "states (300) cannot exceed the segment's 128 tokens"),
        ("states=many", "states is a whole number of coefficients, at least 1; got 'many'"),
        ("basis=haar", "unknown basis 'haar'"),
        ("keep=1.5", "share of channels from 0 to 1"),
        ("_kept=1", "no option '_kept'"),
        ("budget=0.5", "budget"),
    ],
)
def test_bad_option(generate, option, message):
    assert message in refused(*generate, "Hello", "-o", option)


def test_options_of_a_preset(generate):
    assert "takes no options" in refused(*generate, "Hello", "--method", "fourier-paper", "-o", "states=8")


@pytest.mark.parametrize("budget", ["0", "2", "lots", "12 parsecs", "-1GB", "1e999GB"])
def test_bad_budget(generate, budget):
    assert repr(budget) in refused(*generate, "Hello", f"--budget={budget}")


def test_budget_too_small(generate):
    assert "smallest that fourier can do" in refused(*generate, "Hello", "--budget", "1KB", *SEGMENTS)


def test_bad_dtype(generate):
    message = refused(*generate, "Hello", "--dtype", "int8")
    assert "dtype is one of auto, float32, bfloat16, float16, got 'int8'" in message


def test_bad_device(generate):
    assert "cannot use device 'toaster'" in refused(*generate, "Hello", "--device", "toaster")


def test_long_messages_become_one_line(generate, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("We couldn't connect.\nCheck your connection.\n")

    monkeypatch.setattr("longwave.models.load", offline)
    assert refused(*generate, "Hello") == "longwave: We couldn't connect. Check your connection.\n"


def test_model_that_is_not_there():
    assert "/nowhere/at/all" in refused("generate", "Hello", "--model", "/nowhere/at/all")


def test_prompt_longer_than_the_context(generate, text):
    assert "exceed this model's context of 512" in refused(*generate, "--file", text)
    assert "500 tokens of prompt and 13 new ones" in refused(*generate, "x" * 500, "--max-new-tokens", 13)


def test_no_profile_for_the_model(generate):
    assert "longwave calibrate" in refused(*generate, "Hello", "-o", "keep=0.5")
    assert "longwave: no measurement of this model" in succeeds(*generate, "Hello").stderr


def test_missing_profile(generate, tmp_path):
    assert "no profile at" in refused(*generate, "Hello", "--profile", tmp_path / "absent.json")


def test_profile_of_another_model(generate):
    import longwave.profiles

    shipped = f"{longwave.profiles.__path__[0]}/smollm2.json"
    assert "is of smollm2" in refused(*generate, "Hello", "--profile", shipped)


def test_generate_json(generate, profile):
    result = succeeds(*generate, TEXT[:300], "--profile", profile, "--budget", 0.5, *SEGMENTS, "--json")
    answer = json.loads(result.stdout)
    assert answer["prompt_tokens"] == 300
    assert answer["tokens"] == 307  # the last new token was never fed
    assert isinstance(answer["text"], str)
    assert len(answer["text"]) <= 8
    assert answer["nbytes"] == sum(answer["parts"].values())
    assert answer["ratio"] == answer["nbytes"] / answer["dense_nbytes"] < 0.75
    assert answer["parts"]["pages"] > 0
    assert answer["method"].startswith("fourier(measured plan for 0.5")
    assert answer["loop"] == "python"
    assert answer["loop_reason"] == "a graph needs CUDA, and the model is on cpu"
    assert 0 < answer["prefill_seconds"] < answer["seconds"]
    assert answer["tokens_per_second"] > 0
    assert "peak_memory" not in answer


def test_too_few_tokens_are_not_timed(generate):
    short = [*generate, TEXT[:40], "-o", "keep=1.0", "--max-new-tokens", 2]
    assert json.loads(succeeds(*short, "--json").stdout)["tokens_per_second"] is None
    assert "too few tokens to time decoding" in succeeds(*short).stderr


def test_the_loop_can_be_chosen(generate):
    prompt = [*generate, TEXT[:40], "-o", "keep=1.0"]
    assert json.loads(succeeds(*prompt, "--no-graph", "--json").stdout)["loop_reason"] == "--no-graph"
    assert "--graph: a graph needs CUDA" in refused(*prompt, "--graph")
    assert "--compile is for the steps of a graph, and there is none: a graph" in refused(*prompt, "--compile")


def test_what_steps_cannot_do_names_the_other_loop(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "beams")
    (tmp_path / "beams" / "generation_config.json").write_text('{"num_beams": 2}')
    prompt = ["generate", "--model", tmp_path / "beams", "--max-new-tokens", 2, TEXT[:40], "-o", "keep=1.0", "--json"]
    monkeypatch.setattr("longwave.cli.why_python", lambda *_: None)  # as if on CUDA
    assert "model.generate works: pass --no-graph" in refused(*prompt)
    assert "leave out --compile" in refused(*prompt, "--compile")
    monkeypatch.undo()
    succeeds(*prompt, "--no-graph")


def test_generate_prints_the_answer_and_reports_on_stderr(generate):
    quiet = json.loads(succeeds(*generate, TEXT[:100], "-o", "keep=1.0", "--json").stdout)
    result = succeeds(*generate, TEXT[:100], "-o", "keep=1.0")
    assert result.stdout.strip() == quiet["text"].strip()
    pace, report = result.stderr.splitlines()
    assert pace.startswith("prompt read in ")
    assert " tokens a second, decoded by python (a graph needs CUDA" in pace
    assert "107 tokens x 1 rows" in report


def test_every_way_to_hold_everything_answers_alike(generate, text, tmp_path):
    (tmp_path / "part.txt").write_text(TEXT[:200])
    ways = [
        ["--method", "dense"],
        ["-o", "keep=1.0"],
        ["--budget", "100%", *SEGMENTS],
        ["--budget", "10MB", *SEGMENTS],
        ["--budget", "1", *SEGMENTS, "--prefill-chunk", "37"],
    ]
    prompt = ["--file", tmp_path / "part.txt", "And now?", "--json"]
    answers = {json.loads(succeeds(*generate, *prompt, *way).stdout)["text"] for way in ways}
    assert len(answers) == 1


def test_top_k_and_top_p_reach_the_sampling(generate):
    ways = [[], ["--temperature", "1.5", "--top-k", "1"], ["--temperature", "1.5", "--top-p", "0.0001"]]
    prompt = [*generate, TEXT[:100], "-o", "keep=1.0", "--json"]
    assert len({json.loads(succeeds(*prompt, *way).stdout)["text"] for way in ways}) == 1
    assert "give a --temperature" in refused(*prompt, "--top-k", 5)


def test_sampling_repeats_with_its_seed(generate):
    sampled = ["Hello there", "-o", "keep=1.0", "--temperature", "1.5", "--json", "--max-new-tokens", "20"]
    texts = [json.loads(succeeds(*generate, *sampled, "--seed", seed).stdout)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_options_are_literals_or_text():
    items = ["segment=512", "keep=(0.1, 0.4)", "gain=None", "basis=dct", "a==b", "quota=head", "x="]
    assert parse_options(items) == {
        **{"segment": 512, "keep": (0.1, 0.4), "gain": None, "basis": "dct"},
        **{"a": "=b", "quota": "head", "x": ""},
    }
    assert parse_options(None) == {}


# calibrate


@pytest.fixture
def calibrate(folder, text, tmp_path):
    return ["calibrate", folder, "--text", text, "--out", tmp_path / "made.json", "--windows", 2]


def test_calibrate_writes_a_profile(calibrate, tmp_path):
    result = succeeds(*calibrate, "--tokens", 128, "--channels-only", *SEGMENTS, "--json")
    summary = json.loads(result.stdout)
    assert summary["profile"] == str(tmp_path / "made.json")
    assert (summary["windows"], summary["tokens"]) == (2, 256)
    assert [path.name for path in tmp_path.iterdir()] == ["made.json"]
    data = json.loads((tmp_path / "made.json").read_text())
    assert data["method"]["segment"] == 16
    assert ("sensitivity" in data) is summary["plan"] is False


def test_calibrate_says_what_it_wrote(calibrate, tmp_path):
    made = tmp_path / "made.json"
    result = succeeds(*calibrate, "--tokens", 128, "--channels-only", *SEGMENTS)
    assert result.stdout == f"wrote {made}: channels alone, 2 windows, 256 tokens\n"
    result = succeeds(*calibrate, "--tokens", 128, "--scored", 32, *SEGMENTS)  # two windows: none with hidden facts
    assert result.stdout == f"wrote {made}: channels and heads, 2 windows, 256 tokens\n"
    assert [path.name for path in tmp_path.iterdir()] == ["made.json"]


def test_calibrate_with_too_short_a_text(calibrate, tmp_path):
    (tmp_path / "short.txt").write_text("Short.")
    short = [*calibrate[:3], tmp_path / "short.txt", *calibrate[4:]]
    assert "fewer than one window of 128" in refused(*short, "--tokens", 128, "--scored", 32, *SEGMENTS)
    assert not (tmp_path / "made.json").exists()


@pytest.mark.parametrize("what", [["--channels-only"], ["--scored", 8]])
def test_calibrate_with_windows_too_short_to_compress(calibrate, tmp_path, what):
    assert "too short" in refused(*calibrate, "--tokens", 30, *what, *SEGMENTS)
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


# inspect


@pytest.fixture
def inspect(folder, text, profile, tmp_path):
    given = ["--model", folder, "--file", text, "--profile", profile, *SEGMENTS]
    return ["inspect", *given, "--tokens", 200, "--out", tmp_path / "made"]


def test_inspect_json(inspect, tmp_path):
    result = json.loads(succeeds(*inspect, "-o", "keep=0.375", "--json").stdout)
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
    assert cells[-6][0] == "layer"
    assert [row[0] for row in cells[-5:-2]] == ["0", "1", "2"]
    assert lines[-2:] == [str(tmp_path / "made" / "kept.png"), str(tmp_path / "made" / "channel.png")]


def test_inspect_kept_channel(inspect):
    whole = json.loads(succeeds(*inspect, "--budget", 1, "--channel", 5, "--json").stdout)
    assert whole["channel"] == {"layer": 0, "side": "k", "head": 0, "channel": 5, "kept": True, "variance_missed": 0.0}


def test_inspect_dense_has_bytes_and_no_channels(inspect, folder, text, tmp_path):
    dense = ["inspect", "--model", folder, "--file", text, "--tokens", 200, "--method", "dense"]
    result = json.loads(succeeds(*dense, "--out", tmp_path / "made", "--json").stdout)
    assert "kept" not in result
    assert result["parts"] == {"dense": result["nbytes"]}
    assert not (tmp_path / "made").exists()


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


def test_no_command_shows_help():
    result = call("--help")
    assert result.exit_code == 0
    for command in ("generate", "calibrate", "inspect", "eval", "demo"):
        assert command in result.stdout
