import copy

import pytest
import torch

import longwave
from longwave.evals.causal import run_loss, run_text
from tests.conftest import into
from tests.evals.samples import Echo, Loss, outputs, sample


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
