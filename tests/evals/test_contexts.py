import torch

import longwave
from longwave.evals import contexts, fork
from longwave.evals.causal import run_text
from tests.evals.samples import Echo, sample


def test_a_shared_context_is_read_once(llama, tokenizer, makers, mixed, monkeypatch):
    read = []
    real = contexts.prefill
    monkeypatch.setattr(
        contexts, "prefill", lambda model, ids, *more: read.append(ids.shape) or real(model, ids, *more)
    )
    list(run_text(llama, tokenizer, Echo(), mixed[3:], makers, "after"))
    assert read == [(1, 100)]  # one context, for three questions and two methods


def test_a_hybrid_is_read_once_for_all_methods(models, tokenizer, monkeypatch):
    model, stock = models["gemma3"]
    samples = [sample("a", 60, 50), sample("b", 60, 50, seed=2)]
    read = []
    real = contexts.prefill
    monkeypatch.setattr(
        contexts, "prefill", lambda model, ids, *more: read.append(ids.shape) or real(model, ids, *more)
    )
    makers = {name: lambda rows: longwave.cache(model, "dense") for name in ("one", "other")}
    made = list(run_text(model, tokenizer, Echo(), samples, makers, "after"))
    assert read == [(2, 50)]
    for one, *rows in zip(samples, *made, strict=True):
        ids = torch.tensor([list(one.ids)])
        out = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert [row["output"] for row in rows] == [text, text]


def test_slots_read_a_context_beyond_the_known_positions_in_passes(llama, monkeypatch):
    monkeypatch.setattr(llama.config, "max_position_embeddings", 64)
    samples = [sample("a", 150, 140), sample("b", 145, 130, seed=2)]

    def make(rows):
        return longwave.cache(llama, longwave.Streaming(sinks=2, window=7, tokens=24, positions="slots"))

    memory, _ = contexts.Contexts(llama, samples, 0).give(make)
    for row, one in enumerate(samples):
        alone, (ids, mask) = make(1), fork.pad_left([one.ids[: one.context]], 0)
        ids, mask = (torch.nn.functional.pad(x, (140 - ids.shape[1], 0)) for x in (ids, mask))  # the same borders
        fork.read(llama, alone, ids, mask, chunk=40)
        assert alone.layers[0].rows == [memory.layers[0].rows[row]] == [one.context]
        for layer, own in zip(memory.layers, alone.layers, strict=True):
            for x, y in zip(layer.dense.tensors(), own.dense.tensors(), strict=True):
                torch.testing.assert_close(x[row, :, :24], y[0, :, :24], rtol=1e-4, atol=1e-4)
