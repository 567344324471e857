import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import longwave
from longwave.cli import app
from longwave.cli.common import parse_options
from longwave.cli.console import show_json
from longwave.cli.listing import first_line, options_of
from longwave.methods import METHODS
from tests.cli.calls import call, refused, succeeds


def test_options_are_literals_or_text():
    items = ["segment=512", "keep=(0.1, 0.4)", "gain=None", "basis=dct", "a==b", "quota=head", "x="]
    assert parse_options(items) == {
        **{"segment": 512, "keep": (0.1, 0.4), "gain": None, "basis": "dct"},
        **{"a": "=b", "quota": "head", "x": ""},
    }
    assert parse_options(None) == {}


def test_no_command_shows_help():
    result = call("--help")
    assert result.exit_code == 0
    assert "inside a memory budget that you name" in result.stdout
    for command in ("generate", "chat", "calibrate", "inspect", "eval", "demo"):
        assert command in result.stdout


@pytest.mark.parametrize("command", ["generate", "chat", "calibrate", "inspect"])
def test_help_lists_the_methods(command):
    shown = " ".join(succeeds(command, "--help").stdout.split())
    for name, cls in METHODS.items():
        said = f"{name}: {first_line(cls)} Options: {', '.join(options_of(cls)) or 'none'}."
        assert " ".join(said.split()) in shown


def test_every_method_says_what_it_is_in_one_line():
    for name, cls in METHODS.items():
        assert first_line(cls).endswith("."), name
        assert not first_line(cls).startswith(cls.__name__ + "("), f"{name} has only the docstring dataclass gives"


def test_the_command_line_starts_without_torch():
    code = """
import json, sys
from longwave.cli import app
print(json.dumps([name for name in ("torch", "transformers", "matplotlib", "numpy") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_help_comes_within_a_second():
    """Modules are counted, not seconds: what the command line imports is some 300 of them, torch alone has 1,500."""
    code = "import sys; from longwave.cli import app; print(len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["generate", "--help"], "fourier-paper"),
        (["methods"], "fourier-paper"),
        (["generate", "Hello", "--method", "furier"], "did you mean 'fourier'?"),
        (["chat", "-o", "segmnt=3"], "fourier has no option 'segmnt'"),
        (["inspect", "--budget", "lots"], "'lots'"),
        (["demo", "--budget", "lots"], "'lots'"),
        (["eval", "run", "--method", "furier:budget=0.25"], "did you mean 'fourier'?"),
        (["eval", "run", "--method", "fourier:budget=0.25,segmnt=3"], "fourier has no option 'segmnt'"),
        (["calibrate", "smollm2", "--out", "x", "--dtype", "int8"], "dtype is one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_what_is_misspelt_need_no_torch(command, said):
    code = f"""
import sys
from longwave.cli import app
try:
    app({command})
except SystemExit:
    sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said in done.stdout + done.stderr
    assert done.returncode == 0


def test_standard_input_is_a_document(folder, text, tmp_path):
    def given(data, file="-"):
        read = ["generate", "Why?", "--file", file, "--model", folder, "--max-new-tokens", 2, "--method", "dense"]
        return CliRunner().invoke(app, [*map(str, read), "--json"], input=data)

    words = text.read_bytes()[:200]
    (tmp_path / "words.txt").write_bytes(words)
    piped, named = (json.loads(given(words, file).stdout) for file in ("-", tmp_path / "words.txt"))
    assert (piped["text"], piped["prompt_tokens"]) == (named["text"], named["prompt_tokens"]) == (piped["text"], 206)
    assert "standard input is empty" in given(b" \n").stderr
    assert "standard input is not UTF-8" in given(b"\xff\xfe").stderr
    assert "questions come from" in refused("chat", folder, "--file", "-")


