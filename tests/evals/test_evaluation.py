import json

import pytest

import longwave
from longwave.evals import contexts, runner
from longwave.evals.evaluation import evaluate, prepare
from longwave.evals.recipe import make_recipe
from longwave.evals.results import load
from longwave.evals.spec import parse_spec
from longwave.evals.task import Setting
from longwave.evals.tasks import get_task
from longwave.methods import METHODS
from longwave.plan.axes import place
from tests.conftest import own_axes, random_profile, shape_of
from tests.evals.recipes import SMALL, recipe


def test_a_missing_data_folder_is_found_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="there is no data folder"):
        evaluate(recipe(data=tmp_path / "absent"), lambda *arguments: pytest.fail("loaded a model"))


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
    real = contexts.prefill
    monkeypatch.setattr(
        contexts, "prefill", lambda model, ids, *more: read.append(ids.shape) or real(model, ids, *more)
    )
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
