"""sirllm: what the model expected least stays, in all layers and heads alike; what was expected is known at the end."""

import copy
import gc
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import LlamaModel

import longwave
from longwave.decode import supports
from longwave.evals.fork import prefill
from longwave.frame import Needs
from longwave.frame.surprise import surprises
from tests.conftest import build, into, left_padded, tokens
from tests.methods import naive
from tests.methods.naive import draw
from tests.reading import read, read_in, state_of

SMALL = dict(sinks=2, window=6)


@dataclass(frozen=True)
class Every(longwave.SirLLM):
    every: ClassVar[int] = 1


@pytest.fixture(scope="module")
def made():
    return {name: build(name, torch.float64) for name in ("llama", "gemma3")}


@pytest.fixture(params=["llama", "gemma3"])
def model(request, made):
    return made[request.param]


def expected_by(model, ids, mask=None):
    """Minus log p of every token but the first, [batch, columns - 1]: of all logits, as stock transformers has them."""
    options = {} if mask is None else dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    with torch.no_grad():
        logits = model(ids, **options).logits
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def given(layer, surprise, sizes, seed=0):
    """Give a layer passes whose tokens were so surprising: lists of numbers, one of each pass."""
    k, v, _ = draw(1, sum(sizes), seed)
    start = layer.rows[0] if layer.is_initialized else 0
    assert start == 0
    for size in sizes:
        now = slice(start, start + size)
        layer.write(k[:, :, now], v[:, :, now])
        layer.hear([torch.tensor(surprise[now], dtype=torch.float64)])
        start += size
        yield layer.dense.column("position")[0, 0].tolist()


def layer_of(**options):
    return Every(**options).bind(naive.shape(), None, None).layer(0)


# the rule


def test_ten_tokens_by_hand():
    """Two sinks, the last two, and of the others the three that were expected least; in order."""
    surprise = [0.0, 0.1, 5.0, 0.2, 7.0, 1.0, 6.0, 0.3, 0.0, 0.0]
    layer = layer_of(tokens=7, sinks=2, window=2)
    assert list(given(layer, surprise, [10])) == [[0, 1, 2, 4, 6, 8, 9]]
    assert layer.dense.column("surprise")[0, 0].tolist() == [0.0, pytest.approx(0.1), 5.0, 7.0, 6.0, 0.0, 0.0]


def test_of_equals_the_earlier_ones_stay():
    assert list(given(layer_of(tokens=6, sinks=1, window=2), [1.0] * 10, [10])) == [[0, 1, 2, 3, 8, 9]]


def test_decay_lets_newer_tokens_win_from_turn_to_turn():
    surprise = [9.0, 5.0, 4.0, 3.0, 2.9, 2.8, 0.0, 0.0]
    options = dict(tokens=5, sinks=1, window=2)
    assert list(given(layer_of(**options), surprise, [4, 4]))[-1] == [0, 1, 2, 6, 7]
    decayed = list(given(layer_of(decay=0.5, **options), surprise, [4, 4]))
    assert decayed[-1] == [0, 4, 5, 6, 7]  # 5, 4 and 3 became 2.5, 2 and 1.5


def test_decay_changes_nothing_within_a_turn():
    """A prompt, and steps behind it, are one turn."""
    surprise = [9.0, 5.0, 4.0, 3.0, 2.9, 2.8, 0.0, 0.0]
    options = dict(tokens=5, sinks=1, window=2)
    for sizes in ([8], [4, 1, 1, 1, 1]):
        plain, decayed = (list(given(layer_of(decay=d, **options), surprise, sizes)) for d in (1.0, 0.5))
        assert plain == decayed


def test_after_two_evictions_each_token_has_its_own_surprise(made):
    model, ids = made["llama"], tokens(1, 90)
    memory = longwave.cache(model, Every(tokens=20, **SMALL))
    dense = prefill(model, ids, needs=Needs(surprise=1))  # the same passes, but for what was evicted
    read_in(model, memory, ids, (40, 1))
    first = [layer.dense.column("position").clone() for layer in memory.memory_layers()]
    everything = next(dense.memory_layers()).dense.column("surprise")[0, 0]
    kept, said = (next(memory.memory_layers()).dense.column(name)[0, 0] for name in ("position", "surprise"))
    old = kept < 40
    torch.testing.assert_close(said[old], everything[kept[old].long()])
    read(model, memory, ids)
    k, _ = next(memory.memory_layers()).dense.view()
    now = next(memory.memory_layers()).dense.column("position")[0, 0].long()
    torch.testing.assert_close(k[0], next(dense.memory_layers()).dense.view()[0][0][:, now])  # layer 0: no past in them
    assert not torch.equal(first[0][0, 0], now)


