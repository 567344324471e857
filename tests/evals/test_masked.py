"""A masked-diffusion model is asked as `diffusion.generate` and `loss_bound` would be, and what it cannot be asked is
refused before weights are read."""

import copy
import json
import math
from array import array

import pytest
import torch

import longwave
from longwave import diffusion, models
from longwave.evals import contexts, masked
from longwave.evals.asked import suited
from longwave.evals.evaluation import evaluate
from longwave.evals.masked import Way, answer, bound, is_masked
from longwave.evals.recipe import Recipe
from longwave.evals.report import write_report
from longwave.evals.results import load
from longwave.evals.sampling import Sampling
from longwave.evals.summary import summarise
from longwave.evals.tasks.perplexity_bound import PerplexityBound
from tests.cli.calls import refused, succeeds
from tests.conftest import random_profile
from tests.diffusion.checkpoints import LLADA, write
from tests.diffusion.conftest import MASK, build
from tests.evals.samples import sample

SMALL = "window=32,sinks=2"
FAST = "steps=4,block_length=8"


@pytest.fixture(scope="module")
def built():
    return build("llada")


@pytest.fixture
def model(built):
    return copy.deepcopy(built)


@pytest.fixture
def loader(model, tokenizer):
    return lambda *_: (model, tokenizer)


@pytest.fixture
def needle(hay):
    return f"needle:lengths=180,200,depths=0.1,0.9,haystack={hay}"


def asked(name, tokens, context, **options):
    """A sample without the mask token."""
    made = sample(name, tokens, context, **options)
    made.ids[:] = array("i", [5 if token == MASK else token for token in made.ids])
    return made


def recipe(**changes):
    return Recipe(**{"out": "out", "methods": ["dense"], "tasks": ["needle"], **changes})


def causal(folder):
    return longwave.load(folder, dtype="float32")[0]


# answers


@pytest.mark.parametrize("keep", [None, "prefix", "dual"])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_answers_are_those_of_generate(tokenizer, kind, keep):
    """A row of a padded batch as by itself, cut to what the task asks for."""
    model = build(kind)
    rows = [asked("a", 90, 80, seed=1, new=12), asked("b", 84, 70, seed=2, new=12)]
    way = Way(Sampling(steps=8, block_length=8, keep=keep), None if keep is None else maker(model))
    found = {one.id: (text, cost) for one, text, cost in answer(model, tokenizer, rows, way)}
    for one in rows:
        ids = torch.tensor([list(one.ids)])
        held = {} if keep is None else {"cache": maker(model)(1), "keep": keep}
        made = diffusion.generate(model, ids, max_new_tokens=16, block_length=8, steps=8, stop_ids=(), **held)
        text, cost = found[one.id]
        assert text == tokenizer.decode(made[0, ids.shape[1] :][:12], skip_special_tokens=True)
        assert (cost["new_tokens"], cost["steps"], cost["rows"]) == (12, 8, 2)
        assert 2 <= cost["passes"] <= 8
        if keep is None:
            token = 2 * model.config.num_hidden_layers * 2 * 8 * 4  # K and V, layers, heads, channels, float32
            assert (cost["bytes"], cost["dense_bytes"]) == (0, token * (len(one.ids) + 16))
        else:
            assert cost["bytes"] > 0


def maker(model):
    return lambda rows: longwave.cache(model, "snapkv", 0.5, window=32, sinks=2)


def test_dense_that_is_held_has_the_bytes_of_dense(model, tokenizer):
    way = Way(Sampling(block_length=8, keep="prefix"), lambda rows: longwave.cache(model, "dense"))
    ((_, _, cost),) = answer(model, tokenizer, [asked("a", 90, 80, new=16)], way)
    assert cost["dense_bytes"] == 2 * 3 * 2 * 8 * 4 * (90 + 8)  # what comes before the last block
    assert cost["bytes"] >= cost["dense_bytes"]


def test_a_newline_ends_an_answer_but_does_not_begin_it(model, tokenizer, monkeypatch):
    """The criterion is asked of the answer's tokens alone, whatever a prompt ends in."""
    given = {}
    real = masked.blocks
    monkeypatch.setattr(masked, "blocks", lambda *a, **k: given.update(k) or real(*a, **k))
    list(answer(model, tokenizer, [asked("a", 50, 40, stop_at_newline=True)], Way(Sampling())))
    (ends,) = given["stopping_criteria"]
    newline = tokenizer("\n").input_ids[-1]
    text = torch.full((1, 52), newline)
    assert not ends(text[:, :51], None).any()
    assert ends(text, None).all()
    text[0, -1] = 5
    assert not ends(text, None).any()


def test_a_threshold_has_no_steps(model, tokenizer):
    ((_, _, cost),) = answer(model, tokenizer, [asked("a", 50, 40)], Way(Sampling(threshold=1e-6)))
    assert (cost["steps"], cost["passes"]) == (None, 1)


# the bound


def test_the_bound_is_loss_bound(model):
    task = PerplexityBound(scored=10, masks=3)
    one = asked("a", 60, 49)
    one.meta["seed"] = 11
    row = bound(model, task, one)
    ids = torch.tensor([list(one.ids)])
    assert (
        row["score"]
        == row["metrics"]["bound"]
        == float(diffusion.loss_bound(model, ids, scored=10, samples=3, seed=11))
    )
    assert "loss" not in row["metrics"]
    assert (row["bytes"], row["passes"], row["scored"]) == (0, 3, 10)


