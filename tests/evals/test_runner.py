import threading
import time

import pytest
import torch

import longwave
from longwave.evals import runner
from longwave.evals.batches import Batch
from longwave.evals.causal import Causal
from longwave.evals.results import Results
from longwave.evals.runner import run
from tests.evals.samples import Echo, Loss, sample


@pytest.fixture
def header():
    return {
        **{"format": "longwave-eval", "version": 1, "methods": {"dense": "dense", "fourier": "f"}},
        **{"tasks": {"echo": {}, "loss": {}}, "runs": [{}]},
    }


def test_run_measures_what_is_missing(llama, tokenizer, makers, mixed, header, tmp_path):
    scored = [sample(name, 151, 120, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    tasks = {"echo": (Echo(), mixed), "loss": (Loss(), scored)}
    seen = []
    results = Results.open(tmp_path / "out", header)
    run(Causal(llama, tokenizer, makers), tasks, results, Batch(2, 10**6), progress=lambda *counts: seen.append(counts))
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * (6 + 2)
    assert seen[0] == (0, 16)
    assert seen[-1] == (16, 16)
    kept = [line for number, line in enumerate(lines) if number % 3]
    (tmp_path / "out" / "samples.jsonl").write_text("\n".join(kept) + "\n")
    again = Results.open(tmp_path / "out", header)
    assert len(again.done) == len(kept)
    run(Causal(llama, tokenizer, makers), tasks, again, Batch(2, 10**6))
    assert len(again.done) == 16
    text = (tmp_path / "out" / "samples.jsonl").read_text()
    assert text.startswith("\n".join(kept))
    assert text.count("\n") == 16


def test_models_with_sliding_layers_get_equal_batches(models, tokenizer, header, tmp_path, monkeypatch):
    model = models["gemma3"][0]
    asked = []
    real = runner.batches
    monkeypatch.setattr(runner, "batches", lambda s, b, equal: asked.append(equal) or real(s, b, equal))
    makers = {"dense": lambda rows: longwave.cache(model, "dense")}
    results = Results.open(tmp_path / "out", header)
    run(Causal(model, tokenizer, makers), {"echo": (Echo(), [sample("a", 60, 50), sample("b", 55, 49)])}, results)
    assert asked == [True]
    assert len(results.done) == 2


def test_processes_that_share_a_folder_share_its_work(llama, tokenizer, makers, mixed, header, tmp_path):
    """What the first has taken is left to it, and taken over when it goes without having done it."""
    tasks = {"echo": (Echo(), mixed[:1])}
    first, second = (Results.open(tmp_path / "out", header) for _ in range(2))
    ids = [mixed[0].id]
    assert first.take("echo", ids, False, "dense")
    assert not second.take("echo", ids, False, "dense")
    other = threading.Thread(target=run, args=(Causal(llama, tokenizer, makers), tasks, second))
    other.start()
    while ("echo", "fourier", ids[0]) not in second.done:
        assert other.is_alive()
        time.sleep(0.01)
    assert ("echo", "dense", ids[0]) not in second.done
    first.let_go()
    other.join(60)
    assert second.done.keys() == {("echo", method, ids[0]) for method in ("dense", "fourier")}
    assert not first.take("echo", ids, True, "dense")
    assert (tmp_path / "out" / "samples.jsonl").read_text().count("\n") == 2


def test_run_refuses_other_prompts(llama, tokenizer, makers, mixed, header, tmp_path):
    results = Results.open(tmp_path / "out", header)
    run(Causal(llama, tokenizer, makers), {"echo": (Echo(), mixed[:1])}, results)
    changed = [sample("alone150", 150, 143, seed=77)]
    with pytest.raises(ValueError, match="measured on another prompt"):
        run(Causal(llama, tokenizer, makers), {"echo": (Echo(), changed)}, results)


def test_too_little_memory_keeps_what_was_measured(llama, tokenizer, makers, mixed, header, tmp_path):
    calls = []

    def full(rows):
        calls.append(rows)
        if len(calls) > 1:  # the first asks what kind of cache it is
            raise torch.OutOfMemoryError("Tried to allocate 39 GiB")
        return makers["fourier"](rows)

    results = Results.open(tmp_path / "out", header)
    measure = Causal(llama, tokenizer, {"dense": makers["dense"], "fourier": full})
    with pytest.raises(ValueError, match=r"too little memory for 1 prompts of up to 150 tokens: lower --batch"):
        run(measure, {"echo": (Echo(), mixed[:1])}, results)
    assert list(results.done) == [("echo", "dense", "alone150")]
