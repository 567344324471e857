import copy
import threading
import time
from array import array
from dataclasses import dataclass

import pytest
import torch

import longwave
from longwave.evals import runner
from longwave.evals.results import Results
from longwave.evals.runner import Batch, Causal, Contexts, answer, batches, run, run_loss, run_text
from longwave.evals.task import Judged, LossTask, Sample, TextTask
from tests.conftest import into, random_profile, tokens

OPTIONS = {"segment": 16, "sinks": 2, "window": 16}


@dataclass(frozen=True)
class Echo(TextTask):
    """Scores the length of the output."""

    name, version = "echo", 1

    def samples(self, setting):
        raise NotImplementedError

    def judge(self, sample, output):
        return Judged(len(output) / 100, output[:1], {"length": float(len(output))})


@dataclass(frozen=True)
class Loss(LossTask):
    """Loss with a comparison."""

    name, version, compares = "loss", 1, True
    stream: bool = False

    @property
    def feed(self):
        return 1 if self.stream else None

    def samples(self, setting):
        raise NotImplementedError


def sample(name, length, context, seed=1, new=6, **options):
    ids = array("i", tokens(1, length, seed=seed)[0].tolist())
    return Sample(name, ids, context, new, ("yes",), {"length": length}, **options)


@pytest.fixture
def makers(llama):
    profile = random_profile(llama)
    return {
        "dense": lambda rows: longwave.cache(llama, "dense"),
        "fourier": lambda rows: longwave.cache(llama, "fourier", 0.1, profile, **OPTIONS),
    }


@pytest.fixture
def mixed():
    """Rows of several lengths, three of which share a context."""
    alone = [sample(f"alone{n}", n, n - 7, seed=n) for n in (150, 131, 122)]
    shared = [sample(f"shared{n}", 120, 100, seed=5) for n in range(3)]
    for number, one in enumerate(shared):
        one.ids[100:] = array("i", tokens(1, 8 + 3 * number, seed=number + 9)[0].tolist())
    return [*alone, *shared]


def outputs(model, tokenizer, samples, make, question="after"):
    contexts = Contexts(model, samples, 0, question)
    return {s.id: (text, cost) for s, text, cost in answer(model, tokenizer, samples, contexts, make)}


@pytest.mark.parametrize("name", ["dense", "fourier"])
def test_a_batch_answers_as_each_sample_alone(llama, tokenizer, makers, mixed, name):
    together = outputs(llama, tokenizer, mixed, makers[name])
    for one in mixed:
        alone = outputs(llama, tokenizer, [one], makers[name])
        assert together[one.id][0] == alone[one.id][0]


def test_dense_answers_are_plain_generation(llama, models, tokenizer, makers, mixed):
    together = outputs(llama, tokenizer, mixed, makers["dense"])
    for one in mixed:
        ids = torch.tensor([list(one.ids)])
        out = models["llama"][1].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert together[one.id][0] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_with_the_question_is_plain_generation_through_the_method(llama, tokenizer, makers, mixed):
    together = outputs(llama, tokenizer, mixed, makers["fourier"], "with")
    for one in mixed:
        ids = torch.tensor([list(one.ids)])
        out = llama.generate(ids, **into(makers["fourier"](1)), max_new_tokens=6, do_sample=False)
        assert together[one.id][0] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_question_is_read_after_compression(llama, tokenizer, makers):
    """None of the answer may come from the exact pass, the question's first token included."""
    seen = []

    def watched(rows):
        memory = makers["fourier"](rows)
        attend = memory.layers[0].attend

        def watch(p):
            seen.append((p.q.shape[2], memory.layers[0].store is not None))
            return attend(p)

        memory.layers[0].attend = watch
        return memory

    outputs(llama, tokenizer, [sample("one", 150, 139)], watched)
    assert seen[0] == (11, True)
    assert all(compressed for _, compressed in seen)


def test_a_shared_context_is_read_once(llama, tokenizer, makers, mixed, monkeypatch):
    read = []
    real = runner.prefill
    monkeypatch.setattr(runner, "prefill", lambda model, ids, *more: read.append(ids.shape) or real(model, ids, *more))
    list(run_text(llama, tokenizer, Echo(), mixed[3:], makers, "after"))
    assert read == [(1, 100)]  # one context, for three questions and two methods


