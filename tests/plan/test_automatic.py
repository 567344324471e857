"""A model that nobody measured: found, measured once, kept, or planned safely with the reason."""

import copy
import json
import threading
import warnings

import pytest
import torch

import longwave
from longwave.plan import automatic
from longwave.plan.automatic import Effort, own_texts
from tests.conftest import build, into, random_profile, tokens

OPTIONS = dict(segment=16, sinks=2, window=16, budget=0.4)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder for profiles, and an effort that fits the small models: their window is 512 characters."""
    monkeypatch.setattr(automatic, "_folder", lambda: tmp_path / "profiles")
    monkeypatch.setattr(Effort, "of", classmethod(lambda cls, model, method: cls(400, 3, 80, 2)))
    return tmp_path / "profiles"


def quietly(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return longwave.cache(*args, **options)


def test_a_model_is_measured_once_and_says_so(llama, tokenizer, home, capsys):
    first = quietly(llama, "fourier", tokenizer=tokenizer, **OPTIONS)
    said = capsys.readouterr().err
    (kept,) = home.iterdir()
    assert "measuring LlamaForCausalLM, once (measure=False plans without)" in said
    assert str(kept) in said
    assert "measured plan for 0.4, expected KL" in str(first.method)
    assert first.method.profile
    assert json.loads(kept.read_text())["text"]["windows"] == 3
    again = quietly(llama, "fourier", **OPTIONS)  # no tokenizer is needed any more
    assert again.method == first.method
    assert capsys.readouterr().err == ""
    assert list(home.iterdir()) == [kept]


def test_it_is_the_same_for_another_type_of_the_same_weights(tokenizer, home, capsys):
    first = quietly(build("llama"), "fourier", tokenizer=tokenizer, **OPTIONS)
    capsys.readouterr()
    half = quietly(build("llama", torch.bfloat16), "fourier", **OPTIONS)
    assert half.method.profile == first.method.profile
    assert capsys.readouterr().err == ""


def test_other_weights_and_other_pages_are_measured_again(llama, tokenizer, home):
    first = quietly(llama, "fourier", tokenizer=tokenizer, **OPTIONS).method
    other = copy.deepcopy(llama)
    other.model.layers[1].self_attn.v_proj.weight.data *= 1.1
    second = quietly(other, "fourier", tokenizer=tokenizer, **OPTIONS).method
    third = quietly(llama, "fourier", tokenizer=tokenizer, **{**OPTIONS, "segment": 32}).method
    assert len({first.profile, second.profile, third.profile}) == 3
    assert len(list(home.iterdir())) == 3


def test_the_pages_of_an_evicting_method_are_measured(llama, tokenizer, home):
    store = longwave.Fourier(segment=16)
    memory = quietly(llama, longwave.SnapKV(store=store, sinks=2, window=16), 0.1, tokenizer=tokenizer)
    assert memory.method.profile
    assert len(list(home.iterdir())) == 1


def test_threads_measure_it_once(llama, tokenizer, home, monkeypatch):
    counts, real = [], automatic.calibrate
    monkeypatch.setattr(automatic, "calibrate", lambda *a, **b: counts.append(1) or real(*a, **b))
    made = []

    def build_one():
        made.append(longwave.cache(llama, "fourier", tokenizer=tokenizer, **OPTIONS).method)

    threads = [threading.Thread(target=build_one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 1
    assert len({method.digest for method in made}) == 1


def test_a_damaged_file_is_measured_again(llama, tokenizer, home):
    first = quietly(llama, "fourier", tokenizer=tokenizer, **OPTIONS).method
    (kept,) = home.iterdir()
    kept.write_text("{")
    assert quietly(llama, "fourier", tokenizer=tokenizer, **OPTIONS).method == first
    assert json.loads(kept.read_text())["format"] == "longwave-profile"


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(llama, tokenizer, tmp_path, monkeypatch, capsys, home):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(automatic, "_folder", lambda: tmp_path / "file" / "profiles")
    assert quietly(llama, "fourier", tokenizer=tokenizer, **OPTIONS).method.profile
    assert "not kept, so the next process measures again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "why"),
    [(dict(measure=False), r"\(measure=False\)"), ({}, "tokenizer was not found .*pass tokenizer=")],
    ids=["not wanted", "no tokenizer"],
)
def test_what_is_not_measured_is_planned_safely_and_says_why(llama, home, capsys, options, why):
    with pytest.warns(UserWarning, match=f"safe rather than good.*{why}"):
        memory = longwave.cache(llama, "fourier", **OPTIONS, **options)
    assert "safe plan for 0.4, nothing measured" in str(memory.method)
    assert memory.method.expected is None
    assert not home.exists()
    assert capsys.readouterr().err == ""


def test_weights_without_gradients_are_planned_safely(llama, tokenizer, home, monkeypatch):
    def unreached(*args, **options):
        raise automatic.NoGradients("no gradients go through")

    monkeypatch.setattr(automatic, "calibrate", unreached)
    with pytest.warns(UserWarning, match=r"safe rather than good.*\(no gradients go through\)"):
        longwave.cache(llama, "fourier", tokenizer=tokenizer, **OPTIONS)


def test_a_context_too_short_to_measure_says_so(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(automatic, "_folder", lambda: tmp_path)
    with pytest.warns(UserWarning, match="its context of 512 tokens is too short to measure"):
        longwave.cache(llama, "fourier", tokenizer=tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        dict(plan="safe"),
        dict(profile=True),
        dict(method="kivi"),
        dict(method="dense"),
        dict(budget=1.0),
        dict(budget="1MB", max_tokens=300),
    ],
    ids=str,
)
def test_nothing_is_measured_where_nothing_asks(llama, tokenizer, home, options):
    method = options.pop("method", "fourier")
    given = OPTIONS if method == "fourier" else {}
    if "profile" in options:
        options = {"profile": random_profile(llama)}
    quietly(llama, method, tokenizer=tokenizer, **{**given, **options})
    assert not home.exists()


def test_a_safe_plan_is_refused_where_it_would_fall_apart(llama, home):
    with pytest.raises(
        ValueError, match=r"0\.07 is less than fourier can do with these options for a model that was not measured"
    ):
        longwave.cache(llama, "fourier", **{**OPTIONS, "budget": 0.07}, measure=False)
    with pytest.raises(ValueError, match=r"0\.05 is less than fourier can do with these options: .* takes 0\.0625"):
        longwave.cache(llama, "fourier", **{**OPTIONS, "budget": 0.05}, measure=False)


def test_a_measured_hybrid_answers(models, tokenizer, home):
    model = models["gemma3"][0]
    memory = quietly(model, "fourier", tokenizer=tokenizer, **OPTIONS)
    assert "measured plan" in str(memory.method)
    model.generate(tokens(1, 100), **into(memory), max_new_tokens=3, do_sample=False)
    assert memory.report().tokens == 102


def test_effort_fits_the_device_and_the_context(llama):
    assert Effort.of(llama, longwave.Fourier()) is None
    assert Effort.of(llama, longwave.Fourier(segment=16, window=16)) == Effort(512, 4, 128, 4)


def test_own_text_is_of_many_kinds():
    texts = own_texts()
    assert all(len(text.encode()) > 25_000 for text in texts)
    for kind in ("def ", "#include", "SELECT", "User:", "{\n", "Herbst", "ão ", "的", "ия", "です"):
        assert any(kind in text for text in texts)
