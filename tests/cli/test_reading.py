from contextlib import contextmanager

import pytest
import torch

from longwave.cli import console
from longwave.cli.reading import layers_of, reading
from tests.conftest import build


@pytest.fixture
def bars(monkeypatch):
    """What a bar on a terminal would show."""
    shown = []

    @contextmanager
    def progress(what):
        shown.append(what)
        yield lambda done, total: shown.append((done, total))

    monkeypatch.setattr(console, "progress", progress)
    monkeypatch.setattr(console.stderr, "_force_terminal", True)
    return shown


def test_a_bar_by_layers(bars):
    model = build("llama")
    ids, layers = torch.arange(10)[None], model.config.num_hidden_layers
    with torch.no_grad(), reading(model, 10, chunk=6) as done:
        model(ids[:, :6])
        assert bars == ["reading 10 tokens", *((i + 1, 2 * layers) for i in range(layers))]
        model(ids[:, 6:])
        assert bars[-1] == (2 * layers, 2 * layers)
        model(ids)  # one that reads twice
        assert bars[-1] == (2 * layers, 2 * layers)
        done()
        count = len(bars)
        model(ids)
    assert len(bars) == count
    assert not any(layer._forward_hooks for layer in layers_of(model))


def test_nobody_watches(bars, monkeypatch):
    monkeypatch.setattr(console.stderr, "_force_terminal", False)
    model = build("llama")
    with reading(model, 10):
        assert not any(layer._forward_hooks for layer in layers_of(model))
    assert bars == []


@pytest.mark.parametrize("name", ["llama", "qwen3next", "gemma3"])
def test_layers_are_found(name):
    model = build(name)
    assert len(layers_of(model)) == model.config.num_hidden_layers
