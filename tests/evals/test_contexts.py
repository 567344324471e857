import torch

import longwave
from longwave.evals import contexts
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
