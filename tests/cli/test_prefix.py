import json

import pytest
import torch
from typer.testing import CliRunner

import longwave
from longwave.cli import app
from longwave.saved import look
from tests.cli.calls import SEGMENTS, TEXT, call, refused, succeeds
from tests.conftest import into, tokens

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<answer>"


@pytest.fixture
def short(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(TEXT[:300])
    return path


@pytest.fixture
def generate(folder):
    return ["generate", "--model", folder, "--max-new-tokens", 12, "--json"]


@pytest.fixture
def save(generate, short, tmp_path):
    given = [*generate, "--file", short, "--no-measure", *SEGMENTS, "--save-prefix", tmp_path / "kept"]
    return lambda *more: json.loads(succeeds(*given, *more).stdout)


@pytest.mark.parametrize("chunk", [[], ["--prefill-chunk", 50]], ids=["whole", "chunks"])
def test_the_same_answer_without_reading_again(generate, save, tmp_path, chunk):
    first = save("What does it do?", *chunk)
    again = json.loads(succeeds(*generate, "What does it do?", "--prefix", tmp_path / "kept").stdout)
    for name in ("text", "prompt_tokens", "nbytes", "method", "tokens"):
        assert again[name] == first[name]
    other = json.loads(succeeds(*generate, "And the blue one?", "--prefix", tmp_path / "kept").stdout)
    assert other["prompt_tokens"] == first["prompt_tokens"] + 1


def test_coded(generate, save, codecs, tmp_path):
    """The first answer is from the coded file as well; another method may take what it holds."""
    path = tmp_path / "kept"
    save("What does it do?")
    exact = path.stat().st_size
    first = save("What does it do?", "--save-size", "0.15")
    assert path.stat().st_size < exact
    kept = look(path)
    assert (kept.kind, kept.tokens, kept.about) == ("coded", 300, {"chat": True})
    prefix = [*generate, "What does it do?", "--prefix", path, "--no-measure"]
    again = json.loads(succeeds(*prefix, *SEGMENTS).stdout)
    for name in ("text", "prompt_tokens", "nbytes", "method", "tokens"):
        assert again[name] == first[name]
    kivi = json.loads(succeeds(*prefix, "--method", "kivi", "-o", "group=8").stdout)
    assert kivi["method"].startswith("kivi")
    assert kivi["prompt_tokens"] == first["prompt_tokens"]
    sized = json.loads(succeeds(*prefix, *SEGMENTS, "--budget", "200KB").stdout)
    assert sized["nbytes"] <= 200_000


def test_coded_while_it_is_read(generate, save, codecs, tmp_path):
    path = tmp_path / "kept"
    first = save("What does it do?", "--save-size", "0.15", "--prefill-chunk", 50)
    assert (look(path).kind, look(path).tokens, look(path).segments) == ("coded", 300, 2)
    again = json.loads(succeeds(*generate, "What does it do?", "--prefix", path, "--no-measure", *SEGMENTS).stdout)
    assert [again[name] for name in ("text", "nbytes", "method")] == [
        first[name] for name in ("text", "nbytes", "method")
    ]


def test_what_cannot_be_coded_is_refused_before_it_is_read(generate, short, codecs, tmp_path, monkeypatch):
    monkeypatch.setattr("longwave.cli.prefix.read_prefix", lambda *_: pytest.fail("the text is read"))
    given = [*generate, "What?", "--file", short, "--no-measure", "--save-prefix", tmp_path / "kept"]
    for more, words in (
        (["--save-size", "0.9"], "size is a fraction of the bytes in 16 bits"),
        (["--save-size", "little"], "a budget is a fraction"),
        (["--save-size", "1MB", "--prefill-chunk", 50], "is a fraction with --prefill-chunk"),
        (["--save-size", "0.1", "--method", "h2o"], "needs the attention that each token got"),
    ):
        result = call(*given, *more)  # beside it stderr says what is fitted, and how the method is planned
        assert result.exit_code == 2
        assert words in result.stderr.splitlines()[-1]
    assert "--save-size codes what --save-prefix keeps" in refused(*generate, "What?", "--save-size", 0.1)
    assert not (tmp_path / "kept").exists()


def test_in_a_chat_template(folder, generate, save, tmp_path):
    settings = folder / "chat_template.jinja"
    settings.write_text(CHAT)
    try:
        first = save("What?")
        again = json.loads(succeeds(*generate, "What?", "--prefix", tmp_path / "kept").stdout)
        plain = save("What?", "--no-chat")
    finally:
        settings.unlink()
    assert again["text"] == first["text"]
    assert first["prompt_tokens"] == len("<user></><answer>") + plain["prompt_tokens"]
    assert look(tmp_path / "kept").about == {"chat": False}


def test_what_does_not_go_together(generate, save, short, tmp_path):
    save("What?")
    kept = ["--prefix", tmp_path / "kept"]
    for given, words in (
        ([*kept], "a PROMPT goes with --prefix"),
        (["What?", "--save-prefix", tmp_path / "more"], "give one"),
        (["--file", short, "--save-prefix", tmp_path / "more"], "a PROMPT goes with"),
        (["What?", *kept, "--file", short], "give one of the two"),
        (["What?", *kept, "--method", "kivi"], "--method was decided"),
        (["What?", *kept, "--budget", 0.5], "--budget was decided"),
        (["What?", *kept, "--no-chat"], "--chat/--no-chat was decided"),
        (["What?", "--prefix", short], "is not a saved cache"),
        (["What?", "--prefix", tmp_path / "absent"], "absent"),
    ):
        assert words in refused(*generate, *given)
    assert not (tmp_path / "more").exists()


def test_a_file_that_no_command_wrote(models, generate, tmp_path):
    model = models["llama"][0]
    memory = longwave.cache(model, "dense")
    with torch.no_grad():
        model(tokens(1, 20), **into(memory))
    longwave.save(memory, tokens(1, 20), tmp_path / "own", exact=True)
    assert "was not saved by `longwave generate" in refused(*generate, "What?", "--prefix", tmp_path / "own")


def test_inspect_a_saved_file(save, tmp_path):
    save("What?")
    path = tmp_path / "kept"
    found = json.loads(succeeds("inspect", path, "--json").stdout)
    assert (found["kind"], found["tokens"], found["rows"]) == ("exact", 300, [300])
    assert found["nbytes"] == path.stat().st_size
    assert found["ratio"] == found["nbytes"] / found["dense_nbytes"]
    assert found["dense_nbytes"] == 300 * 3 * 2 * 2 * 8 * 4
    cells = dict(line.split("\t") for line in succeeds("inspect", path).stdout.splitlines())
    assert cells["tokens"] == "300"
    assert cells["method"].startswith("fourier(")
    path.write_bytes(path.read_bytes()[:-3])
    assert "is cut" in refused("inspect", path)
    assert CliRunner().invoke(app, ["inspect", "--help"]).exit_code == 0
