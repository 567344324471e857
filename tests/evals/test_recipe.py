import json
from pathlib import Path

import pytest

import longwave
from longwave.evals import runner
from longwave.evals.recipe import (
    Recipe,
    check_names,
    evaluate,
    in_words,
    make_methods,
    make_recipe,
    prepare,
    read_recipe,
)
from longwave.evals.results import load
from longwave.evals.spec import parse_spec
from longwave.evals.task import Setting
from longwave.evals.tasks import get_task
from longwave.methods import METHODS
from longwave.plan.axes import place
from tests.conftest import own_axes, random_profile, shape_of

SMALL = "segment=16,window=16"


@pytest.fixture
def loader(llama, tokenizer):
    return lambda model, device, dtype: (llama, tokenizer)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
        return path

    return write


def recipe(**changes):
    return Recipe(**{"out": "out", "methods": ["dense"], "tasks": ["needle"], **changes})


# recipes


def test_a_recipe_says_what_flags_say(file):
    path = file(
        """
        model: some/model
        out: results
        methods:
          - dense
          - {name: fourier, budget: 0.25, window: 64}
        tasks:
          - name: needle
            lengths: [180, 200]
            depths: [0.1, 0.9]
          - perplexity:text=pydoc
        limit: 3
        seed: 7
        max_tokens: 400
        question: with
        chat: false
        data: some/data
        device: cuda
        dtype: bfloat16
        batch: 2
        batch_tokens: 1000
        profile: my.json
        extend_to: 9000
        window: 20000
        extend_rule: yarn
        """
    )
    flags = dict(
        model="some/model",
        out=Path("results"),
        methods=["dense", "fourier:budget=0.25,window=64"],
        tasks=["needle:lengths=180,200,depths=0.1,0.9", "perplexity:text=pydoc"],
        **dict(limit=3, seed=7, max_tokens=400, question="with", chat=False, data=Path("some/data"), device="cuda"),
        **dict(
            dtype="bfloat16",
            batch=2,
            batch_tokens=1000,
            profile=Path("my.json"),
            extend_to=9000,
            extend_rule="yarn",
            window=20000,
        ),
    )
    assert make_recipe(path) == make_recipe(None, **flags)
    assert set(flags) == set(Recipe.__dataclass_fields__), "an option was added: name it in both"
    for name, value in flags.items():
        assert getattr(make_recipe(path), name) == (tuple(value) if isinstance(value, list) else value)


def test_flags_win_over_a_recipe(file):
    path = file("out: results\nmethods: [dense, fourier]\ntasks: needle\nlimit: 3\nchat: false\nseed: 1\n")
    given = make_recipe(path, out=Path("mine"), methods=["dense"], tasks=None, limit=5, chat=True, seed=None)
    assert given == recipe(out="mine", limit=5, chat=True, seed=1)
    assert make_recipe(path, limit=None).limit == 3


def test_one_entry_needs_no_list(file):
    one = make_recipe(file("out: x\nmethods: dense\ntasks: {name: needle, lengths: 180}\n"))
    assert (one.methods, one.tasks) == (("dense",), ("needle:lengths=180",))


def test_null_in_a_recipe_is_the_default(file):
    path = file("out: null\nmethods: [dense]\ntasks: [needle]\nlimit:\nseed: null\n")
    assert make_recipe(path, out=Path("out")) == recipe()
    with pytest.raises(ValueError, match="name a folder for the results: --out DIR"):
        make_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [dense]", "has no key 'method' to set; did you mean 'methods'?"),
        ("task: needle", "did you mean 'tasks'?"),
        ("lmit: 3", "did you mean 'limit'?"),
        ("zzz: 3", "choose from out, methods, tasks, model"),
        ("5: 3", "has no key 5"),
        ("methods: [dense", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("\x07", "is not YAML"),
        ("- dense\n", "is not a recipe: it has to be a mapping"),
        ("", "is not a recipe"),
        ("dense", "is not a recipe"),
        (b"model: caf\xe9", "is not UTF-8 text"),
    ],
)
def test_bad_recipes(file, text, message):
    with pytest.raises(ValueError) as error:
        read_recipe(file(text))
    assert "recipe.yaml" in str(error.value)
    assert message in str(error.value)


