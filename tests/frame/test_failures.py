"""All or nothing: what is refused leaves everything as it was, and what fails is marked, whatever failed."""

import copy
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import longwave
from longwave.decode import StaticDecoder
from longwave.evals.fork import fork, prefill
from longwave.frame import MemoryLayer
from longwave.methods.base import Bound, Method
from longwave.store.tokens import TokenBuffer
from tests.conftest import SMALL, build, into, left_padded, tokens
from tests.frame.spy import Spy
from tests.matrix import LOSSY
from tests.reading import check_state, read, read_in, state_of

# passes that fail


def fail_at(monkeypatch, holder, name, call, error):
    """The call-th call of a function fails, half-way for all that anybody knows."""
    real, calls = getattr(holder, name), []

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(holder, name, failing)


def check_marked(model, memory, ids):
    """Nothing goes on from here but reset."""
    for use in (
        lambda: read(model, memory, ids),
        lambda: memory.crop(-1),
        lambda: StaticDecoder(model, memory, new_tokens=2),
        lambda: model.generate(ids, **into(copy.deepcopy(memory)), max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=r"failed half-way.*call cache.reset\(\)"):
            use()


@pytest.mark.parametrize("bad", ["update", "mask"])
def test_what_is_refused_behind_a_linear_layer_is_marked(monkeypatch, bad):
    """Its state has moved on when the first memory layer is asked, before its tokens are taken and after."""
    model = build("qwen3next")
    memory = LOSSY["kivi"](model)
    read(model, memory, tokens(2, 30))
    ids = tokens(2, 34)
    wrong = torch.ones(2, 1, 4, 34, dtype=torch.bool)
    given = {"attention_mask": wrong} if bad == "mask" else {}
    if bad == "update":
        fail_at(monkeypatch, MemoryLayer, "update", 1, ValueError("refused"))
    with pytest.raises((ValueError, NotImplementedError)), torch.no_grad():
        model(ids[:, -4:], **into(memory), **given, use_cache=True)
    with pytest.raises(ValueError, match=r"failed half-way.*call cache.reset\(\)"):
        read(model, memory, ids)


ERRORS = [
    MemoryError("no room"),
    torch.OutOfMemoryError("no room"),
    KeyboardInterrupt(),
    RuntimeError("?"),
    ValueError("?"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("new", [20, 4, 1], ids=["prompt", "chunk", "step"])
def test_a_layer_that_cannot_write_marks_the_cache(llama, monkeypatch, error, call, new):
    memory, ids = LOSSY["streaming"](llama), tokens(1, 60)
    start = 0 if new == 20 else 20
    if start:
        read(llama, memory, ids[:, :start])
    with monkeypatch.context() as broken:
        fail_at(broken, TokenBuffer, "append", call, error)
        with pytest.raises(type(error)):
            read(llama, memory, ids[:, : start + new])
    check_marked(llama, memory, ids[:, : start + new + 1])
    memory.reset()
    fresh = LOSSY["streaming"](llama)
    sizes = (40, 1, 1, 4)
    assert torch.equal(read_in(llama, memory, ids, sizes), read_in(llama, fresh, ids, sizes))


@pytest.mark.parametrize("name", ["attend", "observe", "settle", "arrive"])
@pytest.mark.parametrize("call", [1, 3])
def test_whatever_fails_in_a_pass_marks_the_cache(llama, monkeypatch, name, call):
    memory = LOSSY["kivi"](llama)
    read(llama, memory, tokens(1, 40))
    with monkeypatch.context() as broken:
        fail_at(broken, type(memory.layers[0]), name, call, MemoryError("no room"))
        with pytest.raises(MemoryError):
            read(llama, memory, tokens(1, 44))
    check_marked(llama, memory, tokens(1, 45))


def test_tokens_that_cannot_be_written_without_a_pass(llama, monkeypatch):
    memory = longwave.cache(llama, "dense")
    read(llama, memory, tokens(1, 20))
    with monkeypatch.context() as broken:
        fail_at(broken, TokenBuffer, "append", 1, MemoryError())
        with pytest.raises(MemoryError):
            memory.layers[1].write(*torch.zeros(2, 1, 2, 3, 8))
    check_marked(llama, memory, tokens(1, 21))


def test_a_fork_that_fails_is_marked(llama, monkeypatch):
    dense, empty = prefill(llama, tokens(1, 40)), LOSSY["kivi"](llama)
    for name in ("append", "drop"):
        with monkeypatch.context() as broken:
            fail_at(broken, TokenBuffer, name, 2, MemoryError())
            with pytest.raises(MemoryError):
                fork(dense, empty)
        check_marked(llama, empty, tokens(1, 41))
        empty.reset()
    fork(dense, empty)
    read(llama, empty, tokens(1, 41))


@pytest.mark.parametrize("layer", [0, 2])
def test_a_step_that_cannot_be_settled_marks_the_cache(llama, monkeypatch, layer):
    memory = LOSSY["kivi"](llama)
    read(llama, memory, tokens(1, 40))
    with StaticDecoder(llama, memory, new_tokens=20) as decoder:
        for _ in range(7):
            decoder.step(tokens(1, 1))  # the next one makes a segment of 8 due
        monkeypatch.setattr(memory.layers[layer], "settle", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.step(tokens(1, 1))
    monkeypatch.undo()
    check_marked(llama, memory, tokens(1, 60))
    memory.reset()
    read(llama, memory, tokens(2, 40))


@dataclass(frozen=True)
class Picky(Spy):
    """Refuses, in one layer."""

    name: ClassVar[str] = "picky"
    where: int = 0
    error: type = TypeError

    def bind(self, shape, profile, budget):
        bound = super().bind(shape, profile, budget)
        plain = bound.layer

        def layer(index):
            made = plain(index)
            if index == self.where:
                made.refuse = self.refuse
            return made

        object.__setattr__(bound, "layer", layer)
        return bound

    def refuse(self, p):
        if p.phase == "chunk":
            raise self.error("not like this")


@pytest.mark.parametrize("error", [TypeError, ValueError, MemoryError])
def test_a_refusal_in_the_first_layer_changes_nothing(models, error):
    llama, stock = models["llama"]
    memory, ids = longwave.cache(llama, Picky(error=error)), tokens(1, 40)
    read(llama, memory, ids[:, :30])
    before = state_of(memory)
    with pytest.raises(error, match="not like this"):
        read(llama, memory, ids[:, :35])
    check_state(state_of(memory), before)
    with torch.no_grad():
        want = stock(ids[:, :31]).logits[:, -1:]
    torch.testing.assert_close(read(llama, memory, ids[:, :31]), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_a_refusal_after_other_layers_took_the_tokens_marks_the_cache(llama, error):
    memory = longwave.cache(llama, Picky(where=1, error=error))
    read(llama, memory, tokens(1, 30))
    with pytest.raises(error, match="not like this"):
        read(llama, memory, tokens(1, 35))
    check_marked(llama, memory, tokens(1, 31))


# masks of the caller's own


def masks_of(new, columns):
    return {
        "one row too many": torch.ones(3, 1, new, columns, dtype=torch.bool),
        "heads of another model": torch.ones(2, 3, new, columns, dtype=torch.bool),
        "more queries": torch.ones(2, 1, new + 3, columns, dtype=torch.bool),
        "fewer columns": torch.ones(2, 1, new, columns - 1, dtype=torch.bool),
        "whole numbers": torch.ones(2, 1, new, columns, dtype=torch.long),
        "another float": torch.zeros(2, 1, new, columns, dtype=torch.float16),
    }


@pytest.mark.parametrize("kind", masks_of(4, 44))
@pytest.mark.parametrize("name", ["dense", "kivi", "streaming", "h2o", "quest"])
def test_a_refused_4d_mask_changes_nothing(llama, name, kind):
    memory = longwave.cache(llama, "dense") if name == "dense" else LOSSY[name](llama)
    ids = tokens(2, 50)
    read(llama, memory, ids[:, :40])
    twin, before = copy.deepcopy(memory), state_of(memory)
    with pytest.raises((ValueError, NotImplementedError), match="4D attention mask"), torch.no_grad():
        llama(ids[:, 40:44], **into(memory), attention_mask=masks_of(4, 44)[kind])
    check_state(state_of(memory), before)
    sizes = (4, 1, 1)
    assert torch.equal(read_in(llama, memory, ids, sizes), read_in(llama, twin, ids, sizes))


@pytest.mark.parametrize("name", ["kivi", "fourier", "streaming", "snapkv-pages", "fourier-paper"])
def test_a_4d_mask_over_what_is_not_held_one_by_one_is_refused(llama, name):
    memory, ids = LOSSY[name](llama), tokens(2, 50)
    read(llama, memory, ids[:, :40])
    twin, before = copy.deepcopy(memory), state_of(memory)
    with pytest.raises(NotImplementedError, match="pass a 2D mask"), torch.no_grad():
        llama(ids[:, 40:44], **into(memory), attention_mask=torch.ones(2, 1, 4, 44, dtype=torch.bool))
    check_state(state_of(memory), before)
    assert torch.equal(read(llama, memory, ids[:, :44]), read(llama, twin, ids[:, :44]))


def test_a_4d_mask_is_taken_where_every_token_is_held(models):
    """Evicting and paged layers too, as long as nothing went."""
    llama, stock = models["llama"]
    ids, mask = tokens(2, 9), torch.ones(2, 1, 3, 9).tril(6)
    mask[:, :, :, 2:4] = 0
    with torch.no_grad():
        want = stock(ids, attention_mask=torch.cat([torch.ones(2, 1, 6, 9).tril(), mask], 2).bool()).logits[:, -3:]
    for name in ("kivi", "streaming", "quest"):
        memory = LOSSY[name](llama)
        read(llama, memory, ids[:, :6])
        with torch.no_grad():
            got = llama(ids[:, 6:], **into(memory), attention_mask=mask.bool()).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# crop


class Forgetful(MemoryLayer):
    """Evicts and tells nobody, as a first attempt at a method may."""

    def settle(self):
        drop = [max(0, n - 20) for n in self.dense.lengths]
        self.dense.drop(2, drop) if any(drop) else self.dense.fit()


class ForgetfulBound(Bound):
    def layer(self, index):
        return Forgetful(index)

    def layer_bytes(self, index, tokens):
        return 0


@dataclass(frozen=True)
class Forgets(Method):
    name: ClassVar[str] = "forgets"

    def bind(self, shape, profile, budget):
        return ForgetfulBound(self, shape, budget)


def test_crop_reaches_no_further_than_what_is_held(llama):
    memory = longwave.cache(llama, Forgets())
    read(llama, memory, tokens(1, 40))
    before = state_of(memory)
    assert [layer["lengths"] for layer in before] == [[20]] * 3
    with pytest.raises(ValueError, match="cannot remove the last 30 tokens: of row 0 only 20 are still held"):
        memory.crop(-30)
    check_state(state_of(memory), before)
    memory.crop(-5)
    for now, was in zip(state_of(memory), before, strict=True):
        assert (now["columns"], now["rows"], now["lengths"]) == (35, [35], [15])
        assert torch.equal(now["k"], was["k"][:, :, :15])


def test_crop_asks_every_layer_before_it_cuts_one(llama, monkeypatch):
    memory = LOSSY["kivi"](llama)
    read(llama, memory, tokens(2, 44))
    before = state_of(memory)

    def cannot(counts):
        raise ValueError("cannot remove them")

    with monkeypatch.context() as last:
        last.setattr(memory.layers[2], "can_drop", cannot)
        with pytest.raises(ValueError, match="cannot remove them"):
            memory.crop(-1)
    check_state(state_of(memory), before)
    memory.crop(-1)
    with monkeypatch.context() as last:
        last.setattr(memory.layers[2], "drop_last", lambda counts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            memory.crop(-1)
    check_marked(llama, memory, tokens(2, 44))


def sliding_first(full_first):
    """Full and sliding layers: (model, stock)."""
    torch.manual_seed(0)
    if full_first:
        config = Qwen2Config(
            **SMALL, num_hidden_layers=3, use_sliding_window=True, sliding_window=16, max_window_layers=1
        )
        model = Qwen2ForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data *= 4
    else:
        model = build("gemma3")
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("full_first", [True, False], ids=["full first", "sliding first"])
@pytest.mark.parametrize("name", ["dense", "streaming"])
def test_crop_over_sliding_layers_is_all_or_nothing(full_first, name):
    model, stock = sliding_first(full_first)
    memory = longwave.cache(model, "dense") if name == "dense" else LOSSY[name](model)
    ids = tokens(2, 70)
    read(model, memory, ids[:, :10])
    memory.crop(-3)  # within every window
    assert [layer.get_seq_length() for layer in memory.layers] == [7] * len(memory.layers)
    read(model, memory, ids[:, :60])
    before = state_of(memory)
    others = {
        index: copy.deepcopy(vars(layer)) for index, layer in enumerate(memory.layers) if not hasattr(layer, "rows")
    }
    with pytest.raises(ValueError, match=r"cannot remove the last 5 tokens.*copy.deepcopy"):
        memory.crop(-5)
    check_state(state_of(memory), before)
    for index, was in others.items():
        now = vars(memory.layers[index])
        assert now.keys() == was.keys()
        for key, value in was.items():
            assert torch.equal(now[key], value) if torch.is_tensor(value) else now[key] == value
    got = read(model, memory, ids[:, :64])
    if name == "dense":
        with torch.no_grad():
            torch.testing.assert_close(got, stock(ids[:, :64]).logits[:, -4:], rtol=1e-4, atol=1e-4)


def test_crop_in_a_cache_that_is_padded(models):
    """A crop reaches into padding at the left, and rows end up with fewer tokens than it has columns."""
    llama, stock = models["llama"]
    ids, mask = left_padded(2, 30, [0, 22])
    memory = longwave.cache(llama, "dense")
    read(llama, memory, ids[:, :26], mask)
    memory.crop(-6)
    assert memory.layers[0].rows == [20, 0]
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        want = stock(ids, attention_mask=mask, position_ids=positions).logits[:, 22:]
    got = read(llama, memory, ids, mask)[:, 2:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# another model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_a_model_that_never_selected_our_attention_says_what_to_do(kind, implementation):
    """A cache that was stored by one process, and read by another that has the model anew."""
    model = build(kind)
    other = copy.deepcopy(model)
    other.set_attn_implementation(implementation)
    memory, ids = longwave.cache(model, "dense"), tokens(1, 20)
    read(model, memory, ids[:, :12])
    memory = pickle.loads(pickle.dumps(memory))
    for use in (
        lambda: read(other, copy.deepcopy(memory), ids),
        lambda: read(other, copy.deepcopy(memory), ids[:, :13]),
        lambda: other.generate(ids, **into(copy.deepcopy(memory)), max_new_tokens=2),
        lambda: read(other, longwave.cache(model, "dense"), ids),
    ):
        with pytest.raises(RuntimeError, match=r"attends by something else: longwave.cache\(model, ...\)"):
            use()
    longwave.cache(other, "dense")
    torch.testing.assert_close(read(other, memory, ids), read(model, longwave.cache(model, "dense"), ids)[:, 12:],
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_ours_can_be_undone(llama):
    model = build("llama")
    memory = longwave.cache(model, "dense")
    read(model, memory, tokens(1, 12))
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="set_attn_implementation afterwards undoes that"):
        read(model, memory, tokens(1, 13))
