import json
import shutil
from contextlib import contextmanager

import pytest

from longwave.methods import METHODS
from longwave.methods.longcache import ReAttentionLayer
from tests.cli.calls import SEGMENTS, TEXT, refused, succeeds


@pytest.fixture
def generate(folder):
    return ["generate", "--model", folder, "--max-new-tokens", 8]


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
    assert f"choose from {', '.join(METHODS)}" in refused(*generate, "Hello", "--method", "xyz")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("segment", "a method option is NAME=VALUE, got 'segment'"),
        ("=3", "a method option is NAME=VALUE, got '=3'"),
        ("segmnt=3", "did you mean 'segment'?"),
        ("segment=4", "segment is a whole number of tokens, at least 8; got 4"),
        ("segment=12", "segment is a multiple of 8, got 12"),
        ("window=many", "window is a whole number of tokens, at least 1; got 'many'"),
        ("plan=haar", "plan is measured, uniform, bits or safe, got 'haar'"),
        ("_kept=1", "no option '_kept'"),
        ("budget=0.5", "budget"),
    ],
)
def test_bad_option(generate, option, message):
    assert message in refused(*generate, "Hello", "-o", option)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "segment=16"], "fourier-paper has no option 'segment'"),
        (["-o", "states=many"], "states is a whole number of coefficients, at least 2; got 'many'"),
        (["-o", "states=7"], "states must be even; got 7"),
        (["-o", "keep=1.5"], "share of channels from 0 to 1"),
        (["--budget", "0.5"], "takes no budget"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_of_the_paper(generate, arguments, message):
    assert message in refused(*generate, "Hello", "--method", "fourier-paper", *arguments)


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
    assert "longwave calibrate" in refused(*generate, "Hello", "-o", "plan=measured")
    assert "longwave: this model was not measured" in succeeds(*generate, "Hello").stderr


def test_missing_profile(generate, tmp_path):
    assert "no profile at" in refused(*generate, "Hello", "--profile", tmp_path / "absent.json")


def test_profile_of_another_model(generate):
    import longwave.plan.profiles

    shipped = f"{longwave.plan.profiles.__path__[0]}/smollm2.json"
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
    short = [*generate, TEXT[:40], "--budget", "1", "--max-new-tokens", 2]
    assert json.loads(succeeds(*short, "--json").stdout)["tokens_per_second"] is None
    assert "too few tokens to time decoding" in succeeds(*short).stderr


def test_the_loop_can_be_chosen(generate):
    prompt = [*generate, TEXT[:40], "--budget", "1"]
    assert json.loads(succeeds(*prompt, "--no-graph", "--json").stdout)["loop_reason"] == "--no-graph"
    assert "--graph: a graph needs CUDA" in refused(*prompt, "--graph")
    assert "--compile is for the steps of a graph, and there is none: a graph" in refused(*prompt, "--compile")


def test_what_steps_cannot_do_names_the_other_loop(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "beams")
    (tmp_path / "beams" / "generation_config.json").write_text('{"num_beams": 2}')
    prompt = ["generate", "--model", tmp_path / "beams", "--max-new-tokens", 2, TEXT[:40], "--budget", "1", "--json"]
    monkeypatch.setattr("longwave.cli.generate.why_python", lambda *_: None)  # as if on CUDA
    assert "model.generate works: pass --no-graph" in refused(*prompt)
    assert "leave out --compile" in refused(*prompt, "--compile")
    monkeypatch.undo()
    succeeds(*prompt, "--no-graph")


def test_generate_prints_the_answer_and_reports_on_stderr(generate):
    quiet = json.loads(succeeds(*generate, TEXT[:100], "--budget", "1", "--json").stdout)
    result = succeeds(*generate, TEXT[:100], "--budget", "1")
    assert result.stdout.strip() == quiet["text"].strip()
    pace, report = result.stderr.splitlines()
    assert pace.startswith("prompt read in ")
    assert " tokens a second, decoded by python (a graph needs CUDA" in pace
    assert "107 tokens x 1 rows" in report
    assert "[dense " in report  # brackets are no markup


def test_every_way_to_hold_everything_answers_alike(generate, text, tmp_path):
    (tmp_path / "part.txt").write_text(TEXT[:200])
    ways = [
        ["--method", "dense"],
        ["--budget", "1"],
        ["--budget", "100%", *SEGMENTS],
        ["--budget", "10MB", *SEGMENTS],
        ["--budget", "1", *SEGMENTS, "--prefill-chunk", "37"],
    ]
    prompt = ["--file", tmp_path / "part.txt", "And now?", "--json"]
    answers = {json.loads(succeeds(*generate, *prompt, *way).stdout)["text"] for way in ways}
    assert len(answers) == 1


def test_top_k_and_top_p_reach_the_sampling(generate):
    ways = [[], ["--temperature", "1.5", "--top-k", "1"], ["--temperature", "1.5", "--top-p", "0.0001"]]
    prompt = [*generate, TEXT[:100], "--budget", "1", "--json"]
    assert len({json.loads(succeeds(*prompt, *way).stdout)["text"] for way in ways}) == 1
    assert "give a --temperature" in refused(*prompt, "--top-k", 5)


def test_sampling_repeats_with_its_seed(generate):
    sampled = ["Hello there", "--budget", "1", "--temperature", "1.5", "--json", "--max-new-tokens", "20"]
    texts = [json.loads(succeeds(*generate, *sampled, "--seed", seed).stdout)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_bar_ends_once_the_prompt_is_read(generate, monkeypatch):
    events = []

    @contextmanager
    def reading(model, tokens, chunk):
        events.append(f"reading {tokens} tokens")
        yield lambda: events.append("done")

    monkeypatch.setattr("longwave.cli.generate.reading", reading)
    monkeypatch.setattr("transformers.TextStreamer.on_finalized_text", lambda self, text, **_: events.append("text"))
    succeeds(*generate, TEXT[:40], "--budget", "1")
    assert events[:2] == ["reading 40 tokens", "done"]
    assert "text" in events[2:]


def test_a_size_is_spent_on_this_prompt_and_its_answer(generate):
    size = [*generate, "--budget", "60KB", *SEGMENTS, "--json"]  # too small for the window of 512
    assert json.loads(succeeds(*size, TEXT[:100]).stdout)["nbytes"] <= 60_000
    said = "58.59 KiB cannot hold 1 x 497 tokens: the smallest that fourier can do is"
    assert said in refused(*size, TEXT[:490])


def test_beyond_the_trained_length(folder):
    read = ["generate", "x" * 600, "--model", folder, "--max-new-tokens", 3, "--method", "dense"]
    assert "exceed this model's context of 512" in refused(*read)
    done = succeeds(*read, "--extend-to", 2048)
    assert "longwave: 512 trained tokens extended to 2,048 by ntk: rotary base 10,000 x 11" in done.stderr
    done = succeeds(*read, "--extend-to", 2048, "--extend-rule", "yarn", "--json")
    assert json.loads(done.stdout)["prompt_tokens"] == 600
    assert "did you mean 'yarn'" in refused(*read, "--extend-to", 2048, "--extend-rule", "yarm")
    assert "give extend_to" in refused(*read, "--extend-rule", "yarn")


FAR = ["--method", "infllm", *("-o", "window=32", "-o", "chunk=16", "-o", "block=8", "-o", "blocks=2", "-o", "sinks=4")]


def test_methods_that_read_any_length_do(folder, tmp_path):
    (tmp_path / "far").write_text("x" * 700)
    read = ["generate", "--model", folder, "--max-new-tokens", 3]
    asked = [*read, "Why?", "--file", tmp_path / "far"]
    assert "--method infllm reads any length" in refused(*asked, "--method", "kivi")
    assert "context of 512" in refused(*asked, *FAR, "--budget", 1)  # all is read, as the model reads
    assert json.loads(succeeds(*asked, *FAR, "--json").stdout)["prompt_tokens"] > 700
    said = refused(*asked, "--method", "self_extend", "-o", "window=504", "-o", "group=8")
    assert "exceed the 568 that self_extend reads with this model's context of 512" in said
    kept = tmp_path / "kept"
    first = json.loads(succeeds(*asked, *FAR, "--save-prefix", kept, "--json").stdout)
    again = json.loads(succeeds(*read, "Why?", "--prefix", kept, "--json").stdout)
    assert (again["text"], again["prompt_tokens"]) == (first["text"], first["prompt_tokens"])
    (tmp_path / "near").write_text("x" * 500)
    succeeds(*read, "Why?", "--file", tmp_path / "near", "--method", "dense", "--save-prefix", kept)
    assert "context of 512" in refused(*read, "Why are there so many?", "--prefix", kept)


LOOKS = [
    "--method",
    "longcache",
    *("-o", "window=48", "-o", "chunk=16", "-o", "spans=2", "-o", "span=8", "-o", "sinks=4"),
]


def test_a_question_about_a_file_is_looked_for(folder, tmp_path, monkeypatch):
    """It comes in a pass of its own, behind the file, whatever passes the file is read in."""
    passes, seen = [], ReAttentionLayer.seen
    monkeypatch.setattr(ReAttentionLayer, "seen", lambda self, look, new: passes.append(new) or seen(self, look, new))
    (tmp_path / "far").write_text("x" * 700)
    read = ["generate", "Why?", "--file", tmp_path / "far", "--model", folder, "--max-new-tokens", 3, "--json"]
    layers = 3
    for chunk in ((), ("--prefill-chunk", 64)):
        passes.clear()
        found = json.loads(succeeds(*read, *LOOKS, "-o", "look=32", *chunk).stdout)
        assert len(passes) == layers
        assert all(2 <= new <= 32 for (new,) in passes)
        assert found["prompt_tokens"] > 700
    passes.clear()
    done = succeeds(*read, *LOOKS, "-o", "look=2")
    assert not passes
    assert "tokens is not looked for: look=2" in done.stderr


def test_layers_that_lie_coded(generate, text, codecs, tmp_path):
    (tmp_path / "short").write_text(TEXT[:300])
    given = [*generate, "--method", "dense", "-o", "offload=coded", "-o", "size=0.15", "--file", tmp_path / "short"]
    found = json.loads(succeeds(*given, "What does it do?", "--json").stdout)
    assert found["parts"]["coded"] > 0
    assert found["nbytes"] < found["dense_nbytes"]
    assert found["scratch"] > 0
    assert "leave budget=0.3 out" in refused(*given, "What does it do?", "--budget", 0.3)
    assert "coder is what codes segments" in refused(*given, "What does it do?", "-o", "coder=mine")