def test_a_bound_stands_under_its_own_name(loader, tmp_path):
    """`perplexity` is asked of such a model as its bound, in rows, tables and reports."""
    task = "perplexity:lengths=100,140,scored=20,windows=2,text=pydoc"
    evaluate(recipe(tasks=[task], out=tmp_path / "out"), loader)
    label = task.replace("perplexity", "perplexity-bound")
    found = load(tmp_path / "out")
    assert {row["task"] for row in found.rows} == {label}
    assert all(row["metrics"].keys() == {"bound"} for row in found.rows)
    for line in summarise(found):
        mine = [row["score"] for row in found.rows if str(row["meta"]["length"]) == line.column]
        if line.column:
            assert line.value == pytest.approx(math.exp(sum(mine) / len(mine)))
    html, markdown = (path.read_text() for path in write_report([tmp_path / "out"], tmp_path / "out"))
    assert "perplexity, upper bound" in html
    assert "| perplexity, upper bound; 95 % interval below | bound; nats |" in markdown
    assert "| dense:steps=64,block\\_length=32 | 100 |" in markdown
    assert "| loss" not in markdown
    assert "bits per byte" not in markdown


# runs


def test_a_run_says_how_it_sampled_and_goes_on(loader, needle, tmp_path, monkeypatch):
    methods = [f"dense:{FAST}", "dense:steps=2,block_length=8", f"snapkv:budget=0.5,{SMALL},{FAST},keep=dual"]
    wanted = recipe(methods=methods, tasks=[needle], out=tmp_path / "out")
    evaluate(wanted, loader)
    found = load(tmp_path / "out")
    assert list(found.header["methods"]) == methods
    assert found.header["question"] == "with"
    assert found.header["methods"][methods[0]].startswith("no cache; 4 steps, blocks of 8, nothing held; LLaDA(")
    assert "dual held" in found.header["methods"][methods[2]]
    assert {(row["method"], row["steps"]) for row in found.rows} == {
        (m, s) for m, s in zip(methods, (4, 2, 4), strict=True)
    }
    assert len(found.rows) == 3 * 4
    over = {line.method: line.over for line in summarise(found) if not line.column}
    assert over[methods[0]] is over[methods[1]] is None
    assert over[methods[2]] is not None  # over dense of as many steps
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    (tmp_path / "out" / "samples.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    again = evaluate(wanted, loader)
    assert len(again.done) == 12
    monkeypatch.setattr(masked, "answer", lambda *_: pytest.fail("measured again"))
    evaluate(wanted, loader)
    _, markdown = write_report([tmp_path / "out"], tmp_path / "out")
    assert all(f"| {method} |" in markdown.read_text().replace("\\", "") for method in methods)


def test_contexts_are_not_read_beforehand(loader, needle, tmp_path, monkeypatch):
    monkeypatch.setattr(contexts, "prefill", lambda *_: pytest.fail("read causally"))
    evaluate(recipe(methods=[f"dense:{FAST}"], tasks=[needle], limit=1, out=tmp_path / "out"), loader)
    assert len(load(tmp_path / "out").rows) == 2


# what is refused


@pytest.mark.parametrize("task", ["divergence", "streaming", "joint-recall-like", "longproc-trace"])
def test_tasks_of_causal_models_are_refused_by_name(model, task):
    with pytest.raises(ValueError, match=f"{task} cannot be asked of smollm2: its tokens are fed one behind the other"):
        suited(recipe(tasks=[task]), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["perplexity:mode=stream"]}, "mode"),
        ({"tasks": ["needle:question=after"]}, "question=after decides nothing for smollm2"),
        ({"question": "inside"}, "question=inside decides nothing for smollm2"),
        ({"methods": ["dense", "dense:steps=64"]}, "dense:steps=64,block_length=32 is given twice"),
        (
            {"methods": ["kivi"], "tasks": ["perplexity"]},
            "perplexity-bound reads texts whole .* nothing of kivi: measure",
        ),
        ({"methods": ["transformers-quantized:backend=fp8"]}, "cannot take back what it has read"),
    ],
)
def test_what_decides_nothing_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        suited(recipe(**changes), model)


def test_causal_models_take_no_sampling(folder):
    plain = causal(folder)
    assert not is_masked(plain)
    with pytest.raises(
        ValueError, match="dense:steps=8: steps says how a masked-diffusion model samples, and smollm2 is"
    ):
        suited(recipe(methods=["dense:steps=8"]), plain)
    with pytest.raises(ValueError, match="perplexity-bound is of masked-diffusion models, and smollm2 is causal"):
        suited(recipe(tasks=["perplexity-bound"]), plain)
    same = recipe(methods=["dense", "fourier-paper:keep=0.5"], tasks=["perplexity", "needle:question=inside"])
    assert suited(same, plain) is same


def test_a_model_of_both_directions_names_its_mask(model):
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="names no mask_token_id"):
        is_masked(model)


def test_a_profile_is_for_what_is_held(model, loader, tmp_path, needle):
    random_profile(model).save(tmp_path / "p.json")
    with pytest.raises(ValueError, match=r"p\.json decides nothing for dense:steps=64,block_length=32: leave it out"):
        evaluate(recipe(tasks=[needle], profile=tmp_path / "p.json"), loader)


# the command


def test_the_command(tokenizer, needle, tmp_path, monkeypatch):
    """On a checkpoint as LLaDA's are published, whose weights are not read for what is refused."""
    write(tmp_path / "model", LLADA, tokenizer)
    run = ["eval", "run", "--model", tmp_path / "model", "--out", tmp_path / "out", "--dtype", "float32"]
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were read"))
        said = refused(*run, "--method", "dense", "--task", "divergence:text=pydoc")
    assert "divergence:text=pydoc cannot be asked of" in said
    assert not (tmp_path / "out").exists()
    label = f"dense:{FAST},keep=prefix"
    shown = succeeds(*run, "--method", label, "--task", needle, "--limit", "1", "--json").stdout
    assert {line["method"] for line in json.loads(shown)} == {label}