def test_missing_recipe(tmp_path):
    with pytest.raises(OSError, match=r"absent\.yaml"):
        read_recipe(tmp_path / "absent.yaml")
    with pytest.raises(OSError):
        read_recipe(tmp_path)


# values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "there are no methods to measure: give at least one --method"),
        ({"methods": None}, "there are no methods"),
        ({"tasks": ()}, "there are no tasks to measure: give at least one --task"),
        ({"methods": 5}, "methods is a list, got 5"),
        ({"tasks": True}, "tasks is a list, got True"),
        ({"methods": ["dense", None]}, "a text or a mapping with a name, got None"),
        ({"methods": ["dense", "fourier", "dense"]}, "dense is given twice"),
        ({"methods": ["dense", " dense"]}, "dense is given twice"),
        ({"tasks": ["needle:lengths=180", {"name": "needle", "lengths": 180}]}, "needle:lengths=180 is given twice"),
        ({"limit": 0}, "limit is a whole number, at least 1; got 0"),
        ({"limit": 2.5}, "limit is a whole number, at least 1; got 2.5"),
        ({"limit": True}, "limit is a whole number, at least 1; got True"),
        ({"limit": "3"}, "limit is a whole number, at least 1; got '3'"),
        ({"max_tokens": -1}, "max_tokens is a whole number, at least 1; got -1"),
        ({"batch": 0}, "batch is a whole number, at least 1; got 0"),
        ({"batch_tokens": 0}, "batch_tokens is a whole number, at least 1; got 0"),
        ({"batch": None}, "batch is a whole number, at least 1; got None"),
        ({"seed": "x"}, "seed is a whole number; got 'x'"),
        ({"question": "sideways"}, "question is one of after, inside, with; got 'sideways'"),
        ({"question": None}, "question is one of after, inside, with; got None"),
        ({"out": 5}, "out is a path, got 5"),
        ({"data": ["a"]}, "data is a path, got ['a']"),
        ({"profile": 0}, "profile is a path, got 0"),
        ({"model": 3}, "model is a text, got 3"),
        ({"device": None}, "device is a text, got None"),
        ({"dtype": ["float32"]}, "dtype is a text, got ['float32']"),
        ({"chat": "no"}, "chat is true or false, got 'no'"),
    ],
    ids=repr,
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError) as error:
        recipe(**changes)
    assert message in str(error.value)


def test_a_negative_seed_is_a_seed():
    assert recipe(seed=-1).seed == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["furier"]}, "unknown method 'furier'; did you mean 'fourier'?"),
        ({"methods": ["fourier:segmnt=3"]}, "fourier has no option 'segmnt'; did you mean 'segment'?"),
        ({"methods": ["fourier:_kept=3"]}, "no option '_kept'"),
        ({"methods": ["fourier:profile=a.json"]}, "no option 'profile'"),
        ({"methods": ["fourier:budget=lots"]}, "got 'lots'"),
        ({"methods": ["fourier:budget=0.25,0.5"]}, "got (0.25, 0.5)"),
        ({"methods": ["fourier:budget=0"]}, "a budget is a fraction"),
        ({"methods": ["fourier:segment=12"]}, "segment is a multiple of 8, got 12"),
        ({"methods": ["fourier-paper:states=7"]}, "states must be even; got 7"),
        ({"methods": ["fourier-paper:segment=8"]}, "fourier-paper has no option 'segment'"),
        ({"tasks": ["nedle"]}, "unknown task 'nedle'; did you mean 'needle'?"),
        ({"tasks": ["needle:lenghts=180"]}, "needle has no option 'lenghts'; did you mean 'lengths'?"),
        ({"tasks": ["needle:lengths=abc"]}, "lengths are ints separated by commas, got 'abc'"),
        ({"tasks": ["needle:"]}, 'got "needle:"'),
        ({"tasks": ["needle:lengths"]}, 'an option is NAME=VALUE, got "lengths"'),
        ({"tasks": ["needle:depths=1.5"]}, "depths are shares from 0 to 1, got 1.5"),
    ],
    ids=repr,
)
def test_names_are_checked_before_a_model_is_loaded(changes, message):
    def never(*arguments):
        pytest.fail("loaded a model")

    with pytest.raises(ValueError) as error:
        evaluate(recipe(**changes), never)
    assert message in str(error.value)


