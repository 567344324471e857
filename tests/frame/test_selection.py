"""A cache leaves its model as it was: what it attended by goes on, attentions, masks and all, in all its other uses."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import longwave
from longwave.frame.attention import is_ours
from tests.conftest import build, into, left_padded, tokens
from tests.matrix import LOSSY
from tests.reading import read


def pair(kind, implementation):
    """(a model that a cache was built for, its untouched twin)."""
    stock = build(kind)
    stock.set_attn_implementation(implementation)
    ours = copy.deepcopy(stock)
    longwave.cache(ours, "dense")
    assert is_ours(ours.config._attn_implementation)
    return ours, stock


def masks_seen(model, run):
    """What each attention module gets as its mask."""
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["attention_mask"])

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_other_uses_get_what_they_got(kind, implementation):
    """The same masks, and so the same numbers to the last bit: no cache, transformers' caches, padded or not."""
    ours, stock = pair(kind, implementation)
    ids, mask = left_padded(2, 40, [7, 0])
    for make in (lambda: None, lambda: DynamicCache(config=stock.config),
                 lambda: StaticCache(config=stock.config, max_cache_len=64)):  # fmt: skip
        for padding in (None, mask):
            found = []
            for model in (ours, stock):
                memory, logits = make(), []
                given = {} if memory is None else {**into(memory), "use_cache": True}

                def run(model=model, given=given, logits=logits, padding=padding, memory=memory):
                    with torch.no_grad():
                        logits.append(model(ids, attention_mask=padding, **given).logits)
                        if memory is not None:  # a step, and a chunk over what is stored
                            for new in (1, 5):
                                longer = None if padding is None else torch.ones(2, memory.get_seq_length() + new)
                                if longer is not None:
                                    longer[:, :40] = padding
                                logits.append(model(tokens(2, new), attention_mask=longer, **given).logits)

                found.append((masks_seen(model, run), logits))
            (our_masks, our_logits), (their_masks, their_logits) = found
            for got, want in zip(our_masks, their_masks, strict=True):
                assert (got is None) == (want is None)
                assert got is None or (got.dtype == want.dtype and torch.equal(got, want))
            assert all(torch.equal(a, b) for a, b in zip(our_logits, their_logits, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_model_that_gave_attentions_gives_them_afterwards(kind):
    ours, stock = pair(kind, "eager")
    ids, mask = left_padded(2, 20, [5, 0])
    with torch.no_grad():
        got, want = (model(ids, attention_mask=mask, output_attentions=True).attentions for model in (ours, stock))
        assert len(got) == len(want) == len(stock.model.layers)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        cached = ours(ids, attention_mask=mask, **into(DynamicCache(config=ours.config)), output_attentions=True)
    assert all(torch.equal(a, b) for a, b in zip(cached.attentions, want, strict=True))
    options = dict(
        attention_mask=mask, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_attentions=True
    )
    got, want = (model.generate(ids, **options).attentions for model in (ours, stock))
    assert all(torch.equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))


def test_a_model_that_gave_no_attentions_gives_none_afterwards():
    with torch.no_grad():
        got, want = (model(tokens(1, 12), output_attentions=True).attentions for model in pair("llama", "sdpa"))
    assert got == want == ()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_attentions_of_a_longwave_cache_are_refused(kind, implementation):
    model, stock = pair(kind, implementation)
    memory = LOSSY["streaming"](model)
    ids = tokens(1, 20)
    for ask in (
        lambda: read(model, memory, ids, output_attentions=True),
        lambda: model.generate(
            ids, **into(memory), max_new_tokens=2, return_dict_in_generate=True, output_attentions=True
        ),
    ):
        with pytest.raises(NotImplementedError, match="never forms attention weights: drop output_attentions=True"):
            ask()
        memory.reset()
    with torch.no_grad():
        want = stock(ids[:, :9]).logits
    torch.testing.assert_close(read(model, memory, ids[:, :9]), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_an_eager_model_generates_with_a_cache_as_it_did(kind):
    ours, stock = pair(kind, "eager")
    ids, mask = left_padded(2, 50, [13, 0])
    options = dict(attention_mask=mask, max_new_tokens=20, do_sample=False)
    memory = longwave.cache(ours, "kivi", budget=1.0, group=8, sinks=2, window=8)
    assert torch.equal(ours.generate(ids, **into(memory), **options), stock.generate(ids, **options))
    assert torch.equal(ours.generate(ids, **options), stock.generate(ids, **options))


def test_an_attention_function_of_the_users_own_goes_on():
    calls = []

    def own(module, query, key, value, attention_mask, **kwargs):
        calls.append(module.layer_idx)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("users_own", own)
    AttentionMaskInterface.register("users_own", sdpa_mask)
    ours, stock = pair("llama", "users_own")
    ids = tokens(1, 20)
    with torch.no_grad():
        calls.clear()
        got = ours(ids).logits
        assert calls == [0, 1, 2]
        assert torch.equal(got, stock(ids).logits)
        calls.clear()
        torch.testing.assert_close(read(ours, longwave.cache(ours, "dense"), ids), got, rtol=1e-4, atol=1e-4)
    assert not calls  # a LongCache answers by itself


def test_models_of_different_kinds_side_by_side():
    """The names stand beside each other: one model's choice is not the other's."""
    pairs = [pair("llama", "eager"), pair("llama", "sdpa"), pair("gemma3", "eager")]
    assert len({ours.config._attn_implementation for ours, _ in pairs}) == 2
    for ours, stock in pairs:
        with torch.no_grad():
            assert torch.equal(ours(tokens(1, 12)).logits, stock(tokens(1, 12)).logits)
    name = pairs[0][0].config._attn_implementation
    longwave.cache(pairs[0][0], "dense")
    assert pairs[0][0].config._attn_implementation == name  # a second cache changes nothing


def test_models_are_taken_over_by_many_threads_at_once():
    models = [build("llama") for _ in range(8)]
    for index, model in enumerate(models):
        model.set_attn_implementation("eager" if index % 2 else "sdpa")
    together, failed = threading.Barrier(16), []

    def take(model):
        together.wait()
        try:
            for _ in range(20):
                longwave.cache(model, "dense")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=take, args=(model,)) for model in models * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    names = [model.config._attn_implementation for model in models]
    assert all(is_ours(name) for name in names)
    assert names == names[:2] * 4


# threads that share a model


def test_threads_that_share_a_model_do_not_disturb_each_other():
    """Each generates with a cache of its own, one of them without; all as if it were alone."""
    model = build("llama")
    makers = [LOSSY[name] for name in ("fourier", "kivi", "streaming-slots", "h2o", "quest", "snapkv-pages")]
    prompts = [left_padded(2, 60, [0, 5 * index], seed=index) for index in range(len(makers) + 1)]

    def answer(index):
        ids, mask = prompts[index]
        given = {} if index == len(makers) else into(makers[index](model))
        return model.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False, **given)

    alone = [answer(index) for index in range(len(prompts))]
    together, found = threading.Barrier(len(prompts)), {}

    def run(index):
        together.wait()
        try:
            found[index] = answer(index)
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, want in enumerate(alone):
        assert torch.is_tensor(found[index]), found[index]
        assert torch.equal(found[index], want)


# importing


def test_importing_longwave_costs_nothing():
    program = (
        "import sys, longwave; assert 'fourier' not in dir(longwave); "
        "heavy = {'torch', 'transformers', 'numba', 'triton', 'numpy', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; assert not [m for m in sys.modules if m.startswith('longwave.')]; "
        "longwave.cache; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