def test_a_hybrid_is_read_once_for_all_methods(models, tokenizer, monkeypatch):
    model, stock = models["gemma3"]
    samples = [sample("a", 60, 50), sample("b", 60, 50, seed=2)]
    read = []
    real = runner.prefill
    monkeypatch.setattr(runner, "prefill", lambda model, ids, *more: read.append(ids.shape) or real(model, ids, *more))
    makers = {name: lambda rows: longwave.cache(model, "dense") for name in ("one", "other")}
    made = list(run_text(model, tokenizer, Echo(), samples, makers, "after"))
    assert read == [(2, 50)]
    for one, *rows in zip(samples, *made, strict=True):
        ids = torch.tensor([list(one.ids)])
        out = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert [row["output"] for row in rows] == [text, text]


def test_rows_say_what_was_measured(llama, tokenizer, makers, mixed):
    dense, fourier = run_text(llama, tokenizer, Echo(), mixed, makers, "after")
    assert [row["id"] for row in dense] == [row["id"] for row in fourier] == [s.id for s in mixed]
    for one, exact, row in zip(mixed, dense, fourier, strict=True):
        assert row["prompt"] == exact["prompt"] == one.prompt_sha256
        assert (row["method"], row["tokens"], row["context"]) == ("fourier", len(one.ids), one.context)
        assert row["score"] == len(row["output"]) / 100
        assert row["metrics"] == {"length": len(row["output"])}
        assert row["bytes"] < row["dense_bytes"] == exact["dense_bytes"]
        assert row["prefill_seconds"] > 0
        assert row["decode_seconds"] > 0
        assert row["rows"] == len(mixed)
        assert 1 <= row["new_tokens"] <= 6


def test_bytes_are_those_of_the_cache_at_the_end(llama, tokenizer, makers):
    one = sample("one", 150, 140)
    ((_, cost),) = outputs(llama, tokenizer, [one], makers["fourier"]).values()
    memory = makers["fourier"](1)
    out = llama.generate(torch.tensor([list(one.ids)]), **into(memory), max_new_tokens=6, do_sample=False)
    assert out.shape[1] == 156
    assert (cost["bytes"], cost["dense_bytes"]) == (memory.nbytes, memory.dense_nbytes)


def test_an_answer_ends_at_a_newline_but_not_before_its_first_token(llama, tokenizer, makers, monkeypatch):
    plain = sample("plain", 150, 140, new=12)
    (text, cost) = outputs(llama, tokenizer, [plain], makers["dense"])["plain"]
    end = tokenizer.decode([tokenizer(text).input_ids[4]])
    newline = tokenizer("\n").input_ids[0]
    real = type(tokenizer).__call__
    monkeypatch.setattr(  # let the model's fifth token be this tokenizer's newline
        type(tokenizer), "__call__", lambda self, t, **o: real(self, end if t == "\n" else t, **o)
    )
    stopped = copy.copy(plain)
    object.__setattr__(stopped, "stop_at_newline", True)
    (short, cost) = outputs(llama, tokenizer, [stopped], makers["dense"])["plain"]
    first = text.index(end, 1)
    assert short == text[: first + 1]
    assert cost["new_tokens"] == first + 1 < 12
    assert newline == 1


def test_batches_keep_alike_together():
    samples = [
        *(sample(f"short{n}", 40, 30, seed=n) for n in range(5)),
        *(sample(f"long{n}", 100, 90, seed=n) for n in range(3)),
        *(sample(f"more{n}", 100, 90, seed=n + 20, new=9) for n in range(2)),
        sample("line", 100, 90, seed=50, stop_at_newline=True),
    ]
    made = list(batches(samples, Batch(rows=4, tokens=250)))
    assert sorted(s.id for group in made for s in group) == sorted(s.id for s in samples)
    for group in made:
        assert len({(s.max_new_tokens, s.stop_at_newline) for s in group}) == 1
        assert len(group) <= 4
        longest = max(len(s.ids) for s in group)
        assert longest * len(group) <= 250
        assert min(len(s.ids) for s in group) >= 0.75 * longest
    assert [len(group) for group in made] == [2, 1, 4, 1, 1, 2]


