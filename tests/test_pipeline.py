"""transformers' own pipeline, given a cache."""

import re
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, pipeline

import longwave
from longwave.frame import cache_name
from tests.conftest import into

TEXT = "Line 7 says that the sky is blue. Does it? It does! " * 5
FOURIER = dict(segment=16, window=16, sinks=4, measure=False)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"


@pytest.fixture
def answers(folder):
    return pipeline("text-generation", model=str(folder), max_new_tokens=8, do_sample=False, return_full_text=False)


@pytest.mark.filterwarnings("ignore:this model was not measured")
def test_a_text(answers):
    dense = answers(TEXT)
    assert answers(TEXT, **into(longwave.cache(answers.model, "dense"))) == dense
    less = longwave.cache(answers.model, "fourier", budget=0.3, **FOURIER)
    (said,) = answers(TEXT, **into(less))
    assert len(said["generated_text"]) == 8
    assert less.report().tokens == len(TEXT) + 7
    assert less.report().ratio < 0.6
    assert answers(TEXT) == dense  # without a cache as before


def test_what_continues_a_text(answers):
    cache = longwave.cache(answers.model, "dense")
    more = f"{TEXT}{answers(TEXT, **into(cache))[0]['generated_text']} And?"
    assert answers(more, **into(cache)) == answers(more)
    assert cache.report().tokens == len(more) + 7
    cache.reset()
    assert answers(TEXT[9:], **into(cache)) == answers(TEXT[9:])


def test_messages(answers):
    answers.tokenizer.chat_template = CHAT
    said = [{"role": "user", "content": TEXT}]
    assert answers(said, **into(longwave.cache(answers.model, "dense"))) == answers(said)


def test_a_batch_has_a_row_a_text(answers):
    texts = [TEXT, TEXT[30:120], TEXT[7:]]
    alone = [answers(text, **into(longwave.cache(answers.model, "dense"))) for text in texts]
    cache = longwave.cache(answers.model, "dense")
    assert answers(texts, batch_size=3, **into(cache)) == alone
    assert cache.report().batch == 3


def test_the_example_in_models_md(folder, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "LICENSE").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("longwave.plan.automatic.Effort.of", classmethod(lambda cls, model, method: None))
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder))
    code = code.replace("cache=cache", f"{cache_name(LlamaForCausalLM)}=cache")
    space = {"__name__": "printed"}
    with pytest.warns(UserWarning, match="was not measured"):
        exec(compile(code, "docs/models.md", "exec"), space)
    assert str(space["cache"].report()) in capsys.readouterr().out
