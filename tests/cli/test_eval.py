import json
import shutil
import sys
from dataclasses import fields

import pytest

from longwave.evals import causal, contexts
from longwave.evals.results import load
from longwave.evals.tasks import TASKS
from longwave.methods import METHODS
from tests.cli.calls import call, refused, succeeds
from tests.conftest import DATA
from tests.evals.test_results import contents

FOURIER = "fourier:budget=1,segment=16,window=16"


@pytest.fixture
def task(hay):
    return f"needle:lengths=180,200,depths=0.1,0.9,haystack={hay}"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def evaluate(folder, out):
    return ["eval", "run", "--model", folder, "--out", out]


# what can be wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", ""], 'a method or task is NAME or NAME:option=value,option=value; got ""'),
        (["--method", "furier"], "did you mean 'fourier'?"),
        (["--method", "xyz"], f"choose from {', '.join(METHODS)}"),
        (["--method", "fourier:segmnt=3"], "did you mean 'segment'?"),
        (["--method", "fourier:window=many"], "window is a whole number of tokens, at least 1; got 'many'"),
        (["--method", "fourier:budget=lots"], "'lots'"),
        (["--method", "fourier:budget=1KB"], "smallest that fourier can do"),
        (["--method", "fourier:budget=0.001"], "less than fourier can do"),
        (["--method", "fourier:plan=measured"], "longwave calibrate"),
        (["--method", "fourier", "--profile", "absent.json"], "no profile at absent.json"),
        (["--method", "dense", "--method", "dense"], "dense is given twice"),
        (["--task", "nedle"], "did you mean 'needle'?"),
        (["--task", "needle:lenghts=180"], "did you mean 'lengths'?"),
        (["--task", "needle:"], 'got "needle:"'),
        (["--task", "needle:lengths"], 'an option is NAME=VALUE, got "lengths"'),
        (["--task", "needle:lengths=abc"], "lengths are ints separated by commas, got 'abc'"),
        (["--task", "needle:lengths=180,depths=deep"], "depths are floats separated by commas, got 'deep'"),
        (["--task", "needle:lengths=180,depths=1.5"], "depths are shares from 0 to 1, got 1.5"),
        (["--task", "needle:lengths=50"], "leaves no room"),
        (["--task", "needle:lengths=180,haystack=/nowhere.txt"], "there is no file '/nowhere.txt'"),
        (["--task", "needle:lengths=510"], "choose a shorter length, or a model with a longer window"),
        (["--task", "needle:lengths=180", "--task", "needle:lengths=180"], "needle:lengths=180 is given twice"),
        (["--limit", "0"], "limit is a whole number, at least 1; got 0"),
        (["--batch", "0"], "batch is a whole number, at least 1; got 0"),
        (["--batch-tokens=-1"], "batch_tokens is a whole number, at least 1; got -1"),
        (["--max-tokens", "0"], "max_tokens is a whole number, at least 1; got 0"),
        (["--question", "sideways"], "question is one of after, inside, with; got 'sideways'"),
        (["--dtype", "int8"], "dtype is one of auto, float32"),
        (["--device", "toaster"], "cannot use device 'toaster'"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--data", "/nowhere/data"], "there is no data folder /nowhere/data"),
        (["--recipe", "absent.yaml"], "absent.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_say_what_is_wrong_and_write_nothing(evaluate, hay, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(contexts, "prefill", lambda *given: pytest.fail("measured something"))
    complete = [*evaluate, *arguments]
    for flag, value in (("--method", "dense"), ("--task", f"needle:lengths=180,haystack={hay}")):
        complete += [] if flag in arguments else [flag, value]
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert message in refused(*complete)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["hay.txt"]


def test_nothing_to_do(evaluate, folder, out):
    assert "there are no methods to measure: give at least one --method" in refused(*evaluate, "--task", "needle")
    assert "there are no tasks to measure: give at least one --task" in refused(*evaluate, "--method", "dense")
    arguments = ["eval", "run", "--model", folder, "--method", "dense", "--task", "needle"]
    assert "name a folder for the results: --out DIR" in refused(*arguments)
    assert not out.exists()


@pytest.mark.parametrize("text", ["methods: [dense", "- dense", "", "methodz: [dense]", "limit: 0", "out: 5"])
def test_bad_recipes_write_nothing(evaluate, task, tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    arguments = [*evaluate, "--method", "dense", "--task", task, "--recipe", tmp_path / "recipe.yaml"]
    if text == "out: 5":
        arguments = [argument for argument in arguments if argument not in ("--out", evaluate[-1])]
    refused(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hay.txt", "recipe.yaml"]


def test_short_haystack(evaluate, hay, out):
    hay.write_text("Too short.")
    message = refused(*evaluate, "--method", "dense", "--task", f"needle:lengths=180,haystack={hay}")
    assert "too few for a length of 180" in message
    assert not out.exists()


@pytest.mark.skipif(not DATA.exists(), reason="without the data folder another message comes first")
def test_data_that_is_not_in_the_folder(evaluate, out, tmp_path):
    arguments = ["--method", "dense", "--task", "needle:lengths=180,haystack=essays", "--data", tmp_path]
    assert f"needs {tmp_path / 'haystack_pd'}, which does not exist" in refused(*evaluate, *arguments)
    assert not out.exists()


def test_a_missing_package_is_named(evaluate, task, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("limit: 1\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    arguments = [*evaluate, "--method", "dense", "--task", task, "--recipe", tmp_path / "recipe.yaml"]
    assert refused(*arguments) == "longwave: yaml is not installed: pip install 'longwave[eval]'\n"


def test_a_missing_part_of_longwave_is_a_bug_and_keeps_its_traceback(evaluate, task, monkeypatch):
    monkeypatch.setitem(sys.modules, "longwave.evals.recipe", None)
    assert isinstance(call(*evaluate, "--method", "dense", "--task", task).exception, ModuleNotFoundError)


# what is printed


def test_run_prints_a_plain_table(evaluate, task, out):
    result = succeeds(*evaluate, "--method", "dense", "--method", FOURIER, "--task", task)
    *table, path = [line.split("\t") for line in result.stdout.splitlines()]
    assert path == [str(out / "samples.jsonl")]
    assert table[0] == ["task", "set", "method", "score", "95 %", "samples", "bytes ratio"]
    assert [tuple(cells[:3]) for cells in table[1:]] == [
        (task, column, method) for column in ("", "180", "200") for method in ("dense", FOURIER)
    ]
    assert [cells[5] for cells in table[1:]] == ["4", "4", "2", "2", "2", "2"]
    rows = [row for row in load(out).rows if row["method"] == FOURIER]
    assert table[2][6] == f"{sum(row['bytes'] for row in rows) / sum(row['dense_bytes'] for row in rows):.3f}"
    for cells in table[1:]:
        assert 0 <= float(cells[3]) <= 100
        assert cells[4] == ""  # too few samples for an interval
    assert result.stderr == ""


def test_a_tokenizer_that_names_no_padding_fills_rows_up(folder, tokenizer, task, out, tmp_path):
    """Nor an end of text. Rows of two lengths share a pass, and are what they are alone."""
    shutil.copytree(folder, tmp_path / "bare")
    type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "bare")
    arguments = ["eval", "run", "--model", tmp_path / "bare", "--method", "dense", "--task", task.replace("180", "195")]
    succeeds(*arguments, "--out", out)
    succeeds(*arguments, "--out", tmp_path / "alone", "--batch", 1)
    outputs = [{row["id"]: row["output"] for row in load(results).rows} for results in (out, tmp_path / "alone")]
    assert outputs[0] == outputs[1]
    assert {row["rows"] for row in load(out).rows} == {4}


def test_run_prints_json(evaluate, task, out):
    result = succeeds(*evaluate, "--method", "dense", "--method", FOURIER, "--task", task, "--json")
    lines = json.loads(result.stdout)
    assert [(line["column"], line["method"], line["count"]) for line in lines[:2]] == [
        ("", "dense", 4),
        ("", FOURIER, 4),
    ]
    assert len(lines) == 6
    assert lines[1]["over"] == lines[1]["value"] - lines[0]["value"]
    rows = load(out).rows
    assert lines[0]["value"] == 100 * sum(r["score"] for r in rows if r["method"] == "dense") / 4


def test_a_second_run_measures_nothing_and_prints_the_same(evaluate, task, out, monkeypatch):
    arguments = [*evaluate, "--method", "dense", "--method", FOURIER, "--task", task]
    first = succeeds(*arguments)
    samples = (out / "samples.jsonl").read_bytes()
    monkeypatch.setattr(contexts, "prefill", lambda *given: pytest.fail("read a context again"))
    monkeypatch.setattr(causal, "run_text", lambda *given: pytest.fail("measured again"))
    assert succeeds(*arguments).stdout == first.stdout
    assert (out / "samples.jsonl").read_bytes() == samples


def test_a_run_shows_all_that_its_folder_holds(evaluate, task, hay):
    succeeds(*evaluate, "--method", "dense", "--task", task)
    loss = f"perplexity:lengths=200,scored=40,windows=1,text={hay}"
    lines = json.loads(succeeds(*evaluate, "--method", FOURIER, "--task", loss, "--json").stdout)
    assert [(line["task"], line["method"]) for line in lines] == [(task, "dense")] * 3 + [(loss, FOURIER)]


def test_a_recipe_writes_what_flags_write(folder, task, hay, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"""
        model: {folder}
        methods: [dense, {{name: fourier, budget: 1, segment: 16, window: 16}}]
        tasks:
          - name: needle
            lengths: [180, 200]
            depths: [0.1, 0.9]
            haystack: {hay}
        limit: 1
        batch: 1
        """
    )
    flags = ["--model", folder, "--method", "dense", "--method", FOURIER, "--task", task, "--limit", 1, "--batch", 1]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    succeeds("eval", "run", "--recipe", tmp_path / "recipe.yaml", "--out", one)
    succeeds("eval", "run", *flags, "--out", two)
    headers, rows = [], []
    for folder_of in (one, two):
        loaded = load(folder_of)
        (run,) = loaded.header["runs"]
        del run["command"], run["started"]
        headers.append(loaded.header)
        rows.append([{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in loaded.rows])
    assert headers[0] == headers[1]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
    won = ["--limit", 2, "--seed", 7, "--method", "dense", "--no-chat"]
    succeeds("eval", "run", "--recipe", tmp_path / "recipe.yaml", "--out", three, *won)
    loaded = load(three)
    assert list(loaded.header["methods"]) == ["dense"]
    assert (loaded.header["seed"], loaded.header["chat"], loaded.header["runs"][0]["limit"]) == (7, False, 2)
    assert list(loaded.header["tasks"]) == [task]
    assert len(loaded.rows) == 4


def test_the_command_is_kept_so_that_a_shell_can_run_it(evaluate, task, out, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/longwave", "eval", "run", "--out", "a b"])
    succeeds(*evaluate, "--method", "dense", "--task", task, "--limit", 1)
    assert load(out).header["runs"][0]["command"] == "longwave eval run --out 'a b'"


# ls


def test_ls_lists_every_task_and_method():
    plain = [line.split("\t") for line in succeeds("eval", "ls").stdout.splitlines()]
    split = plain.index(["method", "what", "options"])
    assert plain[0] == ["task", "version", "what", "options"]
    tasks, methods = plain[1:split], plain[split + 1 :]
    assert [cells[0] for cells in tasks] == list(TASKS)
    assert [cells[0] for cells in methods] == [*METHODS, "transformers-quantized"]
    for name, version, what, options in tasks:
        assert int(version) == TASKS[name].version
        assert what == TASKS[name].__doc__.splitlines()[0]
        assert options.split(", ") == [option.name for option in fields(TASKS[name])]
    for _, what, options in methods:
        assert what
        assert "_kept" not in options
    shown = json.loads(succeeds("eval", "ls", "--json").stdout)
    assert [[t["task"], str(t["version"]), t["what"], ", ".join(t["options"])] for t in shown["tasks"]] == tasks
    assert [[m["method"], m["what"], ", ".join(m["options"])] for m in shown["methods"]] == methods
    assert {"lengths", "depths", "haystack"} <= set(shown["tasks"][0]["options"])


def test_every_task_says_what_it_is_in_one_line():
    for name, cls in TASKS.items():
        first = cls.__doc__.splitlines()[0]
        assert first.endswith("."), name
        assert not first.startswith(cls.__name__ + "("), f"{name} has only the docstring dataclass gives"


def test_help():
    for command in ("run", "ls", "report"):
        assert command in succeeds("eval", "--help").stdout


def test_an_extended_model_is_told_from_a_plain_one(evaluate, out, hay):
    run = [*evaluate, "--method", "dense", "--task", f"needle:lengths=180,haystack={hay}"]
    assert "rotary base 10,000 x 11" in succeeds(*run, "--extend-to", 2048).stderr
    header = json.loads((out / "run.json").read_text())
    assert (header["window"], header["extension"]) == (2048, "ntk from 512 tokens")
    assert "results of extension 'ntk from 512 tokens', not None" in refused(*run)
    succeeds("eval", "report", out)
    assert "a window of 2,048 tokens (rotary tables extended by ntk from 512 tokens)" in (out / "report.md").read_text()