def test_equal_batches():
    samples = [sample("a", 60, 50), sample("b", 60, 49), sample("c", 60, 50, seed=2), sample("d", 59, 50)]
    made = [[s.id for s in group] for group in batches(samples, Batch(), equal=True)]
    assert made == [["a", "c"], ["b"], ["d"]]


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


def test_a_sample_longer_than_the_batch_goes_alone():
    assert [len(group) for group in batches([sample("a", 300, 9), sample("b", 300, 9)], Batch(8, 200))] == [1, 1]


@pytest.mark.parametrize("given", [(0, 10), (1, 0)])
def test_batch_without_room(given):
    with pytest.raises(ValueError, match="at least one row and one token"):
        Batch(*given)


@pytest.mark.parametrize("stream", [False, True])
def test_loss_rows(llama, models, tokenizer, makers, stream):
    samples = [sample(name, 151, 120, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    dense, fourier = run_loss(llama, tokenizer, Loss(stream), samples, makers)
    for one, exact, row in zip(samples, dense, fourier, strict=True):
        with torch.no_grad():
            logits = models["llama"][1](torch.tensor([list(one.ids)])).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[120:150], torch.tensor(one.ids[121:]))
        assert exact["score"] == exact["metrics"]["loss"] == pytest.approx(float(expected), rel=1e-4)
        assert (
            exact["metrics"]["dense_loss"] == row["metrics"]["dense_loss"] == pytest.approx(float(expected), rel=1e-4)
        )
        assert exact["metrics"]["kl"] == pytest.approx(0, abs=1e-5)
        assert exact["metrics"]["top1"] == 1
        assert row["metrics"]["kl"] > 1e-3
        assert row["scored"] == exact["scored"] == 30
        assert row["curve"]["loss"] == [pytest.approx(row["metrics"]["loss"], abs=1e-4)]
        assert row["bytes"] < row["dense_bytes"]


def test_a_method_that_chooses_in_steps_is_fed_token_by_token(llama, tokenizer):
    """In one pass quest reads all: that it loses nothing then says nothing."""
    method = longwave.Quest(sinks=1, window=4, chunk=4)
    makers = {"quest": lambda rows: longwave.cache(llama, method, 0.05)}
    samples = [sample("a", 151, 120)]
    rows = {
        name: next(run_loss(llama, tokenizer, task, samples, makers))[0]
        for name, task in (("all", Loss()), ("stream", Loss(True)))
    }
    assert rows["all"]["metrics"]["kl"] > 1e-4
    assert rows["all"]["metrics"] == pytest.approx(rows["stream"]["metrics"], abs=1e-4)


def test_curves_are_means_of_64_positions(llama, tokenizer, makers):
    samples = [sample("a", 221, 50)]
    (row,) = next(run_loss(llama, tokenizer, Loss(), samples, {"dense": makers["dense"]}))
    assert row["scored"] == 170
    curve = row["curve"]["loss"]
    assert len(curve) == 3
    assert (64 * curve[0] + 64 * curve[1] + 42 * curve[2]) / 170 == pytest.approx(row["score"], abs=1e-4)


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


def test_the_models_own_generation_settings_stay_out(llama, models, tokenizer, makers, mixed, monkeypatch):
    plain = outputs(llama, tokenizer, mixed[:1], makers["dense"])
    own = copy.deepcopy(llama.generation_config)
    own.repetition_penalty, own.no_repeat_ngram_size = 3.0, 1
    monkeypatch.setattr(llama, "generation_config", own)
    assert outputs(llama, tokenizer, mixed[:1], makers["dense"])["alone150"][0] == plain["alone150"][0]
    assert llama.generation_config is own
    ids = torch.tensor([list(mixed[0].ids)])
    penalised = llama.generate(ids, **into(makers["dense"](1)), max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(penalised[0, 150:]) != plain["alone150"][0]  # they would have mattered