def test_all_layers_and_heads_hold_the_same_tokens_and_the_budget(made):
    memory = longwave.cache(made["llama"], longwave.SirLLM(**SMALL), budget=0.3)
    ids, mask = left_padded(2, 90, [0, 25])
    for size in (40, 20, *[1] * 20, 10):
        read(made["llama"], memory, ids[:, : memory.get_seq_length() + size], mask)
        first = next(memory.memory_layers())
        for layer in memory.memory_layers():
            places = layer.dense.column("position")
            assert torch.equal(places, first.dense.column("position")[:, :1].expand_as(places))
            assert layer.dense.lengths == first.dense.lengths
            for seen, held in zip(layer.rows, layer.dense.lengths, strict=True):
                assert held <= memory.method.most(seen)


# what is heard


@pytest.mark.parametrize("pads", [None, [0, 23]], ids=["even", "padded"])
@pytest.mark.parametrize("sizes", [(60,), (1, 20, 1, 1, 30, 7)], ids=["whole", "parts"])
def test_surprise_is_minus_log_p_of_all_logits(model, pads, sizes):
    """In whatever passes tokens come: what was said before a pass is remembered."""
    ids, mask = (tokens(2, 60), None) if pads is None else left_padded(2, 60, pads)
    memory = longwave.cache(model, longwave.SirLLM(tokens=4096, **SMALL))
    read_in(model, memory, ids, sizes, mask)
    want = expected_by(model, ids, mask)
    for layer in memory.memory_layers():
        for row in range(2):
            pad = 0 if pads is None else pads[row]
            got = layer.dense.column("surprise")[row, 0, : layer.dense.lengths[row]]
            torch.testing.assert_close(got[1:].double(), want[row, pad:], rtol=1e-5, atol=1e-5)
            n = max(0, sizes[0] - pad)
            if n > 1:
                assert got[0] == got[1:n].max()  # the first one has what nothing was said of: the most of its pass


def test_a_cap_on_logits_counts(made):
    model = copy.deepcopy(made["gemma3"])
    model.config.final_logit_softcapping = 2.0
    memory, ids = longwave.cache(model, longwave.SirLLM(tokens=4096)), tokens(1, 30)
    read(model, memory, ids)
    got = next(memory.memory_layers()).dense.column("surprise")[0, 0, 1:]
    torch.testing.assert_close(got.double(), expected_by(model, ids)[0], rtol=1e-5, atol=1e-5)


def test_many_tokens_are_judged_some_at_a_time(made, monkeypatch):
    from longwave.frame import surprise

    model, ids = made["llama"], tokens(2, 40)
    hidden = model.model(ids).last_hidden_state.detach()
    whole = surprises(model.lm_head, model.config, hidden, ids, None, None)
    monkeypatch.setattr(surprise, "LOGITS", 3 * model.config.vocab_size)
    for one, other in zip(whole, surprises(model.lm_head, model.config, hidden, ids, None, None), strict=True):
        torch.testing.assert_close(one, other)


def test_what_was_taken_back_is_not_heard(made):
    """After a crop the next token's surprise is by the token that is now the last."""
    model, ids = made["llama"], tokens(1, 60)
    wrong = torch.cat([ids[:, :40], tokens(1, 5, seed=9)], 1)
    memory, other = (longwave.cache(model, longwave.SirLLM(tokens=4096, **SMALL)) for _ in range(2))
    read(model, memory, wrong)
    memory.crop(-5)
    read(model, other, ids[:, :40])
    for each in (memory, other):
        read_in(model, each, ids, (1, 6))
    for one, two in zip(memory.memory_layers(), other.memory_layers(), strict=True):
        torch.testing.assert_close(one.dense.column("surprise"), two.dense.column("surprise"))


def test_a_crop_beyond_what_was_heard_is_refused(llama):
    memory = longwave.cache(llama, longwave.SirLLM(tokens=200, sinks=2, window=8))
    read(llama, memory, tokens(1, 60))
    with pytest.raises(ValueError, match="judged by the token before it, and of row 0 only the last 9"):
        memory.crop(-20)
    memory.crop(-8)
    assert memory.get_seq_length() == 52


def test_generate_hears_a_prompt_of_which_it_wants_the_last_logits(made):
    model, ids = made["llama"], tokens(1, 50)
    memory = longwave.cache(model, longwave.SirLLM(tokens=4096))
    out = model.generate(ids, **into(memory), max_new_tokens=12, do_sample=False)
    got = next(memory.memory_layers()).dense.column("surprise")[0, 0, 1:]
    torch.testing.assert_close(got.double(), expected_by(model, out)[0, :-1], rtol=1e-5, atol=1e-5)


# text without end


