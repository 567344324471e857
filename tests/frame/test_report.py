"""What a report counts, and that there is none of nothing."""

import pytest
import torch

import longwave
from longwave.frame import storage_bytes
from longwave.frame.report import tensors_in
from tests.conftest import build, tokens
from tests.explicit import Explicit
from tests.reading import read

PAGES = Explicit(keep=0.0, states=4, segment=8, sinks=2, window=8)


class Held:
    """Tensors in attributes of every kind, one of them twice, and a way back to itself."""

    __slots__ = ("__dict__",)

    def __init__(self, state):
        self.conv_states, self.pair, self.state = {0: state, "more": [state, None]}, (torch.zeros(5), True), state
        self.inner = type("Inner", (), {})()
        self.inner.recurrent, self.inner.outer = torch.zeros(7), self


def test_tensors_of_other_layers_are_counted_wherever_they_are_held():
    found = list(tensors_in(Held(torch.zeros(2, 3))))
    assert storage_bytes(found) == 4 * (6 + 5 + 7)


def test_other_layers_are_shown_apart(models):
    model = models["gemma3"][0]
    memory = longwave.cache(model, PAGES)
    read(model, memory, tokens(1, 300))
    report = memory.report()
    others = sum(storage_bytes([layer.keys, layer.values]) for layer in memory.layers if layer.is_sliding)
    own = list(memory.memory_layers())
    assert 0 < others <= report.others < others + 5 * 64  # a counter a layer
    assert report.memory_ratio == sum(x.nbytes for x in own) / sum(x.dense_nbytes for x in own) < report.ratio < 1
    assert str(report).startswith(f"ratio {report.ratio:.3f}: ")
    assert f"{report.memory_ratio:.3f} without the other layers, which hold {report.others:,} bytes" in str(report)
    assert report.as_dict()["memory_ratio"] == report.memory_ratio


def test_states_of_linear_layers_are_counted():
    model = build("qwen3next")
    memory = longwave.cache(model, "dense")
    read(model, memory, tokens(2, 30))
    layer = memory.layers[0]
    assert memory.report().others == storage_bytes([layer.conv_states[0], layer.recurrent_states[0]]) > 0


@pytest.mark.parametrize(
    "ask", [lambda m: m.report(), lambda m: m.nbytes, lambda m: m.dense_nbytes], ids=["report", "nbytes", "dense"]
)
def test_a_cache_that_nothing_was_read_into_says_so(llama, ask):
    memory = longwave.cache(llama, "dense")
    with pytest.raises(ValueError, match=r"no token was read into this cache of dense.*has not used it"):
        ask(memory)
    read(llama, memory, tokens(1, 20))
    ask(memory)
    memory.crop(-20)
    with pytest.raises(ValueError, match="no token was read"):
        ask(memory)