def test_a_missing_data_folder_is_found_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="there is no data folder"):
        evaluate(recipe(data=tmp_path / "absent"), lambda *arguments: pytest.fail("loaded a model"))


def test_tasks_keep_their_labels():
    tasks = check_names(recipe(tasks=["needle:lengths=180,200", "needle"]))
    needle = get_task("needle", lengths=(180, 200)), None
    assert tasks == {"needle:lengths=180,200": needle, "needle": (get_task("needle"), None)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("needle:question=with", "needle:question=with: the question of a task is one of after, inside; got 'with'"),
        ("needle:question=1", "is one of after, inside; got 1"),
        ("divergence:question=inside", "divergence asks no question, so it takes no option question"),
    ],
)
def test_the_question_of_a_task(spec, message):
    with pytest.raises(ValueError, match=message):
        check_names(recipe(tasks=[spec]))


# methods


def test_methods_are_built_before_anything_is_measured(llama):
    makers, words, rows = make_methods(llama, recipe(methods=["dense", f"fourier:budget=1,{SMALL}"]))
    assert rows == 8
    assert list(makers) == list(words) == ["dense", f"fourier:budget=1,{SMALL}"]
    assert [make(3).method.method.name for make in makers.values()] == ["dense", "fourier"]
    assert makers["dense"](1) is not makers["dense"](1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (f"fourier:budget=1KB,{SMALL}", "the smallest that fourier can do is"),
        (f"fourier:budget=0.01,{SMALL}", "is less than fourier can do"),
        (f"fourier:plan=bits,{SMALL}", "longwave calibrate"),
        (f"fourier:plan=measured,{SMALL}", "longwave calibrate"),
        ("dense:budget=1KB", "the smallest that dense can do is"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_measured(
    loader, hay, tmp_path, monkeypatch, method, message
):
    monkeypatch.setattr(runner, "run", lambda *arguments: pytest.fail("measured"))
    wanted = recipe(methods=["dense", method], tasks=[f"needle:lengths=180,haystack={hay}"], out=tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        evaluate(wanted, loader)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("budget", "rows"), [("1MB", 1), ("100KB", 1), ("1", 8), ("100%", 8), ("None", 8)])
def test_a_size_makes_batches_of_one_row(llama, tmp_path, budget, rows):
    random_profile(llama).save(tmp_path / "p.json")
    wanted = recipe(methods=["dense", f"fourier:budget={budget},{SMALL}"], profile=tmp_path / "p.json")
    assert make_methods(llama, wanted)[2] == rows


@pytest.mark.parametrize("method", ["fourier:budget=0.5,segment=16,window=16", "fourier-paper"])
def test_words_tell_what_is_kept(llama, method):
    def words(seed):
        name, options = parse_spec(method)
        return in_words(longwave.cache(llama, name, profile=random_profile(llama, seed), **options).method)

    assert words(0) == words(0) != words(1)


def test_words_of_other_methods(llama):
    assert in_words(longwave.cache(llama, "dense").method) == "dense"
    assert in_words(longwave.cache(llama, "kivi", bits=4).method).startswith("kivi(K 4 V 4 bits")


# samples


def test_errors_of_samples_name_the_task(tokenizer, hay):
    tasks = {"short": get_task("needle", lengths=180, haystack=str(hay)), "long": get_task("needle", lengths=600)}
    setting = Setting(tokenizer, window=512)
    with pytest.raises(
        ValueError, match=r"^long: needle at 600 takes 600 tokens and 8 new ones, more than this model's"
    ):
        prepare(tasks, setting)
    assert [len(samples) for _, samples in prepare({"short": tasks["short"]}, setting).values()] == [5]


def test_a_task_without_samples(tokenizer, monkeypatch):
    task = get_task("needle")
    monkeypatch.setattr(type(task), "samples", lambda self, setting: [])
    with pytest.raises(ValueError, match="empty has no samples"):
        prepare({"empty": task}, Setting(tokenizer))


# runs


def test_a_run_and_its_header(loader, hay, tmp_path):
    task = f"needle:lengths=180,depths=0.1,0.9,haystack={hay}"
    seen = []
    wanted = recipe(methods=["dense", f"fourier:budget=1,{SMALL}"], tasks=[task], out=tmp_path / "out", limit=1, seed=3)
    results = evaluate(wanted, loader, "the command", lambda *counts: seen.append(counts))
    assert results.done.keys() == {(task, method, "180/0.1/0") for method in wanted.methods}
    assert (seen[0], seen[-1]) == ((0, 2), (2, 2))
    header = load(tmp_path / "out").header
    assert {name: header[name] for name in ("model", "dtype", "window", "seed", "question", "chat", "max_tokens")} == {
        **{"model": "smollm2", "dtype": "float32", "window": 512, "seed": 3, "question": "after"},
        **{"chat": True, "max_tokens": None},
    }
    assert header["chat_template"] is None
    assert header["methods"]["dense"] == "dense"
    options = {"lengths": [180], "depths": [0.1, 0.9], "repeats": 1, "kind": "number", "haystack": str(hay)}
    assert header["tasks"] == {task: {"name": "needle", "version": 1, "options": options}}
    (run,) = header["runs"]
    assert (run["command"], run["limit"], run["batch"], run["batch_tokens"]) == ("the command", 1, 8, 16384)
    assert run["longwave"] == longwave.__version__


FAMILY = (
    *("tova", "treekv", "weightedkv", "cam", "knorm", "pyramidkv", "adakv", "expected_attention", "sirllm", "kvzip"),
    "attention_matching",
    "sparse_dllm",
)


def test_every_method_is_measured_from_one_reading(loader, llama, hay, tmp_path, monkeypatch):
    """Those that look at the prompt included; the profile goes to those alone that use one."""
    random_profile(llama).save(tmp_path / "p.json")
    methods = ["fourier-paper:keep=0.5,states=20,window=16", f"fourier:{SMALL}", "kivi:bits=4,group=8,window=16"]
    methods += ["streaming:window=16,tokens=40", "snapkv:window=16,tokens=40", "h2o:window=16,tokens=40"]
    methods += [f"{name}:window=16,tokens=40" for name in FAMILY]
    own_axes(llama).save(place(llama, shape_of(llama), 2))  # its tokenizer is not to be found
    methods += ["think:sinks=0,window=4,queries=4,ratio=0.75", "palu:window=16"]
    methods += ["speckv:window=16,tokens=40,ahead=0", "quest:window=16,chunk=8"]
    methods += ["longcache:sinks=4,window=32,spans=8,span=8,chunk=32"]
    methods += ["infllm:sinks=4,window=32,block=8,blocks=4,chunk=16", "longheads:chunk=16,chunks=4"]
    methods += ["actqkv:sinks=4,window=32,block=8,blocks=4,chunk=16,warm=2"]
    methods += ["lm_infinite:window=16", "self_extend:window=16,group=4", "dual_chunk:chunk=32,window=8", "dense"]
    assert {parse_spec(method)[0] for method in methods} == set(METHODS), "a method was added: measure it here"
    read = []
    real = runner.prefill
    monkeypatch.setattr(runner, "prefill", lambda model, ids, *more: read.append(ids.shape) or real(model, ids, *more))
    task = f"needle:lengths=200,depths=0.1,0.9,haystack={hay}"
    wanted = recipe(methods=methods, tasks=[task], out=tmp_path / "out", profile=tmp_path / "p.json")
    evaluate(wanted, loader)
    loaded = load(tmp_path / "out")
    assert [row["method"] for row in loaded.rows] == [method for method in methods for _ in range(2)]
    assert len(read) == 1
    assert list(loaded.header["methods"]) == methods
    held = {row["method"]: row["bytes"] / row["dense_bytes"] for row in loaded.rows}
    assert {method for method, ratio in held.items() if ratio < 1} == set(methods[1:-9])  # at 200 tokens


def test_a_size_bounds_every_row_of_a_run(loader, llama, hay, tmp_path):
    random_profile(llama).save(tmp_path / "p.json")
    methods = ["dense", f"fourier:budget=100KB,{SMALL}"]
    task = f"needle:lengths=200,depths=0.1,0.9,haystack={hay}"
    evaluate(recipe(methods=methods, tasks=[task], out=tmp_path / "out", profile=tmp_path / "p.json"), loader)
    loaded = load(tmp_path / "out")
    assert [(row["method"], row["rows"]) for row in loaded.rows] == [(m, 1) for m in methods] * 2
    assert all(row["bytes"] <= 100_000 for row in loaded.rows if row["method"] == methods[1])
    assert loaded.header["runs"][0]["batch"] == 1


def test_prompts_may_be_longer_than_the_model_says_it_reads(loader, hay, tmp_path):
    """For methods that read beyond it. What run.json says of the window is what prompts were made for."""
    wanted = dict(methods=("lm_infinite:sinks=2,window=64",), tasks=(f"needle:lengths=600,depths=0.5,haystack={hay}",))
    with pytest.raises(ValueError, match="more than this model's window of 512"):
        evaluate(recipe(out=tmp_path / "no", **wanted), loader)
    evaluate(recipe(out=tmp_path / "yes", window=700, **wanted), loader)
    found = load(tmp_path / "yes")
    assert [row["context"] > 512 for row in found.rows] == [True]
    assert found.header["window"] == 700


@pytest.mark.parametrize("suffix", ["", ",kind=classic"])
def test_a_seed_makes_other_prompts(loader, hay, tmp_path, suffix):
    data = tmp_path / "data"
    (data / "needles").mkdir(parents=True)
    one = {"needle": " A dog sat in the park.", "question": "Who sat in the park?", "keywords": ["dog"]}
    (data / "needles" / "classic.json").write_text(json.dumps({"single": one}))
    prompts = []
    for number, seed in enumerate((1, 1, 2)):
        task = f"needle:lengths=200,depths=0.5,haystack={hay}{suffix}"
        wanted = recipe(tasks=[task], out=tmp_path / str(number), seed=seed, data=data)
        evaluate(wanted, loader)
        prompts.append([row["prompt"] for row in load(tmp_path / str(number)).rows])
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_same_prompts_with_the_question_compressed_or_not(loader, hay, tmp_path):
    """A task says it for itself, or the run for all; the last token is fed later in any case."""
    task = f"needle:lengths=180,depths=0.1,0.9,haystack={hay}"
    wanted = recipe(tasks=[task, f"{task},question=inside"], out=tmp_path / "both")
    evaluate(wanted, loader)
    loaded = load(tmp_path / "both")
    assert [told.get("question") for told in loaded.header["tasks"].values()] == [None, "inside"]
    after, inside = ([row for row in loaded.rows if row["task"] == label] for label in wanted.tasks)
    assert [row["prompt"] for row in after] == [row["prompt"] for row in inside]
    assert all(row["context"] < row["tokens"] - 1 for row in after)
    assert [row["context"] for row in inside] == [row["tokens"] - 1 for row in inside]
    evaluate(recipe(tasks=[task], out=tmp_path / "all", question="inside"), loader)
    assert [row["context"] for row in load(tmp_path / "all").rows] == [row["context"] for row in inside]
    with pytest.raises(ValueError, match="leave the option question out of needle:question=inside"):
        evaluate(recipe(tasks=["needle:question=inside"], question="with"), lambda *given: pytest.fail("loaded"))


def test_reading_with_the_question_is_for_tasks_that_ask(folder, tmp_path):
    wanted = make_recipe(None, out=tmp_path / "out", methods=("dense",), tasks=("divergence",), question="with")
    with pytest.raises(ValueError, match="question=with is for tasks that ask: divergence has none"):
        evaluate(wanted, lambda *given: pytest.fail("the model was loaded"))
    assert not (tmp_path / "out").exists()