def test_slots_go_on_behind_the_trained_length(made):
    model = made["llama"]
    memory = longwave.cache(model, longwave.SirLLM(tokens=40, positions="slots", **SMALL))
    ids = tokens(1, 3 * model.config.max_position_embeddings)
    sizes = [100, *[1] * 70, 30] * (ids.shape[1] // 200)
    bytes_at = []
    for size in sizes:
        assert torch.isfinite(read(model, memory, ids[:, : memory.get_seq_length() + size])).all()
        if size == 30:
            bytes_at.append(memory.nbytes)
    assert memory.get_seq_length() > 2.5 * model.config.max_position_embeddings
    assert len(set(bytes_at)) == 1
    assert max(next(memory.memory_layers()).held()) == 40


# what is refused, and what goes wrong


def test_a_model_without_a_head_is_refused(made):
    base = LlamaModel(made["llama"].config)
    with pytest.raises(NotImplementedError, match="LlamaModel has no head, and this method judges tokens by"):
        longwave.cache(base, "sirllm", 0.3)
    assert not base._forward_hooks


def test_embeddings_are_refused_and_nothing_is_taken(made):
    model, ids = made["llama"], tokens(1, 30)
    memory = longwave.cache(model, longwave.SirLLM(**SMALL), budget=0.5)
    read(model, memory, ids)
    before = state_of(memory)
    with (
        pytest.raises(ValueError, match="LlamaModel was given embeddings: pass input_ids, to a"),
        torch.no_grad(),
    ):
        model(inputs_embeds=model.model.embed_tokens(tokens(1, 4)), **into(memory))
    assert [layer["rows"] for layer in state_of(memory)] == [layer["rows"] for layer in before]
    read(model, memory, torch.cat([ids, tokens(1, 4)], 1))


def test_a_cache_that_came_without_its_model(made):
    model = copy.deepcopy(made["llama"])
    memory = longwave.cache(model, longwave.SirLLM(**SMALL), budget=0.5)
    read(model, memory, tokens(1, 30))
    stored = pickle.dumps(memory)
    del memory
    gc.collect()
    alone = pickle.loads(stored)
    with pytest.raises(ValueError, match="came without its model, so build it with"):
        read(model, alone, tokens(1, 32))
    assert alone.get_seq_length() == 30


def test_a_refused_pass_leaves_no_ids_behind(made):
    """By which a model that nobody listens to would seem to be heard."""
    model, other = made["llama"], copy.deepcopy(made["llama"])
    longwave.cache(other, "dense")  # answers for a cache, and no hook is on it
    memory = longwave.cache(model, longwave.SirLLM(**SMALL), budget=0.5)
    read(model, memory, tokens(1, 30))
    with pytest.raises(NotImplementedError, match="4D attention mask"), torch.no_grad():
        model(tokens(1, 4), attention_mask=torch.rand(1, 1, 4, 34), **into(memory))
    with pytest.raises(ValueError, match="came without its model"):
        read(other, memory, tokens(1, 34))
    read(model, memory, tokens(1, 34))


def test_hooks_go_with_the_last_copy_of_the_cache(made):
    model = copy.deepcopy(made["llama"])
    memory = longwave.cache(model, longwave.SirLLM(**SMALL), budget=0.5)
    twin = copy.deepcopy(memory)
    del memory
    gc.collect()
    assert len(model.model._forward_hooks) == 1
    read(model, twin, tokens(1, 30))
    del twin
    gc.collect()
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


def test_a_pass_that_fails_behind_its_last_layer_leaves_the_cache_to_reset(made):
    model = copy.deepcopy(made["llama"])
    memory = longwave.cache(model, longwave.SirLLM(**SMALL), budget=0.5)

    def fail(*_):
        raise MemoryError("no room")

    hook = model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        read(model, memory, tokens(1, 30))
    hook.remove()
    with pytest.raises(ValueError, match=r"failed half-way .* call cache.reset\(\)"):
        read(model, memory, tokens(1, 34))
    memory.reset()
    read(model, memory, tokens(1, 34))


def test_a_size_and_steps_are_refused_with_a_reason(made):
    with pytest.raises(ValueError, match=r"a pass lies dense in all layers until .* fraction, or tokens"):
        longwave.cache(made["llama"], "sirllm", "12KB", max_tokens=400)
    memory = longwave.cache(made["llama"], "sirllm", 0.3)
    assert "judges tokens by logits, behind the last layer" in supports(made["llama"], memory)
    assert longwave.cache(made["llama"], "sirllm", 1.0).method.whole  # nothing is heard where nothing goes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(decay=0), "decay is what a turn leaves of a token's worth, above 0 and up to 1; got 0"),
        (dict(decay=1.5), "got 1.5"),
        (dict(decay=True), "got True"),
        (dict(store="kivi"), "pages are never opened again: leave store out"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.SirLLM(**options)
