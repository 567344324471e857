"""LONGWAVE_KERNELS decides who answers, and every answer is the same attention.

On a GPU where there is one, elsewhere in Triton's interpreter (tests/conftest.py switches it on).
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longwave
from longwave.store.pages import PageStore
from tests.conftest import SMALL, into

triton = pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
DEVICE = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | dict(hidden_size=64, num_attention_heads=8, head_dim=32), num_hidden_layers=2)
    return LlamaForCausalLM(config).half().eval().to(DEVICE)


def logits(model, monkeypatch, kernels, method="fourier", steps=(100, 3, 1, 1), **options):
    """Logits of chunks read one after the other, from a batch of two rows, and how often the fused kernel answered."""
    monkeypatch.setenv("LONGWAVE_KERNELS", kernels)
    answers, fused = [], PageStore.attend

    def counted(self, *args):
        out = fused(self, *args)
        answers.append(out is not None)
        return out

    monkeypatch.setattr(PageStore, "attend", counted)
    ids = torch.randint(97, (2, sum(steps)), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cache = longwave.cache(model, method, sinks=2, window=8, **options)
    found, start = [], 0
    with torch.no_grad():
        for n in steps:
            found.append(model(ids[:, start : start + n], **into(cache)).logits[:, -1])
            start += n
    return torch.stack(found).float().cpu(), sum(answers)


@pytest.mark.filterwarnings("ignore:no measurement of this model")
@pytest.mark.parametrize(
    ("method", "options"),
    [("fourier", dict(budget=0.3, segment=32)), ("kivi", dict(bits=2, group=32))],
    ids=["fourier", "kivi"],
)
def test_triton_answers_as_the_reference_does(model, monkeypatch, method, options):
    plain, none = logits(model, monkeypatch, "reference", method, **options)
    fused, some = logits(model, monkeypatch, "triton", method, **options)
    assert none == 0
    assert some == 2 * 3  # two layers, three chunks after the prompt
    torch.testing.assert_close(fused, plain, rtol=0, atol=4e-3)


def test_an_unknown_name_is_refused(model, monkeypatch):
    with pytest.raises(ValueError, match="auto, reference, triton"):
        logits(model, monkeypatch, "cuda", "kivi", bits=2, group=32)


def test_triton_says_why_it_cannot(model, monkeypatch):
    with pytest.raises(RuntimeError, match="powers of two"):
        logits(model, monkeypatch, "triton", budget=0.3, segment=24)
