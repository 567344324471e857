"""speckv: the vote written out, and every way of reading a prompt that would leave the draft out refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import max_pool1d

import longwave
from longwave.evals.asked import check_names
from longwave.evals.fork import fork, prefill
from longwave.methods.held import held_by
from tests.cli.calls import refused
from tests.conftest import into, tokens
from tests.evals.test_recipe import recipe
from tests.reading import check_state, read, state_of

METHOD = longwave.SpecKV(sinks=2, window=8, ahead=4)


@pytest.mark.parametrize("ahead", [0, 3])
def test_the_vote_written_out(llama, ahead):
    """`ahead` of what is held asks, and is no candidate; queries of the window before it ask as well."""
    memory = longwave.cache(llama, replace(METHOD, ahead=0, window=8 + ahead, tokens=300))
    read(llama, memory, tokens(2, 50))
    held = held_by(memory.layers[1])
    held = replace(held, lengths=held.lengths - ahead, ahead=ahead)
    got = replace(METHOD, ahead=ahead).score(held)
    for b in range(2):
        for h in range(2):
            most = torch.zeros(50)
            for head in (2 * h, 2 * h + 1):
                for i in range(8 + ahead):
                    seen = 50 - (8 + ahead) + i + 1
                    p = (held.k[b, h, :seen] @ held.queries.q[b, head, i] * held.scaling).softmax(0)
                    most[:seen] = torch.maximum(most[:seen], p)
            most[50 - ahead - 8 :] = 0
            torch.testing.assert_close(got[b, h], max_pool1d(most[None], 7, 1, 3)[0], rtol=1e-5, atol=1e-7)


def test_two_of_them_compare_by_their_options():
    """The draft is none of them, so that nothing of a model is compared, printed or saved."""
    assert longwave.SpecKV() == longwave.SpecKV(ahead=16)
    assert longwave.SpecKV() != longwave.SpecKV(ahead=8)
    assert repr(longwave.SpecKV()).startswith("SpecKV(tokens=None, sinks=0, window=32")


def test_a_prompt_without_a_draft_is_refused_and_nothing_is_changed(models):
    for name in ("llama", "gemma3"):
        model, ids = models[name][0], tokens(2, 40)
        memory = longwave.cache(model, METHOD, budget=0.3)
        given = dict(**into(memory), max_new_tokens=2)
        for call in (
            partial(read, model, memory, ids),
            partial(model.generate, ids, **given),
            partial(longwave.generate, model, ids, **given),
        ):
            with pytest.raises(ValueError, match=r"longwave\.look_ahead\(model, cache, ids, draft\)"):
                call()
            assert memory.get_seq_length() == 0
            assert not any(getattr(layer, "is_initialized", False) for layer in memory.layers)


def test_a_reading_of_another_cache_is_refused(llama):
    with pytest.raises(ValueError, match=r"longwave\.look_ahead"):
        fork(prefill(llama, tokens(1, 40), needs=METHOD.needs()), longwave.cache(llama, METHOD, budget=0.3))


def test_budget_one_keeps_everything_and_asks_nobody(models):
    ours, stock = models["llama"]
    ids = tokens(2, 40)
    got = ours.generate(ids, **into(longwave.cache(ours, METHOD, budget=1)), max_new_tokens=8, do_sample=False)
    assert torch.equal(got, stock.generate(ids, max_new_tokens=8, do_sample=False))


def test_the_evaluation_and_the_command_say_so_early(folder, tmp_path):
    with pytest.raises(ValueError, match="one reading of a prompt serves all methods, and speckv chooses by"):
        check_names(recipe(methods=["speckv:budget=0.2"]))
    check_names(recipe(methods=["speckv:budget=0.2,ahead=0"]))
    assert "the command has one model, and speckv chooses by" in refused(
        "generate", "hello", "--model", folder, "--method", "speckv"
    )


def test_the_harness_says_so_before_a_model_is_loaded():
    harness = pytest.importorskip("longwave.evals.harness", reason="needs lm_eval")
    with pytest.raises(ValueError, match="requests are read plainly, and speckv chooses by"):
        harness.LongwaveLM("no/such/model", method="speckv")


def test_a_later_turn_is_read_as_it_comes(llama):
    """Its own queries vote then, as snapkv's do."""
    memory = longwave.cache(llama, METHOD, budget=0.3)
    longwave.look_ahead(llama, memory, tokens(1, 60), tokens(1, 4, seed=2))
    read(llama, memory, tokens(1, 90))
    assert memory.layers[0].held() == [memory.method.limit(90)]


def test_a_saved_cache_goes_on_and_a_text_is_not_settled_into_one(llama, tmp_path):
    memory = longwave.cache(llama, METHOD, budget=0.3)
    ids = tokens(1, 60)
    longwave.look_ahead(llama, memory, ids, tokens(1, 4, seed=2))
    longwave.save(memory, ids, tmp_path / "exact", exact=True)
    twin, _ = longwave.restore(llama, tmp_path / "exact")
    assert twin.method == memory.method
    check_state(state_of(twin), state_of(memory))
    assert torch.equal(read(llama, twin, ids), read(llama, memory, ids))
    dense = longwave.cache(llama, "dense")
    read(llama, dense, ids)
    longwave.save(dense, ids, tmp_path / "dense", exact=True)
    with pytest.raises(ValueError, match=r"longwave\.look_ahead"):
        longwave.restore(llama, tmp_path / "dense", METHOD, 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ahead=-1), "ahead is a whole number of tokens, at least 0; got -1"),
        (dict(ahead=1.5), "ahead is a whole number of tokens, at least 0; got 1.5"),
        (dict(kernel=4), "kernel is an odd number of tokens, got 4"),
        (dict(store="kivi"), "pages are never opened again: leave store out, or use snapkv with it"),
        (dict(positions="slots"), "speckv asks with queries that it remembers"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.SpecKV(**options)
