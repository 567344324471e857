"""Steps through torch.compile, its backend being "eager": what is cut into graphs, and what happens where it fails."""

import copy
import gc
import threading

import pytest
import torch
from torch._dynamo.utils import counters

import longwave
from longwave.decode import StaticDecoder, Unsupported, compiled
from tests.conftest import into, left_padded, tokens
from tests.decode.test_steps import check_same, filled, fourier
from tests.frame.spy import Spy

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()


def untouched(model):
    """Whether the layers are as transformers made them: other passes are as they were."""
    return all(not vars(layer).keys() & {"forward", "_compiled_call_impl"} for layer in model.model.layers)


def answer(model, memory, compile, pads=(0, 3)):
    ids, mask = left_padded(len(pads), 40, pads)
    return longwave.generate(
        model, ids, attention_mask=mask, **into(memory), max_new_tokens=30, do_sample=False, compile=compile
    )


def test_compiled_steps_give_the_same_tokens_and_cache(llama):
    plain, fused = fourier(llama), fourier(llama)
    want = answer(llama, plain, compile=False)
    assert not counters["stats"]
    assert torch.equal(answer(llama, fused, compile=True), want)
    check_same(fused, plain)
    assert untouched(llama)


def test_all_layers_and_decoders_share_the_graphs(llama):
    answer(llama, fourier(llama), compile=True)
    graphs = counters["stats"]["unique_graphs"]
    assert 3 <= graphs <= 6 < 2 * len(llama.model.layers) * 4
    answer(llama, fourier(llama), compile=True)
    assert counters["stats"]["unique_graphs"] == graphs


def test_what_cannot_be_compiled_says_how_to_go_on(llama, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", fails)
    says = r"a step of LlamaForCausalLM could not be compiled \(.*no compiler here.*\). compile=False"
    memory = filled(llama)
    with StaticDecoder(llama, memory, new_tokens=3, compile=True) as decoder, pytest.raises(Unsupported, match=says):
        decoder.step(tokens(1, 1))
    check_same(memory, filled(llama))
    assert untouched(llama)


def test_too_many_kinds_of_layers_are_an_error(llama, monkeypatch):
    monkeypatch.setitem(compiled.CONFIG, "recompile_limit", 1)
    memory = fourier(llama)
    with pytest.raises(Unsupported, match="could not be compiled"):
        answer(llama, memory, compile=True)


def test_a_model_without_marked_layers_is_refused_before_the_prompt_is_read(llama, monkeypatch):
    monkeypatch.setattr(compiled, "GradientCheckpointingLayer", int)
    memory = fourier(llama)
    with pytest.raises(Unsupported, match="transformers marks no layers in LlamaForCausalLM"):
        answer(llama, memory, compile=True)
    assert memory.get_seq_length() == 0


def test_observed_layers_are_compiled_too(llama):
    """What goes into attention is seen from inside a compiled layer."""
    ids, seen = tokens(1, 46), []
    for compile in (False, True):
        memory = longwave.cache(llama, Spy(queries=3, mass=True, hidden=True))
        with torch.no_grad():
            llama(ids[:, :40], **into(memory))
            with StaticDecoder(llama, memory, new_tokens=6, compile=compile) as decoder:
                for column in range(40, 46):
                    decoder.step(ids[:, column])
        seen.append(memory)
    for a, b in zip(*(memory.layers for memory in seen), strict=True):
        for p, q in zip(a.passes, b.passes, strict=True):
            assert p.hidden is not None
            torch.testing.assert_close(p.hidden, q.hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.dense.columns["mass"], b.dense.columns["mass"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.queries.q, b.queries.q, rtol=1e-4, atol=1e-4)
    check_same(*seen)


# one model, several hands


@pytest.fixture
def counted(monkeypatch):
    """Threads by name -> how many compiled graphs ran in them."""
    ran = {}

    def backend(graph, inputs):
        def run(*args):
            name = threading.current_thread().name
            ran[name] = ran.get(name, 0) + 1
            return graph.forward(*args)

        return run

    monkeypatch.setattr(compiled, "BACKEND", backend)
    return ran


def in_threads(calls):
    """Results of name -> function, each in a thread of that name, all at once."""
    found, together = {}, threading.Barrier(len(calls))

    def run(name, call):
        together.wait()
        try:
            found[name] = call()
        except BaseException as error:
            found[name] = error

    threads = [threading.Thread(target=run, args=pair, name=pair[0]) for pair in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_threads_that_compile_and_threads_that_do_not_share_a_model(llama, counted):
    """Compiled code runs in the threads that asked for it, and nowhere else; then the model is as it was."""
    pads = {"compiled": (0, 3), "compiled too": (4, 0), "stepped": (0, 7), "plain": (0, 9)}
    want = {name: answer(llama, fourier(llama), compile=False, pads=pad) for name, pad in pads.items()}
    assert not counted
    calls = {name: lambda name=name: answer(llama, fourier(llama), compile="compiled" in name, pads=pads[name])
             for name in ("compiled", "compiled too", "stepped")}  # fmt: skip

    def plain():
        ids, mask = left_padded(2, 40, pads["plain"])
        for _ in range(3):
            memory = fourier(llama)
            out = llama.generate(ids, attention_mask=mask, **into(memory), max_new_tokens=30, do_sample=False)
        return out

    found = in_threads(calls | {"plain": plain})
    for name, tokens_of in want.items():
        assert torch.is_tensor(found[name]), found[name]
        assert torch.equal(found[name], tokens_of), name
    assert set(counted) == {"compiled", "compiled too"}
    gc.collect()
    assert untouched(llama)


def test_the_last_one_to_go_takes_it_off(llama):
    first, second = compiled.Compiled(llama), compiled.Compiled(llama)
    switch = llama.model.layers[0].forward
    assert isinstance(switch, compiled.Switch)
    first.close()
    first.close()
    assert llama.model.layers[0].forward is switch
    third = compiled.Compiled(llama)
    del second
    gc.collect()
    assert llama.model.layers[0].forward is switch
    third.close()
    assert untouched(llama)


def test_what_others_put_on_a_layer_stays(llama):
    """accelerate's hooks and the like: below ours, or over it."""
    model, calls = copy.deepcopy(llama), []
    layer = model.model.layers[1]
    inner = layer.forward

    def theirs(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    layer.forward = theirs
    made = compiled.Compiled(model)
    assert layer.forward is not theirs
    with torch.no_grad():
        model(tokens(1, 5), use_cache=False)
    assert calls == [1]
    made.close()
    assert layer.forward is theirs
    made = compiled.Compiled(model)
    over = layer.forward

    def later(*args, **kwargs):
        return over(*args, **kwargs)

    layer.forward = later
    made.close()
    assert layer.forward is later
    with torch.no_grad():
        model(tokens(1, 5), use_cache=False)
    assert calls == [1, 1]


def test_layers_come_and_go_under_running_passes(llama):
    """A pass that is on its way through a layer finds something to call, whatever others do to it meanwhile."""
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            compiled.Compiled(llama).close()

    def pass_on():
        try:
            with torch.no_grad():
                return [llama(tokens(1, 4), use_cache=False).logits for _ in range(150)]
        finally:
            stop.set()

    found = in_threads({"in and out": come_and_go, "in and out too": come_and_go, "passes": pass_on})
    assert found["in and out"] is found["in and out too"] is None
    assert all(torch.equal(one, found["passes"][0]) for one in found["passes"])
    assert untouched(llama)