def test_version():
    assert succeeds("--version").stdout == f"longwave {longwave.__version__}\n"


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr("longwave.models.load", lambda *given, **options: pytest.fail("weights were loaded"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "lots"], "'lots'"),
        (["--budget", "0.001"], "less than fourier can do"),
        (["--budget", "1KB"], "the smallest that fourier can do is"),
        (["--method", "dense", "--budget", "0.5"], "dense keeps everything"),
        (["--method", "fourier-paper", "--budget", "0.5"], "takes no budget"),
        (["--method", "kivi", "--budget", "0.01"], "less than kivi can do"),
        (["--method", "quest", "-o", "host=True"], "host=True"),
        (["--method", "furier"], "did you mean 'fourier'?"),
        (["-o", "segmnt=3"], "did you mean 'segment'?"),
        (["--profile", "absent.json"], "no profile at absent.json"),
        (["--dtype", "int8"], "dtype is one of"),
        (["--device", "toaster"], "cannot use device 'toaster'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_what_is_wrong_is_said_before_weights_are_loaded(folder, text, no_weights, command, arguments, message):
    read = ["Hello"] if command == "generate" else ["--file", text, "--tokens", 100]
    assert message in refused(command, *read, "--model", folder, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x" * 500, "--max-new-tokens", 13], "500 tokens of prompt and 13 new ones"),
        (["generate", "Hello", "--top-k", 5], "give a --temperature"),
        (["generate", "Hello", "--graph"], "--graph: a graph needs CUDA"),
        (["generate", "Hello", "--compile"], "--compile is for the steps of a graph"),
        (["inspect", "--layer", 3], "choose from [0, 1, 2]"),
        (["inspect", "--head", 2], "heads 0 to 1"),
        (["inspect", "--side", "q"], 'side is "k" or "v"'),
        (["eval", "run", "--method", "fourier:budget=0.001", "--task", "needle"], "less than fourier can do"),
        (["eval", "run", "--method", "dense:budget=0.5", "--task", "needle"], "dense keeps everything"),
        (["eval", "run", "--method", "fourier", "--profile", "absent.json", "--task", "needle"], "no profile at"),
        (["calibrate", "--tokens", 900], "windows of 900 tokens exceed the model's context of 512"),
        (["calibrate", "--tokens", 200], "a window cannot have 256 scored"),
        (["calibrate", "--tokens", 400, "--windows", 1], "need at least as many windows"),
        (["chat", "--budget", "0.001"], "less than fourier can do"),
        (["demo", "--budget", "lots"], "'lots'"),
    ],
    ids=lambda value: " ".join(map(str, value[:4])) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_one_command_is_said_before_weights_are_loaded(
    folder, text, tmp_path, no_weights, arguments, message
):
    model = {"demo": [], "chat": [folder], "calibrate": [folder]}.get(arguments[0], ["--model", folder])
    rest = {
        "eval": ["--out", tmp_path / "out"],
        "inspect": ["--file", text, "--tokens", 100],
        "calibrate": ["--text", text, "--text", text, "--out", tmp_path / "profile.json"],
    }
    assert message in refused(*arguments, *model, *rest.get(arguments[0], []))


def test_a_model_that_no_cache_serves_is_refused_before_its_weights_are_loaded(folder, no_weights, monkeypatch):
    def unsupported(model):
        raise NotImplementedError(f"{type(model).__name__} does something else")

    monkeypatch.setattr("longwave.build.check_supported", unsupported)
    assert "LlamaForCausalLM does something else" in refused("generate", "Hello", "--model", folder)


def test_the_type_is_said(folder, text, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    prompt = ["generate", "Hello", "--model", folder, "--max-new-tokens", 3]
    assert "in bfloat16 on cpu" in succeeds(*prompt).stderr
    assert "in float32 on cpu" in succeeds(*prompt, "--dtype", "float32").stderr
    answer = json.loads(succeeds(*prompt, "--json").stdout)
    assert (answer["dtype"], answer["device"]) == ("bfloat16", "cpu")
    seen = succeeds("inspect", "--file", text, "--tokens", 100, "--model", folder, "--method", "dense").stdout
    assert " in bfloat16 after 100 tokens" in seen


def test_a_half_written_model_is_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9000])
    for command in (["generate", "Hello"], ["eval", "run", "--method", "dense", "--task", "needle:lengths=180"]):
        out = ["--out", tmp_path / "out"] if command[0] == "eval" else []
        assert "is one of its files damaged?" in refused(*command, "--model", tmp_path / "half", *out)


def test_a_chat_template_that_fails_is_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{% if messages %}")
    prompt = ["generate", "Hello", "--model", tmp_path / "chat", "--max-new-tokens", 2]
    assert "pass --no-chat" in refused(*prompt)
    succeeds(*prompt, "--no-chat")


def test_too_little_memory_is_one_line(folder, monkeypatch):
    def full(*given, **options):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB.\nSee the documentation.")

    monkeypatch.setattr("longwave.models.load", full)
    assert "too little memory (Tried to allocate 9 GiB. See" in refused("generate", "Hello", "--model", folder)


def test_numbers_that_json_has_not_are_null(capsys):
    show_json({"ratio": float("nan"), "rows": [(float("inf"), 1.5)], "parts": {"x": {"y": -math.inf}}})
    assert capsys.readouterr().out == '{"ratio": null, "rows": [[null, 1.5]], "parts": {"x": {"y": null}}}\n'


def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "longwave.cli", "--help"], capture_output=True, text=True, check=True)
    assert "Answer a prompt" in done.stdout
